"""Makes transformers quantise stacks of experts to NF4 while it reads a checkpoint, one stack after another.

transformers' own quantizer for bitsandbytes converts linear layers alone. This one prepares the stacks of the decoder layers too
(`model.expert_stacks`); each is packed as soon as its values have arrived, so that one stack at a time is in memory in full.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from qlora_helpers.model.audit import read_directly, routers
from qlora_helpers.model.expert_stacks import PackedStacks, packed, prepare_stacks, stack_names
from qlora_helpers.model.sharding import PartKeeper, stacks_not_shared
from qlora_helpers.model.wiring import decoder_layers

_NAME = "bitsandbytes_4bit"
FEW = 16  # rows or columns of a linear layer that stays as it is: it costs no memory, and the model's code may read it directly


@contextlib.contextmanager
def stacks_quantised(keeper: PartKeeper | None = None) -> Iterator[None]:
    """While open, `from_pretrained` with bitsandbytes' 4-bit settings quantises stacks of experts too.

    Args:
        keeper: keeps this process's part of each weight of the decoder layers; None keeps them whole.
    """
    own = auto.AUTO_QUANTIZER_MAPPING[_NAME]
    auto.AUTO_QUANTIZER_MAPPING[_NAME] = type("OurQuantizer", (Nf4Quantizer,), {"keeper": keeper})
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING[_NAME] = own


class Nf4Quantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' quantizer for linear layers and for stacks of experts."""

    keeper: PartKeeper | None = None

    @staticmethod
    def get_modules_to_not_convert(model: Any, *args: Any, **kwargs: Any) -> list[str]:
        return [*Bnb4BitHfQuantizer.get_modules_to_not_convert(model, *args, **kwargs), *left_as_they_are(model)]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, PackedStacks) and name in stack_names(module):
            return True
        return super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> Any:
        return _Quantize(self)

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map=device_map, **kwargs)
        if self.keeper is not None:
            if stacks_of(model, self.modules_to_not_convert):
                raise stacks_not_shared()
            self.keeper.mark(model)
        if not self.pre_quantized:
            for module, names in stacks_of(model, self.modules_to_not_convert):
                self._prepare(module, names)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        for module, names in stacks_of(model, self.modules_to_not_convert):  # in 16 bits beside 4-bit linear layers
            values = {name: module._parameters[name].data for name in names}
            if not isinstance(module, PackedStacks):
                self._prepare(module, names)
                for name in names:
                    module._parameters[name] = packed(values.pop(name), self._double)
        return model

    @property
    def _double(self) -> bool:
        return self.quantization_config.bnb_4bit_use_double_quant

    def _prepare(self, module: Any, names: list[str]) -> None:
        dtype = self.quantization_config.bnb_4bit_compute_dtype
        prepare_stacks(module, names, double_quantization=self._double, dtype=dtype)


class _Quantize(Bnb4bitQuantize):
    """Quantises the values of one parameter, once all of its parts have been put together."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in input_dict.items():
            module, last = get_module_from_name(model, name)
            holds_stacks = isinstance(module, PackedStacks)
            if not holds_stacks:
                found |= super().convert({name: value}, model=model, **kwargs)
                continue
            whole = value[0] if isinstance(value, list) else value
            found[name] = packed(whole, module._parameters[last].compress_statistics)
            module._is_hf_initialized = True
        return found


def left_as_they_are(model: Any) -> list[str]:
    """Returns patterns of the linear layers that stay in 16 or 32 bits.

    They are routers, those of a few rows, those whose weight the model's code reads itself, and what must be in float32.

    transformers names some of the last by their weight (`classifier.weight`), which its conversion of modules does not match.
    """
    kept = [str(name).removesuffix(".weight") for name in getattr(model, "_keep_in_fp32_modules", None) or ()]
    special = routers(model) | read_directly(model)
    return kept + [
        f"{re.escape(path)}$"
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (id(module) in special or min(module.weight.shape) <= FEW)
    ]


def packed_weights(model: Any) -> set[int]:
    """Returns the `id`s of the parameters that loading packs to NF4, of a model on any device, the meta device included.

    Args:
        model: unquantised, as transformers builds it; Falcon's with plain linear layers (`nf4.falcon_linears_as_plain`).
    """
    with _head_untied(model):
        left_alone = Nf4Quantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    linears = {
        id(module.weight)
        for path, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(path, left_alone)
    }
    stacks = stacks_of(model, left_alone)
    return linears | {id(module._parameters[name]) for module, names in stacks for name in names}


@contextlib.contextmanager
def _head_untied(model: Any) -> Iterator[None]:
    """While open, the output layer has a weight of its own, as in loading, which ties weights at its end.

    transformers leaves the last of a model's parameters as it is: without the output layer that would be another one.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    tied = head.weight
    head.weight = torch.nn.Parameter(tied.detach(), requires_grad=False)
    try:
        yield
    finally:
        head.weight = tied


def stacks_of(model: Any, left_alone: list[str] | None = None) -> list[tuple[torch.nn.Module, list[str]]]:
    """Returns the modules of a model's decoder layers that hold stacks, each with the stacks' names.

    Args:
        model: a causal language model.
        left_alone: names of modules or parameters, as transformers takes them, that stay as they are.
    """
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    found = []
    for path, module in model.named_modules():
        if id(module) in inside:
            names = [name for name in stack_names(module) if should_convert_module(f"{path}.{name}", left_alone or [])]
            if names and should_convert_module(path, left_alone or []):
                found.append((module, names))
    return found
