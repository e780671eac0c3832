"""Holds the stacked weights of a mixture of experts in NF4, and gives them back in full where the experts' forward pass reads them.

transformers keeps the matrices of all experts of a layer in one parameter of three dimensions, `(experts, out, in)` or
`(experts, in, out)`; `load_in_4bit` converts linear layers alone and leaves these in 16 bits. Here the parameter holds the packed
bytes under its own name, and the module's class gets a property of that name, which returns the dequantised stack. So each
family's own forward pass runs unchanged, by whichever of transformers' implementations (`eager`, `grouped_mm`, ...).

A stack exists in full for one forward pass of its module. What autograd would keep of it for the backward pass is replaced by a
note of where it comes from, and the values are dequantised again when they are needed. Under activation checkpointing the whole
layer is computed again anyway, so nothing is replaced there. While `changed` is open, the forward pass reads a stack plus low-rank
products, which exist no longer than the stack does; such a stack may also be in 16 bits. Knows nothing of checkpoints or devices.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Params4bit

from qlora_helpers.model.nf4 import unpack_rightly_on_cpu

SMALLEST_SIDE = 32  # a parameter of three dimensions with a shorter side is no stack of weight matrices
LARGEST_CALL = 1 << 30  # values that one call of a bitsandbytes kernel handles; its kernels count in 32 bits
BLOCK = 64  # values that share a constant
_OPENED, _CHANGES = "_opened_stacks", "_changes_of_stacks"


@dataclass(frozen=True)
class Product:
    """What is added to a stack: `scale * left @ right`, with `left` `(experts, rows, r)` and `right` `(experts, r, columns)`."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    def detached(self) -> Product:
        return Product(self.left.detach(), self.right.detach(), self.scale)


def stack_names(module: torch.nn.Module) -> list[str]:
    """Returns the names of a module's own parameters that are stacks of weight matrices, packed or not."""
    if isinstance(module, torch.nn.Linear | torch.nn.Embedding | torch.nn.modules.conv._ConvNd):
        return []
    return [name for name, value in module.named_parameters(recurse=False) if _is_stack(value)]


def _is_stack(parameter: torch.nn.Parameter) -> bool:
    state = getattr(parameter, "quant_state", None)
    shape = parameter.shape if state is None else state.shape
    is_float = state is not None or parameter.is_floating_point()
    return is_float and len(shape) == 3 and min(shape[1:]) >= SMALLEST_SIDE


def prepare_stacks(module: torch.nn.Module, names: list[str], *, double_quantization: bool, dtype: torch.dtype) -> None:
    """Makes a module hold these parameters packed: their values, which may still be on the meta device, are packed as they arrive.

    Args:
        module: holds the parameters itself.
        names: of the parameters.
        double_quantization: whether the constants of the blocks are quantised too.
        dtype: of the values that the forward pass reads.
    """
    for name in names:
        module._parameters[name] = Params4bit(
            module._parameters[name].data,
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=double_quantization,
        )
    open_stacks(module, names, dtype)


def open_stacks(module: torch.nn.Module, names: list[str], dtype: torch.dtype) -> None:
    """Gives a module the class whose forward pass reads its stacks through `PackedStacks`, whether or not they are packed.

    Args:
        module: holds the parameters itself.
        names: of the parameters.
        dtype: of the values that the forward pass reads.
    """
    if not isinstance(module, PackedStacks):
        module.source_cls = type(module)  # bitsandbytes' loading asks for it
        module.__class__ = _packed_class(type(module), tuple(names))
        module.stack_dtype = dtype


def pack_stack(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Packs the values of a parameter that `prepare_stacks` made ready, on their device."""
    module._parameters[name] = packed(value, module._parameters[name].compress_statistics)


def packed(value: torch.Tensor, double_quantization: bool) -> Params4bit:
    """Quantises a stack to NF4 in blocks of 64 values; a stack that is too large for one kernel call goes in several.

    Args:
        value: `(experts, ., .)`, 16 or 32 bits.
        double_quantization: whether the constants of the blocks are quantised too.
    """
    unpack_rightly_on_cpu()
    rows = _rows_a_call(value.shape)
    if rows >= value.shape[0]:
        data, state = functional.quantize_4bit(
            value.contiguous(), compress_statistics=double_quantization, quant_type="nf4"
        )
    else:
        parts = [
            functional.quantize_4bit(value[first : first + rows].contiguous(), quant_type="nf4")
            for first in range(0, value.shape[0], rows)
        ]
        data, state = torch.cat([part for part, _ in parts]), parts[0][1]
        state.shape, state.absmax = value.shape, torch.cat([each.absmax for _, each in parts])
        if double_quantization:
            state.offset = state.absmax.mean()
            state.absmax, state.state2 = functional.quantize_blockwise(state.absmax - state.offset, blocksize=256)
            state.nested = True
    return Params4bit(
        data,
        requires_grad=False,
        quant_state=state,
        quant_type="nf4",
        compress_statistics=double_quantization,
        bnb_quantized=True,
    )


def unpacked(parameter: Any, dtype: torch.dtype, first: int = 0, last: int | None = None) -> torch.Tensor:
    """Returns the values of experts `first` to `last` of a packed stack, `(last - first, ., .)`."""
    state = parameter.quant_state
    count, *matrix = state.shape
    last = count if last is None else last
    values = matrix[0] * matrix[1]
    rows = _rows_a_call(state.shape)
    if (first, last) == (0, count) and rows >= count:
        return functional.dequantize_4bit(parameter.data, state).to(dtype)
    if values % state.blocksize:  # the blocks of two experts share bytes
        return functional.dequantize_4bit(parameter.data, state)[first:last].to(dtype)
    constants = state.absmax
    if state.nested:
        constants = functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    blocks, data = values // state.blocksize, parameter.data.flatten()
    found = torch.empty(last - first, *matrix, dtype=state.dtype, device=data.device)
    for start in range(first, last, rows):
        end = min(last, start + rows)
        part = copy.copy(state)
        part.absmax, part.nested = constants[start * blocks : end * blocks].contiguous(), False
        part.shape = torch.Size((end - start, *matrix))
        held = data[start * values // 2 : end * values // 2].view(-1, 1)
        found[start - first : end - first] = functional.dequantize_4bit(held, part)
    return found.to(dtype)


def _rows_a_call(shape: torch.Size) -> int:
    values = shape[1] * shape[2]
    return max(1, LARGEST_CALL // values) if values % BLOCK == 0 else shape[0]


class PackedStacks:
    """What is put before a module's own class once its stacks are packed."""

    stack_dtype: torch.dtype

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's own forward pass, with each stack in full from where it is first read to the end."""
        if _OPENED in self.__dict__:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        opened: dict[str, _Opened] = {}
        self.__dict__[_OPENED] = opened
        try:
            with _kept_packed(self, opened):
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            opened.clear()  # autograd keeps the functions that `_kept_packed` gave it, and they know this dictionary
            del self.__dict__[_OPENED]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for name, parameter in self._parameters.items():  # type: ignore[attr-defined]
            state = getattr(parameter, "quant_state", None)
            for part, value in ({} if state is None else state.as_dict(packed=True)).items():
                destination[f"{prefix}{name}.{part}"] = value if keep_vars else value.detach()


def _packed_class(own: type[torch.nn.Module], names: tuple[str, ...]) -> type[torch.nn.Module]:
    """Returns one class for the layers of a model: a compiled layer is compiled anew for each class that it meets."""
    if (own, names) not in _CLASSES:
        properties = {name: property(_reader(name)) for name in names}
        _CLASSES[own, names] = type(own.__name__, (PackedStacks, own), {"__module__": own.__module__, **properties})
    return _CLASSES[own, names]


_CLASSES: dict[tuple[type, tuple[str, ...]], type] = {}


def _reader(name: str) -> Any:
    def read(module: Any) -> Any:
        parameter, opened = module._parameters[name], module.__dict__.get(_OPENED)
        make = module.__dict__.get(_CHANGES, {}).get(name) if opened is not None else None
        if make is None and getattr(parameter, "quant_state", None) is None:
            return parameter  # in 16 bits, or its values have not arrived yet
        if opened is None:
            return stand_in(module, name) if _BY_SHAPE else unpacked(parameter, module.stack_dtype)
        if name not in opened:
            products = make() if make is not None else ()
            whole = _with_products(parameter, module.stack_dtype, products)
            opened[name] = _Opened(whole, tuple(each.detached() for each in products))
        return opened[name].values

    return read


def stand_in(module: PackedStacks, name: str) -> torch.Tensor:
    """Returns a tensor with the shape, type and device of a stack's values, without the memory of any."""
    parameter: Any = module._parameters[name]  # type: ignore[attr-defined]
    state = getattr(parameter, "quant_state", None)
    shape, dtype = (parameter.shape, parameter.dtype) if state is None else (state.shape, module.stack_dtype)
    return torch.empty((), dtype=dtype, device=parameter.device).expand(shape)


_BY_SHAPE: list[bool] = []


@contextlib.contextmanager
def shown_by_shape() -> Iterator[None]:
    """While open, packed stacks that are read outside of a forward pass have no values (`stand_in`)."""
    _BY_SHAPE.append(True)
    try:
        yield
    finally:
        _BY_SHAPE.pop()


@contextlib.contextmanager
def changed(module: PackedStacks, name: str, make: Callable[[], tuple[Product, ...]]) -> Iterator[None]:
    """While open, a forward pass of the module reads a stack with products added to it.

    Args:
        module: holds the stack.
        name: of the stack.
        make: returns the products; called where a forward pass first reads the stack.
    """
    changes = module.__dict__.setdefault(_CHANGES, {})
    before = changes.get(name)
    changes[name] = make
    try:
        yield
    finally:
        changes.pop(name)
        if before is not None:
            changes[name] = before


@dataclass(frozen=True)
class _Opened:
    """A stack in full, with the products that were added to it."""

    values: torch.Tensor
    products: tuple[Product, ...]


def _with_products(
    parameter: Any, dtype: torch.dtype, products: tuple[Product, ...], first: int = 0, last: int | None = None
) -> torch.Tensor:
    """Returns experts `first` to `last` of a stack, packed or not, with products added; autograd follows these."""
    is_packed = getattr(parameter, "quant_state", None) is not None
    values = unpacked(parameter, dtype, first, last) if is_packed else parameter[first:last]
    own = is_packed  # whether the memory is nobody else's, so that a product may be added in place
    with torch.autocast(values.device.type, enabled=False):  # which would round the stack to its own type
        for each in products:
            left, right = each.left[first:last], each.right[first:last]
            if own:
                values.baddbmm_(left, right, alpha=each.scale)
            else:
                values, own = torch.baddbmm(values, left, right, alpha=each.scale), True
    return values


@dataclass(frozen=True)
class _Note:
    """Stands for a tensor that autograd keeps and that is a part of a stack: how to make it again from what is held."""

    parameter: Any
    products: tuple[Product, ...]
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def values(self) -> torch.Tensor:
        each = self.shape[1] * self.shape[2]
        ends = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        first, last = self.offset // each, (self.offset + ends) // each + 1
        with torch.no_grad():
            held = _with_products(self.parameter, self.dtype, self.products, first, last)
            return held.as_strided(self.size, self.stride, self.offset - first * each + held.storage_offset())

    @property
    def shape(self) -> torch.Size:
        state = getattr(self.parameter, "quant_state", None)
        return self.parameter.shape if state is None else state.shape


@contextlib.contextmanager
def _kept_packed(module: Any, opened: dict[str, _Opened]) -> Iterator[None]:
    """While open, autograd keeps notes in place of stacks and of parts of them.

    Args:
        module: holds the packed parameters.
        opened: the stacks in full by name, with what was added; none of their memory may be used otherwise while this is open.
    """
    if not torch.is_grad_enabled() or _others_keep():
        yield
        return

    def keep(tensor: torch.Tensor) -> Any:
        place = tensor.untyped_storage().data_ptr()
        for name, one in opened.items():
            if place == one.values.untyped_storage().data_ptr():
                stride, offset = tensor.stride(), tensor.storage_offset() - one.values.storage_offset()
                held = module._parameters[name], one.products
                return _Note(*held, tensor.dtype, tuple(tensor.shape), stride, offset)
        return tensor.detach()

    def give_back(kept: Any) -> torch.Tensor:
        return kept.values() if isinstance(kept, _Note) else kept

    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        yield


def _others_keep() -> bool:
    """Whether somebody else decides what autograd keeps, as activation checkpointing does, which computes the stacks again."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None
