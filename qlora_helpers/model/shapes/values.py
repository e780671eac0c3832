"""Values of a `config.json` that a stranger wrote: each as what it must be, or one clear message.

Knows what a size may be, nothing of families and their wiring. No message holds control characters or more than a line of the file.
"""

from __future__ import annotations

import reprlib
from typing import Any

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.text import plain

Shape = dict[str, Any]

# Several times what any published model has; a plan for more would take for ever, and say nothing
_MOST = {
    "num_hidden_layers": 2_000,
    "num_local_experts": 100_000,
    "num_experts": 100_000,
    "num_experts_per_tok": 100_000,
    "max_position_embeddings": 10**9,
}
_MOST_OF_OTHERS = 10**7


def family_of(config: Shape) -> str:
    """The `model_type`, fit for a message.

    Raises:
        ModelError: it is no text.
    """
    family = config.get("model_type")
    if family is not None and not isinstance(family, str):
        raise ModelError(
            "the model_type of a config.json is no text",
            expected="a family's name such as llama",
            got=reprlib.repr(family),
            next_step="Give the model's own config.json.",
        )
    return plain(str(family))[:60]


def size(config: Shape, *names: str) -> int:
    """The first of some keys that holds a value, a whole number from 1 on; older files use older names.

    Raises:
        ModelError: there is none, or it is larger than any model's.
    """
    value = next((config[name] for name in names if config.get(name) is not None), None)
    most = _MOST.get(names[0], _MOST_OF_OTHERS)
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


def optional_size(config: Shape, name: str, otherwise: int) -> int:
    """The same, with a value for a file that leaves it out."""
    return otherwise if config.get(name) is None else size(config, name)


def head_width(config: Shape, hidden: int, heads: int) -> int:
    """The width of a head where the heads share out the model's.

    Raises:
        ModelError: nothing is left for one.
    """
    if heads > hidden:
        raise ModelError(
            f"a config.json of the family {family_of(config)} has more attention heads than its width",
            expected=f"{hidden:,} at most",
            got=f"{heads:,}",
            next_step="Give the model's own config.json.",
        )
    return hidden // heads


def softcap(config: Shape) -> float | None:
    """The tanh cap on the logits, or None.

    Raises:
        ModelError: it is no number.
    """
    cap = config.get("final_logit_softcapping")
    if cap is not None and not isinstance(cap, int | float):
        raise ModelError(
            "the final_logit_softcapping of a config.json is no number",
            expected="a number, or null",
            got=reprlib.repr(cap),
            next_step="Give the model's own config.json.",
        )
    return cap


def flag(config: Shape, name: str, otherwise: bool) -> bool:
    """A yes or no, with a value for a file that leaves it out."""
    return otherwise if config.get(name) is None else bool(config[name])
