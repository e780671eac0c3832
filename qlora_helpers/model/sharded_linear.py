"""A frozen linear layer in NF4 whose bytes are shared out over several processes, as FSDP2 needs it.

FSDP2 shares out plain parameters, not bitsandbytes' `Params4bit`, whose quantisation state would get lost. So a layer's weight is
held as one row of bytes, its packed values and behind them its quantisation constants. Knows nothing of meshes or models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit

Multiply = Callable[..., torch.Tensor]


class ShardedLinear4bit(torch.nn.Linear):
    """A frozen linear layer in NF4 whose bytes are shared out over several processes.

    Attributes:
        row: the bytes of the weight: a DTensor of which this process holds a part, and a plain parameter while the layer computes.
        weight: holds nothing; its device and its `quant_state` are what peft and the audit ask of a 4-bit layer's weight.
        state: bitsandbytes' quantisation state without its `absmax`, which lies behind the packed values in `row`.
        packed_bytes: how many bytes of `row` are packed values.
        compute_dtype: the type that matrix multiplications run in.
        multiply: what multiplies, in place of bitsandbytes' own operator; takes the same arguments.
    """

    def __init__(self, linear: Linear4bit, part: Part) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.compute_dtype = linear.bias, linear.compute_dtype
        self.state, self.packed_bytes = part.state, part.packed_bytes
        self.multiply: Multiply | None = None
        self.row = torch.nn.Parameter(
            torch.empty(part.total_bytes, dtype=torch.uint8, device="meta"), requires_grad=False
        )
        self.weight: Any = part.data[:0].clone()
        self.weight.quant_state = part.state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`, as `Linear4bit` does."""
        given = x.dtype
        x = x.to(self.compute_dtype or given)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        multiply = self.multiply or torch.ops.bitsandbytes.gemm_4bit.default
        return _Multiplication.apply(x, self.row, bias, self.state, self.packed_bytes, multiply).to(given)


class _Multiplication(torch.autograd.Function):
    """Multiplies by packed bytes. It saves the gathered row itself, whose memory FSDP2 frees and fills again in between."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        row: torch.Tensor,
        bias: torch.Tensor | None,
        state: Any,
        packed_bytes: int,
        multiply: Multiply,
    ) -> torch.Tensor:
        ctx.save_for_backward(row)
        ctx.state, ctx.packed_bytes = state, packed_bytes
        packed, constants = _parts(row, state, packed_bytes)
        nested = state.state2 if state.nested else None
        return multiply(
            x,
            packed,
            state.shape,
            nested.absmax if nested else constants,
            state.blocksize,
            state.quant_type,
            bias,
            constants if nested else None,
            nested.code if nested else None,
            state.offset if nested else None,
        )

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (row,) = ctx.saved_tensors
        return (
            gradient @ unpacked_row(row, ctx.state, ctx.packed_bytes).to(gradient.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def _parts(row: torch.Tensor, state: Any, packed_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the packed values, `(bytes, 1)`, and the constants, `(quantisation blocks,)`, as views of a row of bytes."""
    constants = row[packed_bytes:]
    return row[:packed_bytes].view(-1, 1), constants if state.nested else constants.view(torch.float32)


def unpacked_row(row: torch.Tensor, state: Any, packed_bytes: int) -> torch.Tensor:
    """Returns the weight that a whole row of bytes holds, `(out_features, in_features)`."""
    packed, constants = _parts(row, state, packed_bytes)
    if state.nested:
        constants = functional.dequantize_blockwise(constants, state.state2) + state.offset
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, constants.float(), state.blocksize, state.quant_type, state.shape, state.dtype
    )


class Part(torch.nn.Parameter):
    """What one process keeps of a quantised weight: `(bytes,)`, perhaps none.

    Attributes:
        state: the quantisation state, without its `absmax`.
        packed_bytes, total_bytes: of the whole weight: of its packed values, and with the constants behind them.
    """

    state: Any
    packed_bytes: int
    total_bytes: int
