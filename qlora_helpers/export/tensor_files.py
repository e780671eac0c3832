"""Writes safetensors files a few rows at a time, so that no more than a part of a tensor is in memory.

`model.stored_tensors` reads them the same way and describes the format. Knows nothing of models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.stored_tensors import BYTES, torch_type

if TYPE_CHECKING:
    import torch


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
