"""Reads conversations as OpenAI (`role`, `content`) and ShareGPT (`from`, `value`) write them into messages.

Accepts the variants that are about: other names of the roles, text parts, tool calls with their results, what a model thought, a
weight of each answer, and all of it as JSON in a text. A conversation whose roles are out of order can't be used, and the reason
says where. Knows nothing of files and columns.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from qlora_helpers.data.examples import Message
from qlora_helpers.data.texts import Cleaner, KeyTwiceError, Unusable, each_key_once

USUAL_KEYS = ("role", "from")
ROLE_KEYS = (*USUAL_KEYS, "speaker", "author", "sender")
TEXT_KEYS = ("content", "value", "parts", "text", "message", "utterance")
THINKING_KEYS = ("reasoning_content", "thinking", "reasoning")
CALL = "call"  # ShareGPT writes an assistant's tool call as a turn of its own
ROLE_NAMES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer", "client", "usr", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai", "bing", "bard", "claude"), "assistant"),
    **dict.fromkeys(("agent", "chatbot", "llm", "answer", "gpt-4", "gpt4", "gpt-3.5-turbo"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), CALL),
}
USUAL = {"system", "developer", "user", "human", "assistant", "gpt", "model", "tool", "function", "observation", CALL}
"""Names of roles that need no word; what another name was taken for is said."""
_BEFORE = {"user": ("", "system", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
_PYTHON = re.compile(r"\s*\[?\s*\{\s*'")
_MOST_PYTHON = 1_000_000  # characters of a cell that are read as Python's own notation
_TURNS = re.compile(rf"\s*\[\s*\{{\s*['\"](?:{'|'.join(ROLE_KEYS + TEXT_KEYS)})['\"]\s*:")


def parsed(value: Any, *, strict: bool = False) -> Any:
    """Returns what a text holds as JSON, or as Python writes it (pandas does in CSV); other values as they are.

    Raises:
        Unusable: `strict`, and an object has a key twice.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value, object_pairs_hook=each_key_once if strict else None)
        except KeyTwiceError as twice:
            raise _twice(str(twice)) from twice
        except (ValueError, RecursionError):
            return _from_python(value, strict)
    return value


def _twice(key: str) -> Unusable:
    return Unusable("an object in it has a key twice", f": {key[:80]!r}")


def _from_python(text: str, strict: bool) -> Any:
    """Returns the value of a Python literal, which is parsed and never run; a text that is none as it is."""
    if len(text) > _MOST_PYTHON or not _PYTHON.match(text):
        return text
    try:
        with warnings.catch_warnings():  # of escapes that Python will refuse one day
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval")
            found = ast.literal_eval(tree)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
    for node in ast.walk(tree) if strict else ():
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)] if isinstance(node, ast.Dict) else []
        if len(set(keys)) < len(keys):
            raise _twice(str(next(key for key in keys if keys.count(key) > 1)))
    return found


def has_broken_turns(value: Any) -> bool:
    """Whether a text begins as a list of turns does, but can't be parsed (numpy writes lists without commas)."""
    return isinstance(value, str) and bool(_TURNS.match(value)) and isinstance(parsed(value), str)


def as_turns(value: Any, *, strict: bool = False) -> Any:
    """Returns a list of turns of an object that holds their roles and their texts as lists; any other value `parsed`."""
    found = parsed(value, strict=strict)
    if not isinstance(found, Mapping) or not any(isinstance(found.get(key), list) for key in ROLE_KEYS):
        return found
    lists = {key: items for key, items in found.items() if isinstance(items, list)}
    if len({len(items) for items in lists.values()}) != 1 or not any(key in lists for key in TEXT_KEYS):
        return found
    return [dict(zip(lists, turn, strict=True)) for turn in zip(*lists.values(), strict=True)]


def chat_keys(value: Any) -> tuple[str, str] | None:
    """Returns the names under which a list of turns holds role and text; None where it is no such list."""
    turns = as_turns(value)
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], Mapping):
        return None
    role = next((key for key in ROLE_KEYS if key in turns[0]), None)
    if role not in USUAL_KEYS and str(turns[0].get(role)).strip().lower() not in ROLE_NAMES:
        return None  # such as readers' comments with their authors
    text = next((key for key in TEXT_KEYS if key in turns[0]), None)
    calls = role == "role" and turns[0].get("tool_calls")
    return (role, text or "content") if role and (text or calls) else None


def conversation(value: Any, cleaner: Cleaner) -> tuple[list[Message], int]:
    """Reads a list of turns, or JSON of one.

    Returns:
        The messages up to the last answer, and how many turns stood behind it: nothing can be learned of them.

    Raises:
        Unusable: it is no list of turns, a role is unknown or out of order, or an answer is empty.
    """
    turns = as_turns(value, strict=True)
    if turns is None or turns == [] or (isinstance(turns, str) and not turns.strip()):
        raise Unusable("its messages are missing")
    if not isinstance(turns, list | tuple):
        raise Unusable("its messages are not a list", f" but {type(turns).__name__}")
    found: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        message = _message(turn, number, cleaner)
        follows = found[-1].role if found else ""
        if message.role == "system" and not message.content:
            cleaner.empty_systems += 1
            continue
        if message.role == "assistant" and follows == "assistant" and found[-1].tool_calls and not message.content:
            found[-1] = _with_calls(found[-1], message)
            continue
        if message.role == "system" and found or message.role != "system" and follows not in _BEFORE[message.role]:
            after = f"after {follows}" if follows else "at the start"
            raise Unusable("its roles are out of order", f": message {number} is {message.role} {after}")
        if message.role == "tool" and follows == "assistant" and not found[-1].tool_calls:
            raise Unusable("its roles are out of order", f": message {number} answers no tool call")
        found.append(message)
    last = max((place for place, message in enumerate(found) if message.role == "assistant"), default=-1)
    if last < 0:
        raise Unusable("it has no answer")
    if not any(message.learned for message in found if message.role == "assistant"):
        raise Unusable("all its answers have weight 0")
    return found[: last + 1], len(found) - last - 1


def tools_of(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Returns the descriptions of a row's tools: of a list, or JSON of one; none where the cell is empty.

    Raises:
        Unusable: it is something else.
    """
    found = parsed(value, strict=True)
    if found is None or found == "" or found == []:
        return ()
    found = [found] if isinstance(found, Mapping) else found
    if not isinstance(found, list | tuple) or not all(isinstance(tool, Mapping) for tool in found):
        raise Unusable("its tools are not a list of objects")
    return tuple(map(_tool, found))


def _tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the description of a tool as OpenAI writes it; older files and other interfaces leave out the object around it."""
    if "function" in tool or not isinstance(tool.get("name"), str):
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _message(turn: Any, number: int, cleaner: Cleaner) -> Message:
    if not isinstance(turn, Mapping):
        raise Unusable("its messages are not objects", f": message {number} is {type(turn).__name__}")
    name = _first(turn, ROLE_KEYS)
    role = ROLE_NAMES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        shown = repr(name[:40]) if isinstance(name, str) else type(name).__name__
        raise Unusable(
            "it has an unknown role", f": {shown} in message {number} (system, user, assistant and tool are known)"
        )
    if (said := name.strip().lower()) not in USUAL and role != CALL:
        cleaner.roles[said] = role
    value = _first(turn, TEXT_KEYS)
    if role == CALL:
        return Message("assistant", "", tool_calls=_calls(value, number), learned=_learned(turn, number))
    calls = _calls(turn.get("tool_calls") or turn.get("function_call"), number) if role == "assistant" else ()
    what = f"message {number}" if role != "assistant" else f"answer (message {number})"
    if (role == "assistant" and isinstance(value, Mapping) and value) or (role == "tool" and _is_data(value)):
        cleaner.objects += role == "assistant"
        value = json.dumps(value, ensure_ascii=False, default=str)  # an answer or a result that was not written as text
    content = cleaner.optional(value, what, numbers=role in ("assistant", "tool"))
    if not content and not calls and role not in ("tool", "system"):
        raise Unusable(
            "one of its answers is empty" if role == "assistant" else "one of its messages is empty", f": {what}"
        )
    thinking = _word(_first(turn, THINKING_KEYS))
    return Message(
        role,
        content,
        cleaner.optional(thinking, what) if thinking and role == "assistant" else "",
        calls,
        _word(turn.get("tool_call_id")) if role == "tool" else "",
        _word(turn.get("name")),
        _learned(turn, number),
    )


def is_answer(turn: Mapping[str, Any]) -> bool:
    """Whether a turn is the assistant's."""
    return ROLE_NAMES.get(str(_first(turn, ROLE_KEYS)).strip().lower()) in ("assistant", CALL)


def _first(turn: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """Returns the first of some values that is there."""
    for key in keys:
        if (value := turn.get(key)) is not None:
            return value
    return None


def _is_data(value: Any) -> bool:
    """Whether a tool's result is an object or a list, other than a list of text parts."""
    parts = isinstance(value, list) and value and all(isinstance(part, Mapping) and "text" in part for part in value)
    return isinstance(value, Mapping | list) and not parts


def _learned(turn: Mapping[str, Any], number: int) -> bool:
    """Whether a turn is to be learned, by its `weight`, or by the `train` or `loss` of other trainers' files."""
    if turn.get("train_detail"):
        raise Unusable("it marks parts of an answer to be learned (train_detail)", f": message {number}")
    marks = {key: turn[key] for key in ("weight", "train", "loss") if turn.get(key) is not None}
    for key, value in marks.items():
        if value not in (0, 1):  # false and true are these too
            raise Unusable(f"it has a {key} other than 0 and 1", f": message {number}")
    return all(marks.values())


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _with_calls(one: Message, other: Message) -> Message:
    return Message(one.role, one.content, one.thinking, one.tool_calls + other.tool_calls, learned=one.learned)


def _calls(value: Any, number: int) -> tuple[Mapping[str, Any], ...]:
    calls = parsed(value, strict=True)
    if calls is None or calls == "":
        return ()
    found = []
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        inner = call.get("function") or call if isinstance(call, Mapping) else {}
        arguments = inner.get("arguments", inner.get("parameters", {})) if isinstance(inner, Mapping) else None
        arguments = parsed(arguments, strict=True)
        arguments = {} if arguments in (None, "") else arguments
        if (
            not isinstance(inner, Mapping)
            or not isinstance(inner.get("name"), str)
            or not isinstance(arguments, Mapping)
        ):
            raise Unusable("a tool call has no name, or arguments that are no JSON object", f": message {number}")
        named = {"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {}
        found.append({**named, "name": inner["name"], "arguments": arguments})
    return tuple(found)
