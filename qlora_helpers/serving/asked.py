"""Reads a request of an OpenAI client: known fields with checked values, and nothing that would load a file or an address.

A field that this server does not carry out is refused by its name, unless its value asks for nothing. Knows no model, no run and
no web framework.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_helpers.data.examples import Message
from qlora_helpers.serving.asked_tools import read_calls, read_tools
from qlora_helpers.serving.refusal import Refusal

MOST_MESSAGES = 1000
MOST_STOPS, LONGEST_STOP = 4, 200
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_OF_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")


@dataclass(frozen=True)
class Asked:
    """A request whose fields are all known and right.

    Attributes:
        model: the name that is to answer, whether it is served or not.
        messages: the conversation so far, oldest first; empty where `prompt` is asked.
        prompt: the text to go on with, as it is; None for a conversation.
        as_written: whether the conversation is asked as it is, without the instruction and system's message of the run's rows.
        max_tokens: longest answer; None takes the run's.
        temperature: 0 takes the likeliest token each time; None does what the run's evaluation does.
        top_p: share of the likelihood that is drawn from; None takes the run's.
        seed: of the draw; None draws anew each time.
        stop: texts before which the answer ends.
        stream: whether the answer is sent in pieces.
        include_usage: whether a last piece counts the tokens.
        tools: descriptions of the functions that the model may call.
    """

    model: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    as_written: bool = False
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()


def read_request(body: bytes, *, chat: bool) -> Asked:
    """Reads the body of a request for an answer.

    Args:
        body: JSON.
        chat: whether it holds `messages`; else a `prompt`.

    Raises:
        Refusal: it is not valid JSON, or a field is unknown or wrong.
    """
    values = _object(body)
    names = {"model", "messages" if chat else "prompt"}
    for name in values:
        if name not in names | _SETTINGS.keys() | _NEUTRAL.keys() | _UNUSED:
            raise Refusal(f"This server does not know the field {name[:60]!r}.", param=name[:60], code="unknown_field")
    given = {name: value for name, value in values.items() if value is not None}
    for name, asks_nothing in _NEUTRAL.items():
        if name in given and not (chat and name in _OF_TOOLS) and not asks_nothing(given[name]):
            raise Refusal(f"This server does not carry out {name!r}.", param=name, code="unsupported_value")
    if not isinstance(given.get("model"), str):
        raise Refusal("'model' has to be the name of a model.", param="model")
    settings = {_NAMES.get(name, name): read(given[name], name) for name, read in _SETTINGS.items() if name in given}
    if "stream_options" in settings:
        settings["include_usage"] = settings.pop("stream_options")
    if chat:
        tools = read_tools(given)
        return Asked(given["model"], messages=_messages(given.get("messages")), tools=tools, **settings)
    return Asked(given["model"], prompt=_prompt(given.get("prompt")), **settings)


def _object(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Refusal("The body is not valid JSON.") from None
    if not isinstance(values, dict):
        raise Refusal("The body has to be a JSON object.")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _messages(values: Any) -> tuple[Message, ...]:
    if not isinstance(values, list) or not 1 <= len(values) <= MOST_MESSAGES:
        raise Refusal(f"'messages' has to be a list of 1 to {MOST_MESSAGES} messages.", param="messages")
    found = tuple(_message(value, f"messages[{number}]") for number, value in enumerate(values))
    if found[-1].role not in ("user", "tool") or all(message.role != "user" for message in found):
        raise Refusal("The last message has to be the user's, or a tool's result behind one.", param="messages")
    return found


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise Refusal(f"{place} has to be an object.", param=place)
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Refusal(f"The role of {place} has to be one of {', '.join(ROLES)}.", param=f"{place}.role")
    own = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}.get(role, ())
    for name, part in value.items():
        if name not in ("role", "content", *own) and part not in (None, [], {}, ""):
            raise Refusal(f"{place} has a field that this server does not take: {name[:60]!r}.", param=place)
    calls = read_calls(value.get("tool_calls"), f"{place}.tool_calls") if role == "assistant" else ()
    content = "" if calls and value.get("content") is None else _content(value.get("content"), f"{place}.content")
    call_id, name = (_text(value.get(each) or "", f"{place}.{each}") for each in ("tool_call_id", "name"))
    return Message(ROLES[role], content, tool_calls=calls, tool_call_id=call_id, name=name)


def _content(value: Any, place: str) -> str:
    if isinstance(value, str):
        return _text(value, place)
    if not isinstance(value, list):
        raise Refusal(f"{place} has to be a text.", param=place)
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            kind = part.get("type") if isinstance(part, dict) else None
            raise Refusal(
                f"{place} has a part that is not a text ({str(kind)[:40]!r}): this server opens no files and no addresses.",
                param=place,
                code="unsupported_value",
            )
        texts.append(_text(part["text"], place))
    return "".join(texts)


def _prompt(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not value:
        raise Refusal("'prompt' has to be one text.", param="prompt")
    return _text(value, "prompt")


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise Refusal(f"{place} has to be a text.", param=place)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Refusal(f"{place} holds half a character (a lone surrogate).", param=place) from None
    return value


def _whole(low: int, high: int) -> Callable[[Any, str], int]:
    def read(value: Any, name: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise Refusal(f"{name!r} has to be a whole number from {low} to {high}.", param=name)
        return value

    return read


def _number(low: float, high: float, *, low_too: bool) -> Callable[[Any, str], float]:
    def read(value: Any, name: str) -> float:
        fits = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
        if not fits or (value == low and not low_too):
            raise Refusal(f"{name!r} has to be a number from {low} to {high}.", param=name)
        return float(value)

    return read


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise Refusal(f"{name!r} has to be true or false.", param=name)
    return value


def _stops(value: Any, name: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    fits = isinstance(texts, list) and len(texts) <= MOST_STOPS
    if not fits or not all(isinstance(each, str) and 0 < len(each) <= LONGEST_STOP for each in texts):
        raise Refusal(f"{name!r} has to be a text, or up to {MOST_STOPS} of them.", param=name)
    return tuple(texts)


def _usage(value: Any, name: str) -> bool:
    if not isinstance(value, dict) or not value.keys() <= {"include_usage"}:
        raise Refusal(f"{name!r} takes 'include_usage' alone.", param=name)
    return _flag(value.get("include_usage", False), name)


_SETTINGS: Mapping[str, Callable[[Any, str], Any]] = {
    "max_tokens": _whole(1, 1_000_000),
    "max_completion_tokens": _whole(1, 1_000_000),
    "temperature": _number(0, 2, low_too=True),
    "top_p": _number(0, 1, low_too=False),
    "seed": _whole(0, 2**63 - 1),
    "stop": _stops,
    "stream": _flag,
    "stream_options": _usage,
    "as_written": _flag,
}
_NAMES = {"max_completion_tokens": "max_tokens"}
_UNUSED = {"user"}  # names who asks; nothing here needs it

# Fields that many clients send with a value that asks for nothing
_NEUTRAL: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("n", "best_of"), lambda value: value == 1 and value is not True),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), lambda value: value == 0),
    **dict.fromkeys(("logprobs", "top_logprobs", "echo", "store"), lambda value: value is False or value == 0),
    **dict.fromkeys(("tools", "functions", "logit_bias", "metadata", "suffix"), lambda value: value in ([], {}, "")),
    "tool_choice": lambda value: value in ("none", "auto"),
    "parallel_tool_calls": lambda value: isinstance(value, bool),
    "response_format": lambda value: value == {"type": "text"},
    "modalities": lambda value: value == ["text"],
    "service_tier": lambda value: value in ("auto", "default"),
}
