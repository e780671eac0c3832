"""How many weights a local checkpoint's files hold, from the headers of its safetensors files alone.

The headers are the truth about a checkpoint: what a plan counted otherwise is compared with them. Imports no torch.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

MOST_BYTES = 100 * 1024**2  # of a header, as the format itself allows
_PLAIN = {"F64", "F32", "F16", "BF16"}
_NOT_LOADED = ("mtp.", "model.mtp.")  # layers that guess several tokens ahead, which transformers leaves out


def checkpoint_parameters(folder: Path) -> int | None:
    """Counts the weights in a folder's safetensors files; None where there are none, or they can't be counted by their shapes.

    Packed weights (4-bit, FP8 with scales, GPTQ) have other shapes than the model, so they are not counted. A head that repeats its
    tied embedding is counted as the file has it.

    Args:
        folder: of a checkpoint.
    """
    files = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    try:
        tensors = {name: item for path in files for name, item in _header(path).items() if name != "__metadata__"}
        weights = {name: item for name, item in tensors.items() if not name.startswith(_NOT_LOADED)}
        if not weights or any(item["dtype"] not in _PLAIN for item in weights.values()):
            return None
        return sum(math.prod(item["shape"]) for item in weights.values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error):
        return None  # a damaged file is loading's to report


def _header(path: Path) -> dict[str, dict]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MOST_BYTES:
            raise ValueError("a header of that length is none")
        return dict(json.loads(file.read(length)))
