"""Reads and writes safetensors files a few rows at a time, without mapping them into memory.

The format: eight bytes with the header's length, a header in JSON with each tensor's type, shape and offsets, then the values
(https://github.com/huggingface/safetensors#format). Every page of a mapped file that was read counts as the process's memory, so a
bound on memory needs plain reads. Knows nothing of models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qlora_helpers.base.errors import ModelError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
MOST_HEADER_BYTES = 100_000_000  # the format's own limit
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


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
        return math.prod(self.shape[1:])

    @property
    def values(self) -> int:
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
            raise _damaged(self.path, "it ends too early")
        shape = (end - first, *self.shape[1:]) if self.shape else ()
        return torch.frombuffer(data, dtype=torch_type(self.dtype)).view(shape) if data else torch.empty(shape)


def torch_type(dtype: str) -> torch.dtype:
    """Returns PyTorch's type for the format's name of it."""
    import torch

    names = {"F": "float", "I": "int", "U": "uint"}
    if dtype == "BF16":
        return torch.bfloat16
    return torch.bool if dtype == "BOOL" else getattr(torch, names[dtype[0]] + dtype[1:])


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Lists all tensors of a checkpoint folder, sharded or not, in the order of its files and names.

    Raises:
        ModelError: a file is missing or damaged, or has a type that can't be read.
    """
    index = folder / INDEX
    try:
        names = (
            sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())) if index.exists() else []
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(index, str(error)) from error
    if any(Path(name).name != name for name in names):
        raise _damaged(index, "it names a file outside its folder")
    paths = [folder / name for name in names] or sorted(folder.glob("*.safetensors"))
    found: dict[str, StoredTensor] = {}
    for path in paths:
        for tensor in _header(path):
            if tensor.name in found:
                raise _damaged(path, f"{tensor.name} is in two files")
            found[tensor.name] = tensor
    if not found:
        raise ModelError(f"{folder.name}/ holds no weights as safetensors", next_step="Get the model's files.")
    return found


def _header(path: Path) -> Iterator[StoredTensor]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
                raise _damaged(path, "the length of its header is impossible")
            entries = json.loads(file.read(length))
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            shape, (first, end) = tuple(entry["shape"]), entry["data_offsets"]
            wrong = (
                BYTES[entry["dtype"]] * math.prod(shape) != end - first or not 0 <= first <= end <= size - 8 - length
            )
            if wrong or any(side < 0 for side in shape):
                raise _damaged(path, f"{name} is not where it should be")
            yield StoredTensor(name, path, entry["dtype"], shape, 8 + length + first)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"its header can't be read ({type(error).__name__}: {error})") from error


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(f"{path.name} is damaged or incomplete: {why}", next_step="Get the model's files again.")


@dataclass(frozen=True)
class TensorToWrite:
    """One tensor of a new file, whose rows come from `parts` in order while the file is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Iterable[torch.Tensor]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return BYTES[self.dtype] * math.prod(self.shape)


def write_tensors(path: Path, tensors: Sequence[TensorToWrite]) -> None:
    """Writes one safetensors file, with one part of a tensor in memory at a time.

    Raises:
        ModelError: a tensor's parts have another size than the tensor.
        OSError: the disk is full.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.size],
        }
        place += tensor.size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors:
            written = sum(_write(file, part, torch_type(tensor.dtype)) for part in tensor.parts)
            if written != tensor.size:
                raise ModelError(f"{tensor.name} has another size than its header says", next_step="Report this.")


def _write(file: BinaryIO, part: torch.Tensor, dtype: torch.dtype) -> int:
    import torch

    return file.write(memoryview(part.to(dtype).contiguous().flatten().view(torch.uint8).numpy()))


def shards(sizes: Mapping[str, int], most_bytes: int) -> list[list[str]]:
    """Distributes names over files of at most `most_bytes`, in their order; a larger tensor has a file of its own."""
    files: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if files[-1] and held + size > most_bytes:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    return files
