"""Merges a LoRA adapter into a bfloat16 copy of its base model, straight from the checkpoint's files.

W + scale * B A (Hu et al. 2021, section 4.1) is computed a few rows at a time, summed in float32 and rounded once. Neither the
model nor a whole layer is ever in memory, so Falcon-40B merges on a laptop. Merging into 4-bit weights would round the adapter
away. Knows nothing of runs, and loads no model.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.files import write_json
from qlora_helpers.base.folders import copy_regular
from qlora_helpers.base.units import BYTES_IN_GIB, gib
from qlora_helpers.export.certificate import WEIGHTS
from qlora_helpers.export.live_names import LiveStack, Places
from qlora_helpers.export.tensor_files import TensorToWrite, shards, write_tensors
from qlora_helpers.model.adapter_files import read_adapter_settings
from qlora_helpers.model.stored_tensors import BYTES, FLOATS, INDEX, StoredTensor, stored_tensors, tensors_in
from qlora_helpers.model.tokenizers import tokenizer_files
from qlora_helpers.planning.step_settings import HALF, SINGLE

if TYPE_CHECKING:
    import torch

SHARD_GIB, WORKING_GIB = 4.0, 0.25
PREFIX = "base_model.model."
KEPT_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote.

    Attributes:
        merged: layers whose weight changed.
        tensors, parameters: how many in all.
        files: shards.
        size_gib: of the weights.
        bound_gib: limit on the memory of the merge, for adapter and rows, beyond what Python and its libraries take.
    """

    merged: int
    tensors: int
    parameters: int
    files: int
    size_gib: float
    bound_gib: float

    def __repr__(self) -> str:
        return (
            f"{self.merged} layers merged; {self.parameters:,} parameters in {self.tensors} tensors, {self.size_gib:.2f} GiB in "
            f"{self.files} file{'s' * (self.files != 1)}; merged within {self.bound_gib:.2f} GiB of memory"
        )


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to rows of a stored tensor, in float32: `up` times `down`, to the rows from `first` on.

    For a layer that is stored as it is in memory, `down` is A, `(r, in)`, and `up` is B times the scale, `(out, r)`. For a stack of
    experts that is stored as one tensor, both have a matrix for each expert, and rows are experts.
    """

    down: torch.Tensor
    up: torch.Tensor
    first: int = 0

    def add(self, rows: torch.Tensor, first: int) -> None:
        """Adds to rows of the stored tensor, of which the first has the number `first`."""
        start, end = max(first, self.first), min(first + rows.shape[0], self.first + self.up.shape[0])
        if start >= end:
            return
        own, up = rows[start - first : end - first], self.up[start - self.first : end - self.first]
        if self.up.dim() == 3:
            own.baddbmm_(up, self.down[start - self.first : end - self.first])
        else:
            own.addmm_(up, self.down)


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    shard_gib: float = SHARD_GIB,
    working_gib: float = WORKING_GIB,
    progress: Callable[[int], Any] | None = None,
) -> MergeReport:
    """Writes the merged model in bfloat16: sharded safetensors, their index, the configuration and the adapter's tokenizer.

    Args:
        base: folder of the base model's checkpoint (safetensors).
        adapter: folder of the saved adapter.
        out: an empty folder.
        shard_gib: size of a file, GiB.
        working_gib: limit on the memory for the rows that are merged at once, GiB.
        progress: receives the number of bytes after each write.

    Raises:
        ModelError: the adapter belongs to another model, or is of a kind that can't be merged.
    """
    stored = stored_tensors(base)
    adapters = low_ranks(adapter, stored, Places(base, {name: tensor.shape for name, tensor in stored.items()}))
    types = _types(stored, set(adapters))
    sizes = {name: BYTES[types[name]] * tensor.values for name, tensor in stored.items()}
    files = shards(sizes, int(shard_gib * BYTES_IN_GIB))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = [_merged(stored[each], types[each], adapters.get(each, []), working_gib, progress) for each in names]
        write_tensors(out / name, tensors)
        weight_map |= dict.fromkeys(names, name)
    if len(files) > 1:
        write_json(out / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    _write_settings(base, adapter, out)
    changes = [change for each in adapters.values() for change in each]
    held = sum(part.numel() * part.element_size() for each in changes for part in (each.down, each.up))
    return MergeReport(
        sum(name.endswith(".lora_A.weight") for name in tensors_in([adapter / WEIGHTS])),
        len(stored),
        sum(t.values for t in stored.values()),
        len(files),
        gib(sum(sizes.values())),
        gib(merging_bytes(held, working_gib * BYTES_IN_GIB)),
    )


def low_ranks(adapter: Path, stored: dict[str, StoredTensor], places: Places) -> dict[str, list[LowRank]]:
    """Reads the adapter's matrices, by the names of the stored tensors that they change.

    Raises:
        ModelError: the adapter can't be merged, or belongs to another model.
    """
    settings = read_adapter_settings(adapter)
    _refuse_other_kinds(settings)
    scale = settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"])
    weights = tensors_in([adapter / WEIGHTS])
    found: dict[str, list[LowRank]] = {}
    layers = [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]
    for name in layers:
        layer = name.removeprefix(PREFIX)
        down, up = weights[f"{name}.lora_A.weight"], weights.get(f"{name}.lora_B.weight")
        stack = places.of_stack(layer, settings.get("target_parameters") or ())
        if stack is not None and up is not None:
            if down.shape[0] != stack.shape[0] * settings["r"]:
                raise _of_another_model(layer, stack.shape, f"adapters for {down.shape[0] // settings['r']} experts")
            for held_in, change in _of_stack(layer, stack, (down.read().float(), up.read().float() * scale), stored):
                found.setdefault(held_in, []).append(change)
            continue
        where = places.of(layer)
        if up is None or not where:
            raise _of_another_model(layer, None if up is None else (up.shape[0], down.shape[1]), "none")
        if bool(settings.get("fan_in_fan_out")) and not all(place.transposed for place in where):
            _refuse_other_kinds({**settings, "fan_in_fan_out": "True, but not of a layer that keeps (in, out)"})
        first, second = down.read().float(), up.read().float() * scale
        for place in where:
            end = None if place.rows is None else place.first_live + place.rows
            part = second[place.first_live : end]
            shape, tensor = (part.shape[0], first.shape[1]), stored[place.stored]
            held = tensor.shape[::-1] if place.transposed else (place.rows or tensor.rows, *tensor.shape[1:])
            if shape != tuple(held) or tensor.dtype not in FLOATS:
                raise _of_another_model(layer, shape, f"{tensor.dtype} {tensor.shape}")
            change = LowRank(part.T.contiguous(), first.T.contiguous()) if place.transposed else LowRank(first, part)
            found.setdefault(place.stored, []).append(replace(change, first=place.first))
    if 2 * len(layers) != len(weights):
        raise ModelError(
            "the adapter has more than matrices A and B",
            got=f"{len(weights)} tensors for {len(layers)} layers",
            next_step="Merge with peft's merge_and_unload.",
        )
    return found


def _of_stack(
    layer: str, stack: LiveStack, matrices: tuple[torch.Tensor, torch.Tensor], stored: dict[str, StoredTensor]
) -> Iterator[tuple[str, LowRank]]:
    """Yields what an adapter on a stack of experts adds, by the names of the stored tensors.

    Args:
        layer: the adapter's name for it.
        stack: shape and places.
        matrices: A, `(experts * r, in)`, and B times the scale, `(out, r * experts)`, in which neighbours are of different experts.
        stored: the checkpoint's tensors.

    Raises:
        ModelError: the adapter belongs to another model.
    """
    experts, (down, up) = stack.shape[0], matrices
    shape = (up.shape[0], down.shape[1]) if not stack.transposed else (down.shape[1], up.shape[0])
    if shape != stack.shape[1:] or down.shape[0] % experts or down.shape[0] != up.shape[1]:
        raise _of_another_model(layer, (experts, *shape), str(stack.shape))
    right = down.view(experts, -1, down.shape[1])
    left = up.view(up.shape[0], -1, experts).permute(2, 0, 1)
    if stack.transposed:
        left, right = right.transpose(1, 2), left.transpose(1, 2)
    held = 0
    for place in stack.places:
        tensor = stored[place.stored]
        if place.expert is None:
            change, expected = LowRank(right, left), tuple(stack.shape)
        else:
            end = None if place.rows is None else place.first_live + place.rows
            change = LowRank(right[place.expert], left[place.expert, place.first_live : end])
            expected = (change.up.shape[0], change.down.shape[1])
        if tensor.shape != expected or tensor.dtype not in FLOATS:
            raise _of_another_model(layer, expected, f"{tensor.dtype} {tensor.shape}")
        held += tensor.values
        yield place.stored, change
    if held != math.prod(stack.shape):
        raise _of_another_model(layer, stack.shape, f"{held:,} values in {len(stack.places)} tensors")


def _refuse_other_kinds(settings: dict[str, Any]) -> None:
    refused = [
        name
        for name in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias")
        if settings.get(name)
    ]
    refused += ["fan_in_fan_out"] if isinstance(settings.get("fan_in_fan_out"), str) else []
    refused += ["bias"] if settings.get("bias", "none") != "none" else []
    refused += ["peft_type"] if settings.get("peft_type") != "LORA" else []
    if refused:
        raise ModelError(
            "this kind of adapter can't be merged here",
            expected="plain LoRA",
            got=", ".join(f"{name}={settings[name]!r}" for name in refused),
            next_step="Serve base model and adapter side by side, or merge with peft's merge_and_unload.",
        )


def _of_another_model(layer: str, shape: tuple[int, ...] | None, got: str) -> ModelError:
    return ModelError(
        "the adapter does not belong to this checkpoint",
        expected=f"an unquantised weight of {layer}, {shape}",
        got=got,
        next_step="Merge into the base model that the adapter was trained on, not a quantised copy.",
    )


def _types(stored: dict[str, StoredTensor], merged: set[str]) -> dict[str, str]:
    """Returns the type that each tensor is written in: bfloat16, or its own.

    Where most of a checkpoint is in 16 bits, what it keeps in float32 was meant to be, such as a router's correction.
    """
    single = sum(tensor.values for tensor in stored.values() if tensor.dtype == "F32")
    kept = {"F32"} if 2 * single < sum(tensor.values for tensor in stored.values()) else set()
    return {
        name: tensor.dtype if tensor.dtype not in FLOATS or (tensor.dtype in kept and name not in merged) else "BF16"
        for name, tensor in stored.items()
    }


def _merged(
    tensor: StoredTensor,
    dtype: str,
    changes: list[LowRank],
    working_gib: float,
    progress: Callable[[int], Any] | None,
) -> TensorToWrite:
    step = merging_rows(tensor.row_values, working_gib * BYTES_IN_GIB)

    def parts() -> Iterator[torch.Tensor]:
        for first in range(0, tensor.rows, step):
            rows = tensor.read(first, first + step)
            if changes:
                rows = rows.float()
            for change in changes:
                change.add(rows, first)
            yield rows
            if progress is not None:
                progress(rows.numel() * BYTES[dtype])

    return TensorToWrite(tensor.name, dtype, tensor.shape, parts())


def _write_settings(base: Path, adapter: Path, out: Path) -> None:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config.pop("_name_or_path", None)  # a path on the machine that saved the base model
    write_json(out / "config.json", config | {"dtype": "bfloat16"})
    for name in KEPT_FILES:
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(base / name, out / name)
    for path in tokenizer_files(adapter):
        copy_regular(path, out / path.name)


MERGING_BYTES = int(0.1 * BYTES_IN_GIB)  # beyond the adapter and the rows; 0.04 GiB were measured
_MERGED_VALUE = 2 * SINGLE + SINGLE + HALF  # bytes of a value while it is merged: as read, in float32, and as written


def merging_rows(row_values: int, working_bytes: float) -> int:
    """Returns how many rows of a weight are merged at once within a limit on memory; at least one."""
    return max(1, int(working_bytes // (_MERGED_VALUE * max(1, row_values))))


def merging_bytes(adapter_bytes: int, working_bytes: float) -> int:
    """Returns the memory that a merge takes: the adapter in float32, the rows that are merged at once, and some for the allocator.

    The model's size matters only through the adapter: 55.5 million parameters of Falcon-40B at r=8 are 0.21 GiB.
    """
    return round(adapter_bytes + working_bytes + MERGING_BYTES)
