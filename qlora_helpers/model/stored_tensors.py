"""Says which files hold a model's weights, and reads them a few rows at a time, without mapping them into memory.

The safetensors format: eight bytes with the header's length, a header in JSON with each tensor's type, shape and offsets, then
the values (https://github.com/huggingface/safetensors#format). Every page of a mapped file that was read counts as the process's
memory, so a bound on memory needs plain reads. Knows nothing of what a model computes, and opens no pickle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import ModelError

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_HEADER_BYTES = 100_000_000  # the format's own limit
MOST_INDEX_BYTES = 64 * 1024**2  # that of a mixture of 160,000 experts takes 16 MiB
FLOATS = ("F64", "F32", "F16", "BF16")
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
BYTES |= {"U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: `dtype` is the format's name for its type, `start` the offset of its values in the file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_values(self) -> int:
        """How many values a row has; 1 for a scalar or a vector."""
        return math.prod(self.shape[1:])

    @property
    def values(self) -> int:
        """How many values the tensor has."""
        return math.prod(self.shape)

    def read(self, first: int = 0, end: int | None = None) -> torch.Tensor:
        """Reads rows `first` to `end`, `(end - first, ...)`; a scalar is read as it is."""
        import torch

        end = self.rows if end is None else min(end, self.rows)
        size = self.row_values * BYTES[self.dtype]
        with open(self.path, "rb") as file:
            file.seek(self.start + first * size)
            data = bytearray(file.read((end - first) * size))
        if len(data) != (end - first) * size:
            raise damaged(self.path, "it ends too early")
        shape = (end - first, *self.shape[1:]) if self.shape else ()
        return torch.frombuffer(data, dtype=torch_type(self.dtype)).view(shape) if data else torch.empty(shape)


def torch_type(dtype: str) -> torch.dtype:
    """Returns PyTorch's type for the format's name of it."""
    import torch

    if dtype.startswith("F8_"):
        return getattr(torch, {"E4M3": "float8_e4m3fn", "E5M2": "float8_e5m2", "E8M0": "float8_e8m0fnu"}[dtype[3:]])
    names = {"F": "float", "I": "int", "U": "uint"}
    if dtype == "BF16":
        return torch.bfloat16
    return torch.bool if dtype == "BOOL" else getattr(torch, names[dtype[0]] + dtype[1:])


def weight_files(folder: Path) -> list[Path]:
    """Lists the files that a model is loaded from, in the order of their names: exactly those, whatever else the folder holds.

    As transformers does, it takes `model.safetensors`, else the files that `model.safetensors.index.json` names.

    Returns:
        The files; empty where the folder has neither.

    Raises:
        ModelError: the index is damaged, names something other than safetensors files in its own folder, or one is missing.
    """
    for name in (WEIGHTS, INDEX):
        if (folder / name).exists():
            names = [WEIGHTS] if name == WEIGHTS else _indexed(_regular(folder / INDEX))
            return [_regular(folder / each) for each in names]
    return []


def _indexed(index: Path) -> list[str]:
    try:
        if index.stat().st_size > MOST_INDEX_BYTES:
            raise damaged(index, "it is far too large")
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise damaged(index, f"it can't be read ({type(error).__name__}: {error})") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise damaged(index, "it names no files")
    if any(Path(name).name != name for name in names):
        raise damaged(index, "it names a file outside its folder")
    pickled = [name for name in names if not name.endswith(".safetensors")]
    if pickled:
        raise damaged(index, f"it names {pickled[0][:100]!r}, which is not a safetensors file")
    return names


def _regular(path: Path) -> Path:
    """The path itself, if a plain file is there; the hub's cache holds links to plain files, which count."""
    if not path.is_file():
        raise damaged(path, "it is not a plain file" if path.exists() else "it is not in the folder")
    return path


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Lists all tensors of a model's folder, sharded or not, in the order of its files and names.

    Raises:
        ModelError: a file is missing or damaged, or has a type that can't be read.
    """
    found = tensors_in(weight_files(folder))
    if not found:
        raise ModelError(f"{folder.name}/ holds no weights as safetensors", next_step="Get the model's files.")
    return found


def tensors_in(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Lists all tensors of these safetensors files, in their order.

    Raises:
        ModelError: a file is missing or damaged, has a type that can't be read, or two hold a tensor of one name.
    """
    found: dict[str, StoredTensor] = {}
    for path in files:
        for tensor in _header(_regular(path)):
            if tensor.name in found:
                raise damaged(path, f"{tensor.name} is in two files")
            found[tensor.name] = tensor
    return found


def _header(path: Path) -> Iterator[StoredTensor]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            first = file.read(8)
            if first == b"version ":
                raise damaged(path, "it is a pointer of Git LFS and not the file itself (git lfs pull gets it)")
            length = int.from_bytes(first, "little")
            if not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
                raise damaged(path, "the length of its header is impossible")
            entries = json.loads(file.read(length))
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            yield _stored(path, name, entry, size - 8 - length, 8 + length)
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"its header can't be read ({type(error).__name__}: {error})") from error


def _stored(path: Path, name: str, entry: Any, space: int, start: int) -> StoredTensor:
    shape, (first, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int for number in (*shape, first, end)) or any(side < 0 for side in shape):
        raise damaged(path, f"{name} has no shape")
    if BYTES[entry["dtype"]] * math.prod(shape) != end - first or not 0 <= first <= end <= space:
        raise damaged(path, f"{name} is not where it should be")
    return StoredTensor(name, path, entry["dtype"], shape, start + first)


def damaged(path: Path, why: str) -> ModelError:
    """Returns the error for a file with weights that can't be used."""
    return ModelError(f"{path.name} is damaged or incomplete: {why}", next_step="Get the model's files again.")
