"""Where this project keeps what it can make again: dequantised checkpoints, tiny models."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`$QLORA_CACHE`, else `$HF_HOME/qlora_helpers`, else `~/.cache/qlora_helpers`; need not exist yet."""
    if os.environ.get("QLORA_CACHE"):
        return Path(os.environ["QLORA_CACHE"]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "qlora_helpers"
    return Path.home() / ".cache" / "qlora_helpers"
