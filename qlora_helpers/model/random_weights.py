"""Builds a catalogued model at true size with random weights, layer by layer in 4 bits on its device.

The unquantised model is never in memory: each layer's weights are drawn, quantised and dropped before the next layer's. Used for
rehearsals, planning and benchmarks; the model's configuration is marked so that nobody mistakes it for a trained one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import ModelConfig
from qlora_helpers.model.nf4 import falcon_linears_as_plain, quantization_settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qlora_helpers.model.sharding import PartKeeper

STANDARD_DEVIATION = 0.02


def build_random_model(
    shape: dict[str, Any],
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    attention: str | None,
    places: dict[str, int | str] | str = "auto",
    seed: int = 0,
    keeper: PartKeeper | None = None,
) -> PreTrainedModel:
    """Builds a causal language model from its shape.

    Args:
        shape: the model's `config.json`.
        config: quantisation.
        dtype: of the unquantised weights and of matrix multiplications.
        attention: attention implementation; None takes transformers' choice.
        places: a device map, as `from_pretrained` takes it; `auto` spreads the layers evenly over the GPUs.
        seed: for the weights; each device derives its own from it.
        keeper: keeps this process's part of each weight of the decoder layers; None keeps them whole.
    """
    import torch
    from accelerate import dispatch_model, init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    known = AutoConfig.for_model(**shape)
    draw = _WeightDrawer(_even_map(known, config) if isinstance(places, str) else places, dtype, seed)
    with falcon_linears_as_plain(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(known, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    if config.quantization == "nf4":
        _quantise_linears(model, config, draw, keeper)
        _quantise_stacks(model, config, draw)
        settings = quantization_settings(config, dtype)
        model.hf_quantizer = AutoHfQuantizer.from_config(settings)
        model.config.quantization_config = settings
        model.quantization_method = settings.quant_method
        model.is_loaded_in_4bit = model.is_quantized = True
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = draw(name, *parameter.shape, ones=_is_norm(name))
            _set(model, name, torch.nn.Parameter(value, requires_grad=False))
            if _is_norm(name):
                _start_neutral(model, name)
    model.tie_weights()
    for name, buffer in list(model.named_buffers()):
        _set(model, name, buffer.to(draw.device(name)))
    if draw.places != {"": "cpu"}:
        model.hf_device_map = dict(draw.places)
    if len(set(draw.places.values())) > 1:
        dispatch_model(model, draw.places, skip_keys=model._skip_keys_device_placement)
    model.config.random_weights = True
    return model.eval()


def _even_map(known: Any, config: ModelConfig) -> dict[str, int | str]:
    """Spreads the decoder layers evenly over this machine's GPUs; without a GPU everything goes to the CPU."""
    import torch

    from qlora_helpers.model.placement import layer_map

    gpus = torch.cuda.device_count() if config.device_map == "auto" and torch.cuda.is_available() else 0
    if gpus < 2:
        return {"": 0 if gpus else "cpu"}
    layers = known.get_text_config().num_hidden_layers
    counts = [layers * (gpu + 1) // gpus - layers * gpu // gpus for gpu in range(gpus)]
    found: dict[str, int | str] = {**(layer_map(known, counts) or {"": 0})}
    return found


class _WeightDrawer:
    """Draws random weights, each on the device of its module."""

    def __init__(self, places: dict[str, int | str], dtype: torch.dtype, seed: int) -> None:
        import torch

        self.places, self.dtype = places, dtype
        # The longest name comes first, so that a layer's own place takes precedence over its parent's.
        self._devices = {
            name: torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
            for name, place in sorted(places.items(), key=lambda item: -len(item[0]))
        }
        self._generators = {  # every process of a torchrun job draws the same weights, whichever GPU it has
            device: torch.Generator(device=device).manual_seed(seed + 1000 * number)
            for number, device in enumerate(sorted(set(self._devices.values()), key=str))
        }

    def device(self, name: str) -> torch.device:
        """Returns the device of the module or weight with this name."""
        return next(
            device for place, device in self._devices.items() if not place or f"{name}.".startswith(f"{place}.")
        )

    def __call__(self, name: str, *shape: int, ones: bool = False) -> torch.Tensor:
        """Returns normally distributed values, or ones."""
        import torch

        device = self.device(name)
        value = torch.empty(shape, dtype=self.dtype, device=device)
        return value.fill_(1.0) if ones else value.normal_(0.0, STANDARD_DEVIATION, generator=self._generators[device])


def _quantise_linears(
    model: PreTrainedModel, config: ModelConfig, draw: _WeightDrawer, keeper: PartKeeper | None
) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.quantizers.quantizers_utils import should_convert_module

    from qlora_helpers.model.quantizer import left_as_they_are, stacks_of
    from qlora_helpers.model.sharding import stacks_not_shared
    from qlora_helpers.model.wiring import decoder_layers

    head, left = model.get_output_embeddings(), left_as_they_are(model)
    if keeper is not None and stacks_of(model):
        raise stacks_not_shared()
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or module is head or not should_convert_module(name, left):
            continue
        packed = Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=draw.dtype,
            compress_statistics=config.double_quantization,
            quant_type="nf4",
            device="meta",
        )
        packed.weight = Params4bit(
            draw(name, module.out_features, module.in_features),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=config.double_quantization,
            module=packed,
        ).to(draw.device(name))
        if keeper is not None and id(module) in inside:
            packed.weight = keeper.part_of(packed.weight)
        _set(model, name, packed)


def _quantise_stacks(model: PreTrainedModel, config: ModelConfig, draw: _WeightDrawer) -> None:
    from qlora_helpers.model.expert_stacks import pack_stack, prepare_stacks
    from qlora_helpers.model.quantizer import stacks_of

    paths = {id(module): path for path, module in model.named_modules()}
    for module, names in stacks_of(model):
        shapes = {name: module._parameters[name].shape for name in names}
        prepare_stacks(module, names, double_quantization=config.double_quantization, dtype=draw.dtype)
        for name, shape in shapes.items():
            pack_stack(module, name, draw(f"{paths[id(module)]}.{name}", *shape))


def _is_norm(name: str) -> bool:
    return name.endswith("weight") and any(part in name for part in ("norm", "ln_"))


def _start_neutral(model: PreTrainedModel, name: str) -> None:
    """Gives a norm's weight the value that its family starts from: some multiply by one more than the weight (Gemma, Qwen3.5).

    A norm of queries also takes over the scale of the scores where the layer has none of its own (Gemma 4, which learns it): else
    random scores would be so large that each token attended to one other.
    """
    import torch

    path, _, _ = name.rpartition(".")
    module, (parent, _, leaf) = model.get_submodule(path), path.rpartition(".")
    if not list(module.children()):
        model._init_weights(module)
    scale = getattr(model.get_submodule(parent), "scaling", None)
    if leaf == "q_norm" and scale == 1:
        with torch.no_grad():
            module.weight.mul_(module.weight.numel() ** -0.5)


def _set(model: torch.nn.Module, name: str, value: Any) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)
