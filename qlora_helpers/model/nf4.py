"""4-bit NF4 storage: its settings, Falcon's linear layers, exact gradients on a CPU, and the true sizes of packed weights.

NF4 and double quantisation: Dettmers et al. 2023, arXiv:2305.14314. Knows nothing of checkpoints, adapters or devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import ModelConfig

if TYPE_CHECKING:
    import torch


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


def is_nf4(module: torch.nn.Module) -> bool:
    """Whether a linear layer holds NF4 weights."""
    from bitsandbytes.nn import Linear4bit

    state = getattr(module.weight, "quant_state", None)
    return isinstance(module, Linear4bit) and state is not None and state.quant_type == "nf4"


def unpacked_numel(parameter: torch.Tensor) -> int:
    """Returns how many weights a parameter holds: two per byte where they are packed in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def stored_bytes(tensor: torch.Tensor) -> int:
    """Returns the bytes that a parameter or buffer takes, quantisation constants included."""
    size = tensor.numel() * tensor.element_size()
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        parts = (state.absmax, state.code, state.offset)
        size += sum(part.numel() * part.element_size() for part in parts if part is not None)
        state = state.state2
    return size
