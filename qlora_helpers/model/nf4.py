"""4-bit NF4 storage: its settings, Falcon's linear layers, exact gradients on a CPU, and the true sizes of packed weights.

NF4 and double quantisation: Dettmers et al. 2023, arXiv:2305.14314. Knows nothing of checkpoints, adapters or devices.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import ModelConfig

if TYPE_CHECKING:
    import torch

CPU_KERNELS = [
    f"cdequantize_blockwise_cpu_{kind}_{dtype}" for kind in ("fp4", "nf4") for dtype in ("fp32", "bf16", "fp16")
]


def compute_dtype(config: ModelConfig) -> torch.dtype:
    """Returns the type for matrix multiplications: bfloat16, float16 on GPUs that lack it, float32 on a CPU."""
    import torch

    if config.compute_dtype != "auto":
        return getattr(torch, config.compute_dtype)
    if config.device_map == "cpu" or not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def quantization_settings(config: ModelConfig, dtype: torch.dtype) -> Any:
    """Returns bitsandbytes' settings, or None where quantisation is off. (Its own defaults are fp4 and float32.)"""
    from transformers import BitsAndBytesConfig

    if config.quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


@contextlib.contextmanager
def falcon_linears_as_plain() -> Iterator[None]:
    """Lets transformers quantise Falcon.

    `replace_with_bnb_linear` takes modules whose type is exactly `torch.nn.Linear`. Falcon's layers are a subclass that computes
    the same, so they would silently stay in bfloat16. While this is open, a model is built with the plain class instead.
    `tests/model/test_loading.py` fails once transformers no longer needs this.
    """
    import torch
    from transformers.models.falcon import modeling_falcon

    original = modeling_falcon.FalconLinear
    modeling_falcon.FalconLinear = torch.nn.Linear
    try:
        yield
    finally:
        modeling_falcon.FalconLinear = original


def keep_gradients_exact_on_cpu(model: torch.nn.Module) -> None:
    """Stops bitsandbytes from repacking weights for inference on CPUs with AVX512-BF16.

    The kernel for that layout has no backward pass, so after one evaluation gradients would be silently wrong.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def set_compute_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Makes a model compute in this type, whatever a checkpoint that was packed already says of its own.

    Of such a checkpoint transformers leaves the other weights in the type that they are stored in; those in 16 bits are cast.
    """
    import torch
    from bitsandbytes.nn import Linear4bit

    from qlora_helpers.model.expert_stacks import PackedStacks

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
        elif isinstance(module, PackedStacks):
            module.stack_dtype = dtype
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16) and getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.to(dtype)


def unpack_rightly_on_cpu() -> None:
    """Makes bitsandbytes unpack 4-bit weights on a CPU by each block's own constant; does so once.

    bitsandbytes 0.50 packs blocks of 64 values one after another, whatever the rows. Its kernels for CPUs count blocks from the
    beginning of each row, so where a row is not made of whole blocks, they multiply by the constants of other blocks. The blocks
    are here given to them as the rows. `tests/model/test_nf4.py` fails once bitsandbytes no longer needs this.
    """
    from bitsandbytes.backends.cpu.ops import lib

    for name in CPU_KERNELS:
        own = getattr(lib, name, None)
        if own is None or hasattr(own, "own"):
            continue
        wrapped = functools.partial(_by_blocks, own)
        wrapped.own = own  # type: ignore[attr-defined]
        setattr(lib, name, wrapped)


def _by_blocks(own: Any, packed: Any, constants: Any, out: Any, block: Any, rows: Any, columns: Any) -> Any:
    """Calls a kernel with as many rows as there are blocks, where its own rows are not made of whole ones."""
    count = rows.value * columns.value
    if columns.value % block.value:
        whole = count % block.value == 0
        rows = type(rows)(count // block.value if whole else 1)
        columns = type(columns)(block.value if whole else count)
    return own(packed, constants, out, block, rows, columns)


def is_nf4(module: torch.nn.Module) -> bool:
    """Whether a linear layer holds NF4 weights."""
    import torch

    return isinstance(module, torch.nn.Linear) and holds_nf4(module.weight)


def holds_nf4(parameter: torch.Tensor) -> bool:
    """Whether a parameter, of a linear layer or a stack of experts, is packed in NF4."""
    state = getattr(parameter, "quant_state", None)
    return state is not None and state.quant_type == "nf4"


def unpacked_numel(parameter: torch.Tensor) -> int:
    """Returns how many weights a parameter holds: two per byte where they are packed in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def stored_bytes(tensor: torch.Tensor) -> int:
    """Returns the bytes that a parameter or buffer takes in this process, quantisation constants included."""
    here = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a part of a weight that is shared out
    size = here.numel() * here.element_size()
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        parts = (state.absmax, state.code, state.offset)
        size += sum(part.numel() * part.element_size() for part in parts if part is not None)
        state = state.state2
    return size
