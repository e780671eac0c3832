"""A row as the turns of its conversation: who says what, which tools are called, and what of it is trained, or why not.

Everything that a row says is escaped. Knows nothing of tokens and of widgets.
"""

from __future__ import annotations

import html
import json
from collections.abc import Collection, Iterator, Mapping

from qlora_helpers.base.tables import AS_TEXT, Table
from qlora_helpers.base.text import plain
from qlora_helpers.data.examples import Example, Message

WHO = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool's result"}


def turns_html(example: Example, trained: Collection[int], masked: Mapping[int, str], *, left_out: str = "") -> str:
    """Returns a row as a list of its turns.

    Args:
        example: the row.
        trained: places in its messages of the turns that are trained.
        masked: place in its messages -> why that turn is not trained.
        left_out: why the whole row is not used.
    """
    items = [_item("document", "" if left_out else "trained", "", _body(example.text))] if example.is_document else []
    if example.tools:
        names = ", ".join(_tool_name(tool) for tool in example.tools)
        items.append(
            _item("tools", "", "", f"<details><summary>{_text(names)}</summary>{_json(list(example.tools))}</details>")
        )
    for place, message in enumerate(example.messages):
        mark = "trained" if place in trained else "not trained" if message.role == "assistant" else ""
        items.append(
            _item(message.role, mark, masked.get(place, "") if mark == "not trained" else "", _content(message))
        )
    more = f'<div class="qlora-error" role="status">left out: {_text(left_out)}</div>' if left_out else ""
    return f'{more}<ol class="qlora-turns {_NO_MATH}" aria-label="turns of the row">{"".join(items)}</ol>'


_NO_MATH = AS_TEXT.removeprefix('class="').removesuffix('"')


def _item(role: str, mark: str, why: str, content: str) -> str:
    badge = f'<span class="qlora-mark {mark.replace(" ", "-")}">{mark}</span>' if mark else ""
    reason = f'<span class="muted">{_text(why)}</span>' if why else ""
    name = _text(WHO.get(role, role))
    return (
        f'<li class="turn {mark.replace(" ", "-")}"><div class="who"><b>{name}</b>{badge}{reason}</div>'
        f'<div class="what">{content}</div></li>'
    )


def _content(message: Message) -> str:
    thinking = f"<details><summary>thoughts</summary>{_body(message.thinking)}</details>" if message.thinking else ""
    calls = "".join(
        f'<div class="call">calls <code>{_text(call.get("name", ""))}</code>{_json(call.get("arguments", {}))}</div>'
        for call in message.tool_calls
    )
    of = " ".join(filter(None, (message.name, message.tool_call_id)))
    return (f'<div class="muted">of {_text(of)}</div>' if of else "") + thinking + _body(message.content) + calls


def _body(text: str) -> str:
    return f'<div dir="auto">{_text(text)}</div>' if text else ""


def _json(value: object) -> str:
    return f"<pre>{_text(json.dumps(value, ensure_ascii=False, indent=1, default=str))}</pre>"


def _text(text: object) -> str:
    return html.escape(plain(str(text)))


def _tool_name(tool: Mapping[str, object]) -> str:
    function = tool.get("function")
    named = function if isinstance(function, Mapping) else tool
    return str(named.get("name", "a tool without a name"))


def turns_table(example: Example, trained: Collection[int], masked: Mapping[int, str]) -> Table:
    """Returns the same as a table, for places without widgets."""
    return Table(["role", "text", "trained"], list(_lines(example, trained, masked)))


def _lines(example: Example, trained: Collection[int], masked: Mapping[int, str]) -> Iterator[list[str]]:
    if example.is_document:
        yield ["document", plain(example.text), "yes"]
    for place, message in enumerate(example.messages):
        calls = [
            f"calls {call.get('name', '')} {json.dumps(call.get('arguments', {}), ensure_ascii=False)}"
            for call in message.tool_calls
        ]
        label = (
            "yes"
            if place in trained
            else f"no: {masked.get(place, 'it is left out')}"
            if message.role == "assistant"
            else ""
        )
        yield [WHO.get(message.role, message.role), plain("\n".join(filter(None, [message.content, *calls]))), label]
