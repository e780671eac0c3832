"""Reads what a request says of tools: their descriptions, and the calls and results of the conversation so far."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from qlora_helpers.serving.refusal import Refusal

MOST_TOOLS, MOST_CALLS = 128, 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def read_tools(given: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Returns the tools that may be called.

    Args:
        given: the fields of a request.

    Raises:
        Refusal: a description is wrong, or a call is to be forced or forbidden in a way that a model can't be held to.
    """
    values, choice = given.get("tools", []), given.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise Refusal(
            "The model decides whether it calls a tool: 'tool_choice' has to be 'auto' or 'none'.",
            param="tool_choice",
            code="unsupported_value",
        )
    if not isinstance(values, list) or len(values) > MOST_TOOLS:
        raise Refusal(f"'tools' has to be a list of up to {MOST_TOOLS} functions.", param="tools")
    tools = tuple(_tool(value, f"tools[{number}]") for number, value in enumerate(values))
    names = names_of(tools)
    if len(set(names)) < len(names):
        raise Refusal("Two of the tools have one name.", param="tools")
    if tools and given.get("parallel_tool_calls") is False:
        raise Refusal(
            "The model decides how many tools it calls: leave 'parallel_tool_calls' out.",
            param="parallel_tool_calls",
            code="unsupported_value",
        )
    return tools if choice == "auto" else ()


def names_of(tools: tuple[Mapping[str, Any], ...]) -> tuple[str, ...]:
    """Returns the names of tools."""
    return tuple(tool["function"]["name"] for tool in tools)


def _tool(value: Any, place: str) -> Mapping[str, Any]:
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise Refusal(f"{place} has to be a function with a name of letters, digits, _, . or -.", param=place)
    if not isinstance(function.get("description", ""), str) or not isinstance(function.get("parameters", {}), dict):
        raise Refusal(
            f"{place} has a description that is not a text, or parameters that are not an object.", param=place
        )
    kept = {key: function[key] for key in ("name", "description", "parameters") if key in function}
    _refuse_half_characters(kept, place)
    return {"type": "function", "function": kept}


def read_calls(values: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    """Returns the calls that an assistant's message of the conversation so far has made.

    Args:
        values: the message's `tool_calls`; None is none.
        place: how messages name it.

    Raises:
        Refusal: one is not a call of a function with arguments as a JSON object.
    """
    if not values:
        return ()
    if not isinstance(values, list) or len(values) > MOST_CALLS:
        raise Refusal(f"{place} has to be a list of up to {MOST_CALLS} calls.", param=place)
    return tuple(_call(value, f"{place}[{number}]") for number, value in enumerate(values))


def _call(value: Any, place: str) -> Mapping[str, Any]:
    function = (
        value.get("function") if isinstance(value, dict) and value.get("type", "function") == "function" else None
    )
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise Refusal(f"{place} has to be the call of a function.", param=place)
    try:
        arguments = json.loads(function.get("arguments") or "{}", parse_constant=_no_constant)
    except (TypeError, ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise Refusal(f"The arguments of {place} have to be a JSON object, as a text.", param=place)
    _refuse_half_characters([arguments, value.get("id")], place)
    found = {"name": function["name"], "arguments": arguments}
    return found | ({"id": value["id"]} if isinstance(value.get("id"), str) and value["id"] else {})


def _refuse_half_characters(value: Any, place: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise Refusal(f"{place} holds half a character (a lone surrogate).", param=place) from None
    except RecursionError:
        raise Refusal(f"{place} is nested too deeply.", param=place) from None


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity, which are not JSON


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(_NAME.fullmatch(value))
