"""Reads a model's `config.json` as a stranger's file: bounded, an object, and with sizes that some model could have.

Numbers of layers and experts are loops: in a plan, in transformers' configuration and where a model is built. What else a
configuration asks for is held against its weights (`model.loading_folder`), where there are any. Imports no torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import ModelError

MOST_BYTES = 8 * 1024**2
MOST = {"layers": 1000, "experts": 4096}  # the largest published: 126 layers (Llama 3.1 405B), 2,048 experts (Switch)
_LOOPS = {"layers": re.compile(r"(.*_)?(layers?|blocks?|depth)"), "experts": re.compile(r".*experts?(_.*)?")}


def read_config_file(path: Path, name: str) -> dict[str, Any]:
    """Reads a `config.json`.

    Args:
        path: the file.
        name: the model's, for messages.

    Raises:
        ModelError: it can't be read, is no object, or names more layers or experts than any model has.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_BYTES + 1)
        found = json.loads(text) if len(text) <= MOST_BYTES else None
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(
            f"the config.json of {name} can't be read ({type(error).__name__})", next_step="Download it again."
        ) from error
    if not isinstance(found, dict):
        raise ModelError(
            f"the config.json of {name} is not a JSON object"
            if len(text) <= MOST_BYTES
            else f"the config.json of {name} is over the limit of {MOST_BYTES // 1024**2} MiB",
            next_step="Download it again.",
        )
    _refuse_endless(found, name)
    return found


def _refuse_endless(values: dict[str, Any], name: str) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _refuse_endless(value, name)
        for what, pattern in _LOOPS.items():
            if pattern.fullmatch(key) and type(value) in (int, float) and not value <= MOST[what]:
                raise ModelError(
                    f"the config.json of {name} asks for more {what} than any model has",
                    expected=f"{key} of at most {MOST[what]:,}",
                    got=str(value)[:40],
                    next_step="Get the config.json that belongs to the model.",
                )
