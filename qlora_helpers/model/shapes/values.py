"""Checked values of a `config.json` that may come from anywhere: each has the right type, or one clear error says so.

Knows what a size may be, nothing of families and their wiring. No message holds control characters or more than a line of the file.
"""

from __future__ import annotations

import reprlib
from typing import Any

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.text import plain

Shape = dict[str, Any]

# Several times what any published model has: planning much larger ones would take for ever
_MAX_SIZE = {
    "num_hidden_layers": 2_000,
    "num_local_experts": 100_000,
    "num_experts": 100_000,
    "num_experts_per_tok": 100_000,
    "max_position_embeddings": 10**9,
}
_MAX_OTHER_SIZE = 10**7


def family_of(config: Shape) -> str:
    """Returns the `model_type`, safe for a message.

    Raises:
        ModelError: it is not a string.
    """
    family = config.get("model_type")
    if family is not None and not isinstance(family, str):
        raise ModelError(
            "the model_type of a config.json is not a string",
            expected="a family's name such as llama",
            got=reprlib.repr(family),
            next_step="Give the model's own config.json.",
        )
    return plain(str(family))[:60]


def size(config: Shape, *names: str) -> int:
    """Returns the first of some keys that has a value, a whole number of at least 1; older files use older names.

    Raises:
        ModelError: none has one, or it is larger than any model's.
    """
    value: Any = next((config[name] for name in names if config.get(name) is not None), None)
    most = _MAX_SIZE.get(names[0], _MAX_OTHER_SIZE)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and 1 <= value <= most:
        return value
    large = whole and value > most
    raise ModelError(
        f"a config.json of the family {family_of(config)} "
        + ("has a size that no model has" if large else "lacks a size"),
        expected=f"{' or '.join(names)}, a whole number" + (f" of at most {most:,}" if large else ""),
        got="nothing" if value is None else reprlib.repr(value),
        next_step="Give the model's own config.json; other kinds of models than causal language models can't be planned.",
    )


def optional_size(config: Shape, name: str, default: int) -> int:
    """Returns a size, or a default where the file has none."""
    return default if config.get(name) is None else size(config, name)


def head_width(config: Shape, hidden: int, heads: int) -> int:
    """Returns the width of a head where the heads share the model's width.

    Raises:
        ModelError: there are more heads than the width has values.
    """
    if heads > hidden:
        raise ModelError(
            f"a config.json of the family {family_of(config)} has more attention heads than its width",
            expected=f"{hidden:,} at most",
            got=f"{heads:,}",
            next_step="Give the model's own config.json.",
        )
    return hidden // heads


def softcap(config: Shape, key: str = "final_logit_softcapping") -> float | None:
    """Returns the tanh cap on the logits, or by another key on the attention's scores; None without one.

    Raises:
        ModelError: it is not a number.
    """
    cap = config.get(key)
    if cap is not None and not isinstance(cap, int | float):
        raise ModelError(
            f"the {key} of a config.json is not a number",
            expected="a number, or null",
            got=reprlib.repr(cap),
            next_step="Give the model's own config.json.",
        )
    return cap


def flag(config: Shape, name: str, default: bool) -> bool:
    """Returns a boolean, or a default where the file has none."""
    return default if config.get(name) is None else bool(config[name])
