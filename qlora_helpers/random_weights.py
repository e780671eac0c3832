"""A catalogued model at true size with random weights, built layer by layer in 4 bits on its device.

The 16-bit model never exists in memory: each layer's weights are drawn, quantised and dropped before the next is made. For
rehearsals, planning and benchmarks; the model's configuration is marked so that nobody mistakes it for a trained one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_helpers.config import ModelConfig
from qlora_helpers.nf4 import falcon_linears_as_plain, quantization_settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

STANDARD_DEVIATION = 0.02


def build_random_model(
    shape: dict[str, Any], config: ModelConfig, *, dtype: torch.dtype, attention: str | None, seed: int = 0
) -> PreTrainedModel:
    """Builds a causal language model from its shape, on the first GPU or else the CPU.

    Args:
        shape: the model's `config.json`.
        config: quantisation and device.
        dtype: of the unquantised weights and of the products.
        attention: attention implementation; None takes transformers' choice.
        seed: of the weights.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    device = "cuda" if config.device_map == "auto" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(seed)
    with falcon_linears_as_plain(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**shape), dtype=dtype, attn_implementation=attention
        )
    model.tie_weights()
    if config.quantization == "nf4":
        _quantise_linears(model, config, dtype, device, generator)
        settings = quantization_settings(config, dtype)
        model.hf_quantizer = AutoHfQuantizer.from_config(settings)
        model.config.quantization_config = settings
        model.quantization_method = settings.quant_method
        model.is_loaded_in_4bit = model.is_quantized = True
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            values = value.fill_(1.0) if _is_norm(name) else _drawn(value, generator)
            _set(model, name, torch.nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    model.to(device)
    model.config.random_weights = True
    return model.eval()


def _quantise_linears(
    model: PreTrainedModel, config: ModelConfig, dtype: torch.dtype, device: str, generator: torch.Generator
) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or module is head:
            continue
        packed = Linear4bit(
            module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=dtype,
            compress_statistics=config.double_quantization, quant_type="nf4", device="meta",
        )  # fmt: skip
        weights = torch.empty(module.out_features, module.in_features, dtype=dtype, device=device)
        packed.weight = Params4bit(
            _drawn(weights, generator), requires_grad=False, quant_type="nf4",
            compress_statistics=config.double_quantization, module=packed,
        ).to(device)  # fmt: skip
        _set(model, name, packed)


def _drawn(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return value.normal_(0.0, STANDARD_DEVIATION, generator=generator)


def _is_norm(name: str) -> bool:
    return name.endswith("weight") and any(part in name for part in ("norm", "ln_"))


def _set(model: torch.nn.Module, name: str, value: Any) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)
