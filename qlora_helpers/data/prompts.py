"""What a model is asked with: prompts as text and as tokens, by the template that its rows were written with.

Training and generation go through the same template and tokenise texts whole, so the model is asked exactly as it was trained.
Knows nothing of labels, packing or models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_helpers.base.config import DataConfig
from qlora_helpers.data.examples import SUMMARIZE, Example, Message, one_turn
from qlora_helpers.data.long_rows import shortened, side_of
from qlora_helpers.data.plain_templates import Template
from qlora_helpers.data.rendering import RowProblem

_MOST_CUTS = 12


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens.

    Attributes:
        ids: token ids.
        trimmed_tokens: how many were cut from the row's own text.
        cut_at: where: its `start`, `middle` or `end`; empty where nothing was cut.
        shown: the first cut, for people: what comes before it and after it.
    """

    ids: list[int]
    trimmed_tokens: int = 0
    cut_at: str = ""
    shown: str = ""

    def __len__(self) -> int:
        return len(self.ids)


def prompt_text(example: Example, template: Template) -> str:
    """Returns a row's prompt as text, up to where the assistant begins to write.

    Raises:
        rendering.RowProblem: the template can't write the row.
    """
    return template.prompt(example).text


def prompt_tokens(
    example: Example, template: Template, *, max_tokens: int | None = None, long_rows: str = "auto"
) -> Prompt:
    """Returns a row's prompt as tokens; of a document its first half.

    Args:
        example: the row; its last turn is what the model is asked for.
        template: writes it.
        max_tokens: a longer prompt is cut, as rows are in training.
        long_rows: where it is cut, as in the settings.

    Raises:
        rendering.RowProblem: the template can't write the row, or it is too long without any text of its own.
    """
    if example.is_document:
        (encoded,) = template.encoder.encode([template.render(example)])
        half = encoded.ids[: max(1, min(len(encoded.ids) // 2, max_tokens or len(encoded.ids)))]
        return Prompt(half.tolist())
    ids = _ids(example, template)
    length, side, shown = len(ids), side_of(long_rows, example), ""
    for _ in range(_MOST_CUTS):
        if max_tokens is None or len(ids) <= max_tokens:
            break
        found = shortened(example, len(ids), max_tokens, side_of(long_rows, example), template.encoder)
        if found is None:
            break
        example, shown = found.example, shown or found.shown
        ids = _ids(example, template)
    if max_tokens is not None and len(ids) > max_tokens:
        raise RowProblem(f"its prompt does not fit into {max_tokens} tokens")
    cut = length - len(ids)
    return Prompt(ids, cut, side if cut else "", shown)


def _ids(example: Example, template: Template) -> list[int]:
    (encoded,) = template.encoder.encode([template.prompt(example)])
    return encoded.ids.tolist()


def question(text: str, config: DataConfig, like: Sequence[Example] = ()) -> Example:
    """Returns a row that asks about a text as the rows of a run do, with the same instruction and system's message.

    Args:
        text: what a person brings.
        config: the run's data settings.
        like: rows of the run; the first conversation is the pattern.
    """
    for row in like:
        asked = [message for message in row.messages if message.role == "user"]
        if not asked:
            continue
        first = asked[0]
        instruction = first.content[: first.body[0]] if first.body else ""
        behind = first.content[first.body[1] :] if first.body else ""
        user = Message("user", instruction + text + behind, body=(len(instruction), len(instruction) + len(text)))
        system = tuple(message for message in row.messages[:1] if message.role == "system")
        thinks = any(message.thinking for message in row.messages)
        answer = Message("assistant", "", thinking="..." if thinks else "")
        return dataclasses.replace(row, id="asked", where="asked", messages=(*system, user, answer), references=())
    instruction = SUMMARIZE if config.instruction is None else config.instruction
    return one_turn("asked", "asked", text, "", instruction=instruction, system=config.system or "")
