"""Accounts for every weight of a loaded model: it is in 4 bits, or there is a reason why not, found on the module that holds it.

Counts values and bytes, not layers: `is_loaded_in_4bit` is True, and every `nn.Linear` may be in NF4, where most of a mixture's
weights are still in 16 bits.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.units import gib
from qlora_helpers.model.expert_stacks import stack_names
from qlora_helpers.model.nf4 import compute_dtype, holds_nf4, is_nf4, stored_bytes, unpacked_numel
from qlora_helpers.model.sharding import is_sharded, of_all
from qlora_helpers.model.wiring import decoder_layers, text_decoder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NARROW = 64  # rows or columns; a matrix with fewer is no more than a few vectors, and NF4's blocks hold 64 values
SPARE_ROWS = 8  # a router may have a few outputs more than there are experts, for shared ones


@dataclass(frozen=True)
class Unquantised:
    """The weights that are not in 4 bits for one reason."""

    reason: str
    values: int
    gib: float


@dataclass(frozen=True)
class LoadAudit:
    """What was found in memory after loading.

    Attributes:
        quantized, expected: linear layers that are in 4 bits, and how many there are outside the reasons of `unquantised`.
        stacks: stacks of experts that are in 4 bits.
        storage: `nf4`, or `none` where quantisation was off.
        double_quantization: whether the constants of the 4-bit blocks are quantised too; None where nothing is in 4 bits.
        gib_by_device: weights and buffers on each device, GiB.
        parameters: weights, two for each byte of a 4-bit layer.
        unquantised: the weights that are not in 4 bits, by reason, the largest first.
        compute_dtype: the type that matrix multiplications run in.
        attention: the attention implementation.
        gib_by_process: weights and buffers that each process holds, GiB, where several share the decoder layers; else empty.
    """

    quantized: int
    expected: int
    stacks: int
    storage: str
    double_quantization: bool | None
    gib_by_device: dict[str, float]
    parameters: int
    unquantised: tuple[Unquantised, ...]
    compute_dtype: str
    attention: str
    gib_by_process: tuple[float, ...] = ()

    def __repr__(self) -> str:
        devices = ", ".join(f"{value:.3g} GiB on {name}" for name, value in self.gib_by_device.items())
        if self.gib_by_process:
            held = ", ".join(f"{value:.3g}" for value in self.gib_by_process)
            devices = f"shared out over {len(self.gib_by_process)} processes, which hold {held} GiB"
        layers = f"{self.quantized} of {self.expected} linear layers"
        layers += f" and {self.stacks} stacks of experts" if self.stacks else ""
        return (
            f"{self.parameters:,} parameters, {layers} in {self.storage}\n{self._shares()}"
            f"{devices}; matrix multiplications in {self.compute_dtype}, attention by {self.attention}"
        )

    def _shares(self) -> str:
        if self.storage == "none":
            return ""
        others = sum(each.values for each in self.unquantised)
        reasons = ", ".join(f"{each.reason} {each.values / self.parameters:.2%}" for each in self.unquantised)
        return f"{1 - others / self.parameters:.2%} of the parameters in 4 bits; not: {reasons or 'none'}\n"


def audit(model: PreTrainedModel, config: ModelConfig, *, left_out: Sequence[str] = ()) -> LoadAudit:
    """Checks that the model in memory is the one that was asked for, and measures it.

    Args:
        model: the loaded model, without adapters.
        config: what was asked for.
        left_out: names or paths of modules that the checkpoint itself keeps out of its 4 bits (`stored_formats.left_out_of_nf4`).

    Raises:
        ModelError: a weight matrix is in 16 or 32 bits without a reason, or a weight is on the meta device or on disk.
    """
    import torch

    lost = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if lost:
        raise ModelError(
            f"{len(lost)} weights are not in memory, {lost[0]} first",
            next_step="The model did not fit: raise model.max_memory_per_gpu_gib, or use more GPUs or a smaller model.",
        )
    reasons: dict[str, list[int]] = {}
    unexplained: dict[str, int] = {}
    excused: set[int] = set()
    reason_of = _Reasons(model, left_out)
    for name, module, parameter in _own_parameters(model):
        if holds_nf4(parameter):
            continue
        reason = reason_of(name, module, parameter)
        if reason is None:
            unexplained[name] = stored_bytes(parameter)
            continue
        excused.add(id(module))
        values, size = reasons.setdefault(reason, [0, 0])
        reasons[reason] = [values + parameter.numel(), size + stored_bytes(parameter)]
    sizes = _sizes(model)
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    packed = [module for module in linears if is_nf4(module)]
    states = [parameter.quant_state for parameter in model.parameters() if holds_nf4(parameter)]
    if config.quantization == "nf4" and (unexplained or not states):
        raise _shared_weights(model, unexplained) or _not_quantised(unexplained)
    return LoadAudit(
        quantized=len(packed),
        expected=sum(config.quantization == "none" or is_nf4(each) or id(each) not in excused for each in linears),
        stacks=len(states) - len(packed) - (head is not None and is_nf4(head)),
        storage=config.quantization,
        double_quantization=all(state.nested for state in states) if states else None,
        gib_by_device=sizes,
        parameters=sum(unpacked_numel(parameter) for parameter in model.parameters()),
        unquantised=tuple(
            Unquantised(reason, values, gib(size))
            for reason, (values, size) in sorted(reasons.items(), key=lambda item: -item[1][0])
        ),
        compute_dtype=str(compute_dtype(config)).removeprefix("torch."),
        attention=str(model.config._attn_implementation),
        gib_by_process=of_all(sum(sizes.values())) if is_sharded(model) else (),
    )


def _not_quantised(unexplained: dict[str, int]) -> ModelError:
    names = sorted(unexplained, key=lambda name: -unexplained[name])
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    total = sum(unexplained.values())
    got = f"{total:,} bytes that are not, in {names[0]}{more}" if names else "no weight in 4 bits at all"
    return ModelError(
        "the model was not quantised as asked",
        expected="every weight matrix of its decoder layers in 4-bit NF4",
        got=got,
        next_step="Set model.quantization=none to train it in bfloat16, or choose another model.",
    )


def _shared_weights(model: torch.nn.Module, unexplained: dict[str, int]) -> ModelError | None:
    """The error where several decoder layers have the same weights, as Zamba's do; transformers converts none of these."""
    first, places = (
        dict(model.named_parameters()),
        Counter(id(each) for _, each in model.named_parameters(remove_duplicate=False)),
    )
    shared = [name for name in unexplained if places[id(first[name])] > 1]
    if not shared:
        return None
    return ModelError(
        "several decoder layers of the model share one block of weights, which is not supported",
        expected="weights of its own in each decoder layer",
        got=f"{shared[0]} in {places[id(first[shared[0]])]} layers",
        next_step="Choose another model: the adapters of several layers can't be merged into one block.",
    )


def _own_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Parameter]]:
    """Yields each parameter once, with its name and the module that holds it."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}".lstrip("."), module, parameter


def _sizes(model: torch.nn.Module) -> dict[str, float]:
    """Returns the GiB of weights and buffers on each device."""
    found: dict[str, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        found[str(tensor.device)] = found.get(str(tensor.device), 0) + stored_bytes(tensor)
    return {name: gib(size) for name, size in sorted(found.items())}


class _Reasons:
    """Finds why a parameter of a model need not be in 4 bits, from what its module is and how the model uses it."""

    def __init__(self, model: PreTrainedModel, left_out: Sequence[str] = ()) -> None:
        from transformers.quantizers.quantizers_utils import should_convert_module

        head = model.get_output_embeddings()
        self._head = {id(parameter) for parameter in head.parameters()} if head is not None else set()
        several_parts = model.config.get_text_config() is not model.config
        self._text = {id(module) for module in text_decoder(model).modules()} if several_parts else None
        own = {name for module in model.modules() for name in _kept_in_fp32(module)}
        self._kept = lambda path: bool(own) and not should_convert_module(path, sorted(own))
        self._left_out = lambda path: bool(left_out) and not should_convert_module(path, list(left_out))
        self._routers, self._read = routers(model), read_directly(model)

    def __call__(self, path: str, module: Any, parameter: torch.Tensor) -> str | None:
        """Returns the reason, or None for a weight matrix that should be in 4 bits."""
        import torch

        if isinstance(module, torch.nn.Embedding):
            return "embedding"
        if id(parameter) in self._head:
            return "output head"
        if parameter.squeeze().dim() < 2:
            return "norms, biases and other vectors"
        if id(module) in self._routers:
            return "routers"
        if id(module) in self._read:
            return "read directly by the model's code"
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            return "convolutions"
        if self._text is not None and id(module) not in self._text:
            return "outside the language model"
        if self._kept(path) or self._kept(path.rpartition(".")[0]):
            return "kept in float32 by transformers"
        if _is_bias_of_experts(module, parameter):
            return "biases of experts"
        if self._left_out(path.rpartition(".")[0]):
            return "kept by the checkpoint"
        return "matrices of a few rows or columns" if sorted(parameter.shape)[-2] < NARROW else None


def _kept_in_fp32(module: Any) -> set[str]:
    """Returns the patterns of names that a transformers model keeps in float32."""
    names = (
        getattr(module, attribute, None) for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    )
    return {str(name) for each in names for name in each or ()}


def _is_bias_of_experts(module: Any, parameter: torch.Tensor) -> bool:
    """Whether a parameter is one vector for each matrix of a stack that the same module holds."""
    shapes = [_shape(module._parameters[name]) for name in stack_names(module)]
    return any(
        parameter.dim() == 2 and parameter.shape[0] == shape[0] and parameter.shape[1] in shape[1:] for shape in shapes
    )


def _shape(parameter: Any) -> torch.Size:
    state = getattr(parameter, "quant_state", None)
    return parameter.shape if state is None else state.shape


def routers(model: torch.nn.Module) -> set[int]:
    """Returns the `id`s of the modules that send tokens to experts.

    A router is in one block with a stack of experts, and its matrix has a row for each expert of that stack.
    """
    found: set[int] = set()
    for layer in decoder_layers(model):
        for block in layer.modules():
            experts = {
                int(_shape(child._parameters[name])[0]) for child in block.children() for name in stack_names(child)
            }
            for part in block.modules() if experts else ():
                if any(_has_rows(part, count) for count in experts):
                    found.add(id(part))
    return found


def read_directly(model: torch.nn.Module) -> set[int]:
    """Returns the `id`s of linear layers whose weight the model's own code multiplies by itself, as Mamba's does with `dt_proj`.

    Such code would multiply by the packed bytes.
    """
    import torch

    found: set[int] = set()
    sources: dict[type, str] = {}
    for module in (part for layer in decoder_layers(model) for part in layer.modules()):
        linears = {name: part for name, part in module.named_children() if isinstance(part, torch.nn.Linear)}
        if not linears:  # a class's source takes long: Python parses the whole file for it
            continue
        if type(module) not in sources:
            try:
                sources[type(module)] = inspect.getsource(type(module))
            except (OSError, TypeError):
                sources[type(module)] = ""
        read = set(re.findall(r"self\.(\w+)\.weight @", sources[type(module)]))
        found |= {id(part) for name, part in linears.items() if name in read}
    return found


def _has_rows(module: Any, count: int) -> bool:
    matrices = [_shape(value) for value in module._parameters.values() if value is not None]
    return any(len(shape) == 2 and count <= shape[0] <= count + SPARE_ROWS for shape in matrices) and not stack_names(
        module
    )
