"""What can be picked in the answer panel: texts, rows of the data, or rows of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.data.examples import Example


@dataclass(frozen=True)
class Sample:
    """A question to pick, the answer that a person wrote if there is one, and the row that it is the last question of."""

    name: str
    dialogue: str
    summary: str = ""
    row: Example | None = None


def as_sample(item: Any, number: int) -> Sample:
    """Returns an item that a person hands over as what can be picked.

    Args:
        item: a text, a row of the data, or an object with `dialogue` and optionally `summary` and `id`.
        number: its place, from 1.

    Raises:
        UserError: it has no dialogue.
    """
    if isinstance(item, str):
        return Sample(f"{number}: {item.strip().splitlines()[0][:60] if item.strip() else ''}", item)
    values = item if isinstance(item, Mapping) else vars(item) if hasattr(item, "__dict__") else {}
    row = None
    if isinstance(item, Example):
        row = None if item.is_document else item
        values = {"id": item.id, "dialogue": item.prompt, "summary": item.answer}
    dialogue = values.get("dialogue")
    if not isinstance(dialogue, str):
        raise UserError(
            "this is not a dialogue",
            expected="a text, a row of the data, or an object with `dialogue` and optionally `summary`",
            got=repr(item)[:80],
        )
    first = dialogue.splitlines()[0][:60] if dialogue else ""
    return Sample(f"{values.get('id', number)}: {first}", dialogue, values.get("summary", ""), row)
