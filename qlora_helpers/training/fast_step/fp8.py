"""Multiplications with frozen 4-bit weights in FP8, forward and backward.

A frozen weight gets no gradient, so nothing accumulates in it: it is only multiplied with what flows through the layer, which FP8
does at up to twice the rate of bfloat16. Activations, gradients and weights are rounded to e4m3, each row with a scale of its own;
in the backward pass, which multiplies with the transposed weight, that is each of its columns. Adapters, norms, attention and the
loss compute as before, and so does everything without gradients, such as an evaluation. On a CPU the same values are rounded, and
multiplied in float32.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from qlora_helpers.model.patching import replace_forward
from qlora_helpers.model.sharding import is_sharded
from qlora_helpers.model.wiring import decoder_layers
from qlora_helpers.training.fast_step import matmuls
from qlora_helpers.training.fast_step.fp8_kernels import E4M3, LARGEST, LEAST, NESTED_BLOCK, nf4_to_fp8, rows_to_fp8

KEPT_FORWARD: tuple[str, ...] = ()
"""Names of linear layers that multiply in FP8 in the backward pass alone."""
PHASE_STEP = (5**0.5 - 1) / 2  # no fraction lies near few others of its multiples: any few passes cover 0 to 1 evenly
LEAST_CAPABILITY = (8, 9)  # Ada; Hopper has 9.0, Blackwell 10.0 and more
SIZES_MULTIPLE_OF = 16  # rows and columns of what an FP8 multiplication takes
PROBE_ERROR = 0.06  # largest relative error of a multiplication of normal numbers; rounding alone makes 0.038
_WEIGHT = (
    "Tensor packed, Tensor constants, Tensor inverse, Tensor code, Tensor? nested_code, Tensor? nested_constants, "
    "Tensor? offset, int[] shape"
)
torch.library.define("qlora_helpers::fp8_weight", f"({_WEIGHT}, bool transposed) -> Tensor")
torch.library.define("qlora_helpers::fp8_linear_unless_recomputing", f"(Tensor x, {_WEIGHT}, Tensor scales) -> Tensor")
torch.library.impl("qlora_helpers::fp8_weight", "CompositeExplicitAutograd", nf4_to_fp8)


@torch.library.register_fake("qlora_helpers::fp8_weight")
def _(packed: torch.Tensor, *rest: Any) -> torch.Tensor:
    *_, (rows, columns), transposed = rest
    return packed.new_empty((columns, rows) if transposed else (rows, columns), dtype=E4M3)


@torch.library.impl("qlora_helpers::fp8_linear_unless_recomputing", "CompositeExplicitAutograd")
def _linear(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    *weight, scales = rest
    if matmuls.recomputing():
        return matmuls._uninitialized(x, weight[-1][0])
    return _multiplied(x, torch.ops.qlora_helpers.fp8_weight(*weight, False), scales)


@torch.library.register_fake("qlora_helpers::fp8_linear_unless_recomputing")
def _(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rest[-2][0]))


class Fp8Matmuls:
    """The linear layers that multiply in FP8.

    Attributes:
        linears: each by its path in the model.
        others: how many frozen 4-bit layers of the decoder keep bfloat16, for their sizes.
        refusal: why nothing is multiplied in FP8 any more, or None; set by the proof before training.
        proof: what that proof found, in a line.
    """

    def __init__(self) -> None:
        self.linears: dict[str, torch.nn.Module] = {}
        self.scales: dict[torch.device, _Scales] = {}
        self.others = 0
        self.refusal: str | None = None
        self.proof = ""

    def __bool__(self) -> bool:
        return bool(self.linears)

    def __str__(self) -> str:
        return f"{len(self.linears)} of {len(self.linears) + self.others}"

    def start_pass(self, number: int) -> None:
        """Sets the scales to those of a training pass, so that a resumed run takes the same ones as an uninterrupted run.

        Args:
            number: how many forward passes with gradients the run has done before this one, over all its sessions.
        """
        for scales in self.scales.values():
            scales.seek(number)

    def share_scales(self) -> None:
        """Puts the scales of all weights on a device into one tensor, so that they move together."""
        weights = [linear.fp8 for linear in self.linears.values()]
        for device in {weight.packed.device for weight in weights}:
            self.scales[device] = _Scales([weight for weight in weights if weight.packed.device == device])


class _Scales:
    """The scales of all frozen weights on one device, which grow by another factor between 1 and 2 in every pass.

    A weight's nearest number in FP8 is off by the same amount at every step, and adapters would learn to make up for it: an error
    in the model that is evaluated and exported. With another scale the same weight is rounded otherwise, so that over a few passes
    its error is 0 on average. A larger scale leaves all values within range.
    """

    def __init__(self, weights: list[Fp8Weight]) -> None:
        parts = [scales for weight in weights for scales in (weight.row_scales, weight.column_scales)]
        self._smallest = torch.cat([part.flatten() for part in parts])
        self._now, self._inverse = self._smallest.clone(), 1 / self._smallest
        self._phase = torch.zeros((), device=self._now.device)
        start = 0
        for weight in weights:
            rows, columns = weight.shape
            places = slice(start, start + rows), slice(start + rows, start + rows + columns)
            weight.row_scales, weight.column_scales = (self._now[place].unsqueeze(0) for place in places)
            weight.inverse_rows, weight.inverse_columns = (self._inverse[place] for place in places)
            start += rows + columns

    @torch.no_grad()
    def seek(self, number: int) -> None:
        """Makes the next factor that of a pass, counted from 0 at the start of the run."""
        self._phase.fill_(number * PHASE_STEP % 1.0)

    @torch.no_grad()
    def move(self) -> None:
        """Takes the next factor. Nothing is allocated that outlives the call, so that a captured pass moves them too."""
        self._phase.add_(PHASE_STEP).frac_()
        factor = torch.exp2(self._phase)
        torch.mul(self._smallest, factor, out=self._now)
        torch.reciprocal(self._now, out=self._inverse)


class Fp8Weight:
    """A frozen 4-bit weight, and the scales of its rows and columns in FP8.

    Attributes:
        tensors: what `nf4_to_fp8` unpacks, its arguments without the scales; `(packed, constants, code, ...)`.
        shape: `[rows, columns]`.
        row_scales, column_scales: `(1, rows)` and `(1, columns)`, float32.
        in_forward: whether the forward pass multiplies in FP8 too.
        skips: whether the forward multiplication is skipped while its layer recomputes.
        among: the layers that multiply in FP8 together.
    """

    def __init__(self, weight: Any, among: Fp8Matmuls, *, in_forward: bool = True) -> None:
        from bitsandbytes.functional import dequantize_4bit

        state = weight.quant_state
        nested = state.state2 if state.nested else None
        self.packed, self.constants, self.code = weight.data.view(torch.uint8), state.absmax, state.code
        self.nested_code = nested.code if nested else None
        self.nested_constants = nested.absmax if nested else None
        self.offset = state.offset if nested else None
        self.shape = list(state.shape)
        values = dequantize_4bit(weight.data.view(-1, 1), state)
        rows, columns = (torch.maximum(values.amax(along), -values.amin(along)).float() for along in (1, 0))
        self.row_scales, self.column_scales = (
            (largest.clamp(min=LEAST) / LARGEST).unsqueeze(0) for largest in (rows, columns)
        )
        self.inverse_rows, self.inverse_columns = 1 / self.row_scales[0], 1 / self.column_scales[0]
        self.block, self.in_forward, self.skips, self.among = state.blocksize, in_forward, False, among

    def arguments(self, inverse: torch.Tensor) -> tuple[Any, ...]:
        """For `nf4_to_fp8`, all but the layout."""
        nested = self.nested_code, self.nested_constants, self.offset
        return self.packed, self.constants, inverse, self.code, *nested, self.shape


def _multiplied(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`(..., columns)` times a weight of `(rows, columns)` in e4m3: `(..., rows)` in the type of `x`.

    Args:
        x: rounded here.
        weight: in e4m3, without its scales.
        scales: of the weight's rows, `(1, rows)`.
    """
    values, value_scales = rows_to_fp8(x.flatten(0, -2))
    if x.is_cuda:
        out = torch._scaled_mm(
            values,
            weight.t(),
            scale_a=value_scales,
            scale_b=scales,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,  # sums in fewer bits than float32: 0.03757 off in place of 0.03755
        )
    else:
        out = ((values.float() * value_scales) @ (weight.float().t() * scales)).to(x.dtype)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])


class _Fp8Matmul(torch.autograd.Function):
    """`x @ weight.T`, and its gradient with respect to `x`. The weight is frozen: nothing of `x` is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Fp8Weight) -> torch.Tensor:
        ctx.fp8_weight = weight
        if not weight.in_forward:
            return _in_bfloat16(x, weight)
        arguments = weight.arguments(weight.inverse_rows)
        if weight.skips:
            return torch.ops.qlora_helpers.fp8_linear_unless_recomputing(x, *arguments, weight.row_scales)
        unpacked = torch.ops.qlora_helpers.fp8_weight(*arguments, False)
        return _multiplied(x, unpacked, weight.row_scales)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return fp8_backward(gradient, ctx.fp8_weight), None


def _in_bfloat16(x: torch.Tensor, weight: Fp8Weight) -> torch.Tensor:
    nested = weight.nested_code is not None
    ops = torch.ops.qlora_helpers.linear_4bit_unless_recomputing if weight.skips else torch.ops.bitsandbytes.gemm_4bit
    constants = weight.nested_constants if nested else weight.constants
    second = (weight.constants, weight.nested_code, weight.offset) if nested else (None, None, None)
    return ops(x, weight.packed.view(-1, 1), weight.shape, constants, weight.block, "nf4", None, *second)


def fp8_forward(x: torch.Tensor, weight: Fp8Weight) -> torch.Tensor:
    """`(..., columns)` -> `(..., rows)`, differentiable with respect to `x`."""
    # A view that is made inside of an autograd function can't be changed in place, and Falcon adds to what its MLP gives.
    return _Fp8Matmul.apply(x.flatten(0, -2), weight).view(*x.shape[:-1], weight.shape[0])


def fp8_backward(gradient: torch.Tensor, weight: Fp8Weight) -> torch.Tensor:
    """`(..., rows)` -> `(..., columns)`: the gradient that goes on to what came before a layer."""
    transposed = torch.ops.qlora_helpers.fp8_weight(*weight.arguments(weight.inverse_columns), True)
    return _multiplied(gradient, transposed, weight.column_scales)


@contextmanager
def fp8_matmuls(model: torch.nn.Module) -> Iterator[Fp8Matmuls]:
    """While open, frozen 4-bit linear layers of the decoder multiply in FP8 where gradients are taken.

    Args:
        model: a transformers model, without peft's wrapper around it; in bfloat16 on a GPU.
    """
    found = Fp8Matmuls()
    with ExitStack() as undo:
        for index, layer in enumerate(decoder_layers(model)):
            for path, module in layer.named_modules():
                if getattr(module._parameters.get("weight"), "quant_state", None) is None:  # an adapter names it too
                    continue
                if not _can_multiply(module):
                    found.others += 1
                    continue
                kept = any(part in KEPT_FORWARD for part in path.split("."))
                module.fp8 = Fp8Weight(module.weight, found, in_forward=not kept)
                undo.callback(delattr, module, "fp8")
                replace_forward(module, types.MethodType(_forward(module.forward), module), undo)
                found.linears[f"{index}.{path}"] = module
        found.share_scales()
        undo.callback(model.register_forward_pre_hook(_move_scales(found)).remove)
        yield found


def _move_scales(matmuls: Fp8Matmuls) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        if torch.is_grad_enabled() and matmuls.refusal is None:
            for scales in matmuls.scales.values():
                scales.move()

    return hook


def _can_multiply(linear: Any) -> bool:
    state = linear.weight.quant_state
    rows, columns = state.shape
    return (
        (rows, columns) == (linear.out_features, linear.in_features)
        and rows % SIZES_MULTIPLE_OF == columns % SIZES_MULTIPLE_OF == 0
        and columns % state.blocksize == 0
        and (not state.nested or state.state2.blocksize == NESTED_BLOCK)
        and not any(weight.requires_grad for weight in linear.parameters())
    )


def _forward(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` -> `(..., out_features)`."""
        weight = self.fp8
        other = x.is_cuda and (x.dtype != torch.bfloat16 or torch.is_autocast_enabled("cuda"))
        if weight.among.refusal is not None or other or not torch.is_grad_enabled():
            return own(x)
        out = fp8_forward(x, weight)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    return forward


def fp8_refusal(model: torch.nn.Module) -> str | None:
    """Why a model's frozen weights can't be multiplied in FP8 here, or None where they can: it is tried.

    Args:
        model: a transformers model, without peft's wrapper around it.
    """
    if is_sharded(model):
        return "no FP8: it multiplies whole weights, and the layers are shared out over several processes"
    weights = [weight for layer in decoder_layers(model) for weight in layer.parameters()]
    packed = [weight for weight in weights if getattr(weight, "quant_state", None) is not None]
    if not any(weight.quant_state.quant_type == "nf4" for weight in packed):
        return "no FP8: the decoder has no frozen weights in NF4"
    places = {weight.device for weight in packed}
    if all(place.type == "cpu" for place in places):
        return None  # emulated
    if any(place.type != "cuda" for place in places):
        return "no FP8: it is multiplied on CUDA GPUs, and emulated on a CPU"
    if model.dtype != torch.bfloat16:
        return f"no FP8: the model computes in {str(model.dtype).removeprefix('torch.')}, not in bfloat16"
    return next(filter(None, map(_card_refusal, sorted(places, key=str))), None)


def _card_refusal(device: torch.device) -> str | None:
    name = torch.cuda.get_device_name(device)
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"no FP8: {name} is older than compute capability {'.'.join(map(str, LEAST_CAPABILITY))}"
    draw = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(n, 128, generator=draw, device=device, dtype=torch.bfloat16) for n in (37, 64))
    rounded, scales = rows_to_fp8(weight)
    try:
        found = _multiplied(x, rounded, scales.t().contiguous()).float()
        exact = x.float() @ weight.float().t()
        error = float((found - exact).norm() / exact.norm())
        if not error <= PROBE_ERROR:
            return f"no FP8: multiplications on {name} are {error:.1%} off, of which rounding explains 3.8%"
    except Exception as error:  # an operator without this kind of scales, a driver without it
        return f"no FP8: {name} does not multiply in it: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return None
