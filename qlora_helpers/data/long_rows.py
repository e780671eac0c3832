"""Shortens rows that are longer than a sequence: the prompt's own text is cut, never an instruction and never an answer.

`trim_start` drops the oldest exchanges of a conversation and then the beginning of the text that is left; `trim_middle` and
`trim_end` cut the longest text of a user or a tool. Knows nothing of templates, packing or files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_helpers.data.encoding import Encoder
from qlora_helpers.data.examples import Example, Message

MIDDLE = "\n[...]\n"
"""What is written where the middle of a text is cut."""
_SHOWN = 48  # characters on either side of a cut
SIDES = {"trim_start": "start", "trim_middle": "middle", "trim_end": "end", "trim": "end"}


def side_of(long_rows: str, example: Example) -> str:
    """Returns where a row is cut: `start`, `middle`, `end`; `auto` keeps a chat's newest turns and both ends of a single text."""
    if long_rows in SIDES:
        return SIDES[long_rows]
    asked = sum(message.role == "user" for message in example.messages)
    return "start" if asked > 1 else "middle"


@dataclass(frozen=True)
class Shortened:
    """A row after a cut.

    Attributes:
        example: the row that is left.
        shown: the place of the cut, for people: what comes before it and after it.
    """

    example: Example
    shown: str


def shortened(example: Example, length: int, most: int, side: str, encoder: Encoder) -> Shortened | None:
    """Cuts from a conversation about as many tokens as are too many, at least one.

    Args:
        example: a conversation.
        length: its tokens.
        most: how many it may have.
        side: `start`, `middle` or `end`.
        encoder: counts tokens.

    Returns:
        The shorter row, or None where nothing is left to cut.
    """
    tokens = length - most
    if side == "start":
        found = _without_oldest(example, tokens, length, encoder)
        if found is not None:
            return found
    bodies = {
        number: _body(message)
        for number, message in enumerate(example.messages[:-1])
        if message.role in ("user", "tool") and message.content[slice(*_body(message))]
    }
    if not bodies:
        return None
    number = max(bodies, key=lambda each: (bodies[each][1] - bodies[each][0], each))
    message, (start, end) = example.messages[number], bodies[number]
    body = message.content[start:end]
    left, right = _cut(body, tokens, side, encoder)
    joint = MIDDLE if side == "middle" and left and right else ""
    new = left + joint + right
    if len(new) >= len(body):  # the mark is longer than what it replaces
        new, right = left, ""
    content = message.content[:start] + new + message.content[end:]
    changed = replace(message, content=content, body=(start, start + len(new)))
    messages = (*example.messages[:number], changed, *example.messages[number + 1 :])
    shown = f"{_end_of(message.content[:start] + left)} [cut] {(right + message.content[end:])[:_SHOWN]}"
    return Shortened(replace(example, messages=messages), shown.replace("\n", " ").strip())


def _body(message: Message) -> tuple[int, int]:
    return message.body or (0, len(message.content))


def _end_of(text: str) -> str:
    return text[-_SHOWN:]


def _cut(body: str, tokens: int, side: str, encoder: Encoder) -> tuple[str, str]:
    """Returns what stays of a text left and right of the cut."""
    offsets = encoder.plain([body])[0].encoding.offsets
    if side == "middle":
        tokens += len(encoder.plain([MIDDLE])[0].ids)
    kept = max(0, len(offsets) - max(1, tokens))
    if not kept:
        return "", ""
    before = {"start": 0, "end": kept, "middle": (kept + 1) // 2}[side]
    after = kept - before
    left = body[: offsets[before][0]] if before else ""
    right = body[offsets[len(offsets) - after][0] :] if after else ""
    return left, right


def _without_oldest(example: Example, tokens: int, length: int, encoder: Encoder) -> Shortened | None:
    """Drops the oldest exchanges, as many as it takes; a system's text and the last exchange stay."""
    messages = example.messages
    head = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    starts = [i for i, message in enumerate(messages) if i >= head and message.role == "user"]
    if len(starts) < 2:
        return None
    counts = [len(each.ids) for each in encoder.plain([message.thinking + message.content for message in messages])]
    frame = max(0, length - sum(counts)) / len(messages)  # what the template writes around each message
    cut, freed, begin = 0, 0.0, head
    while freed < tokens and cut < len(starts) - 1:
        cut += 1
        freed += sum(count + frame for count in counts[begin : starts[cut]])
        begin = starts[cut]
    rest = messages[begin:]
    shown = f"[cut] {rest[0].content[:_SHOWN]} ({cut} oldest exchange{'s' * (cut > 1)})"
    return Shortened(replace(example, messages=(*messages[:head], *rest)), shown.replace("\n", " "))
