"""Runs a model's chat template: the one place where the program that comes with a model is executed.

Owns how a row's messages are handed over, the date that a template may ask for, and what is known of a template from its text.
Knows nothing of tokens and labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2.runtime import LoopContext

from qlora_helpers.data.examples import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = datetime(2026, 1, 1)
"""What a template gets that asks for today's date: rows and prompts that are written on other days stay the same."""
_PLAIN = frozenset({dict, list, tuple, str, int, bool, LoopContext})
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """Renders messages with a chat template, in transformers' sandbox.

    Args:
        template: its text.
        messages: as chat templates take them (`chat_message`).
        tools: JSON schemas of functions.
        generation_prompt: whether the text ends where the assistant begins to write.
        variables: further values that the template may read, such as `bos_token`.

    Returns:
        The text, and the characters that the template marks with `{% generation %}`.

    Raises:
        Exception: whatever the template raises: it is a program that came with the model.
    """
    compiled = _compiled(template)
    values = {
        "messages": [dict(message) for message in messages],
        "tools": [dict(tool) for tool in tools] or None,
        "documents": None,
        "add_generation_prompt": generation_prompt,
        "strftime_now": TEMPLATE_DATE.strftime,
        **(variables or {}),
    }
    if not has_marks(template):
        return compiled.render(**values), []
    pieces: list[str] = []
    marks: list[tuple[int, int]] = []
    with compiled.environment.activate_tracker(pieces, marks):
        for piece in compiled.generate(**values):  # one by one: the tracker reads the list meanwhile
            pieces.append(piece)
    return "".join(pieces), marks


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    from transformers.utils import chat_template_utils

    compiled = chat_template_utils._compile_jinja_template(template)
    environment = compiled.environment
    environment.is_safe_attribute = _remembered(environment.is_safe_attribute)
    return compiled


def _remembered(is_safe: Callable[[Any, str, Any], bool]) -> Callable[[Any, str, Any], bool]:
    """Returns the sandbox's own check, asked once for each name and type of Python's or Jinja's own: it looks at nothing else.

    A template asks some 30 times a row, which took a tenth of the time of labelling.
    """
    known: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(obj: Any, attr: str, value: Any) -> bool:
        kind = type(obj)
        if kind not in _PLAIN:
            return is_safe(obj, attr, value)
        if (found := known.get((kind, attr))) is None:
            found = known[kind, attr] = is_safe(obj, attr, value)
        return found

    return is_safe_attribute


@lru_cache(maxsize=16)
def has_marks(template: str) -> bool:
    """Whether a template marks the assistant's turns with `{% generation %}`."""
    return bool(_MARKS.search(template))


def asks_for_date(template: str) -> bool:
    """Whether a template writes the day's date into its texts."""
    return "strftime_now" in template


def chat_template_of(tokenizer: PreTrainedTokenizerBase, *, tools: bool) -> str:
    """Returns the tokenizer's template for rows with or without tools; empty where it has none."""
    if not tokenizer.chat_template:
        return ""
    return tokenizer.get_chat_template(tools=[{}] if tools else None)


def chat_message(message: Message) -> dict[str, Any]:
    """Returns a message as chat templates take it: thinking under both of its usual names, calls as OpenAI writes them."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        found |= {"reasoning_content": message.thinking, "thinking": message.thinking}
    if message.tool_calls:
        found["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    if message.name:
        found["name"] = message.name
    return found


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": call.get("name", ""), "arguments": call.get("arguments", {})}
    return {"type": "function", "function": function} | ({"id": call["id"]} if call.get("id") else {})
