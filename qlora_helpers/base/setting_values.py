"""Converts and checks the value of one setting, from JSON or from a text of the command line. Knows no particular setting."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import types
import typing
from typing import Any

from qlora_helpers.base.addresses import carries_credentials

_ESCAPED = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}  # how the command line writes line breaks and tabs
_UNWRITABLE = re.compile(r"[\x00-\x1f\ud800-\udfff]")  # surrogates: bytes of the command line that are not UTF-8
_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}
_WITHOUT_CREDENTIALS = (
    "expected an address without credentials (no user or password, no signature, token or key), because settings are written "
    "into the run's files; download the file and name the copy, or use a public address or hub id"
)
_type_hints = functools.cache(typing.get_type_hints)  # it evaluates every annotation of a class again


def checked_value(section: type, item: dataclasses.Field, value: Any, is_text: bool) -> Any:
    """Converts a value to its setting's type and checks it against the setting's choices and limits.

    Args:
        section: the dataclass that the setting belongs to.
        item: the setting's field, made by `config.option`.
        value: a plain value, or a text of the command line.
        is_text: whether it is such a text.

    Raises:
        ValueError: it has another type, or is not among the choices or within the limits.
    """
    hint = _type_hints(section)[item.name]
    limits = item.metadata
    if limits.get("many_lines") and isinstance(value, str):
        return _lines(value, is_text)
    value = _converted(hint, value, is_text)
    if value is None:
        return value
    if limits["choices"] and value not in limits["choices"]:
        raise ValueError(f"expected one of {', '.join(map(str, limits['choices']))}, got {value!r}")
    if limits["low"] is not None and value < limits["low"]:
        raise ValueError(f"expected at least {limits['low']}, got {value}")
    if limits["high"] is not None and value > limits["high"]:
        raise ValueError(f"expected at most {limits['high']}, got {value}")
    return value


def _converted(hint: Any, value: Any, is_text: bool) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    optional = type(None) in kinds
    kind = next(kind for kind in kinds if kind is not type(None))
    if value is None or (is_text and value.lower() in ("none", "null") and optional):
        if optional:
            return None
        raise ValueError("expected a value, got none")
    if typing.get_origin(kind) is tuple:
        return _texts(value, is_text)
    if kind is str:
        return plain_text(value)
    if is_text:
        try:
            value = json.loads(value.lower() if kind is bool else value)
        except (ValueError, RecursionError):
            raise ValueError(f"expected {_NAMES[kind]}, got {value[:100]!r}") from None
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"expected {_NAMES[kind]}, got {value!r}")
    return value


def _lines(text: str, is_text: bool) -> str | None:
    """Returns a text that may be empty and hold line breaks and tabs, or None for the command line's `none`.

    Raises:
        ValueError: it contains other control characters, or credentials.
    """
    if is_text and text.lower() in ("none", "null"):
        return None
    text = re.sub(r"\\[nt\\]", lambda found: _ESCAPED[found[0]], text) if is_text else text
    plain_text(re.sub(r"[\n\t]", " ", text) + ".")
    return text


def plain_text(value: Any) -> str:
    """Returns a text that may be written into a run's files.

    Raises:
        ValueError: it is not a text, is empty, or contains control characters or credentials.
    """
    if isinstance(value, str) and carries_credentials(value):
        raise ValueError(_WITHOUT_CREDENTIALS)  # the value is not quoted: a message may end up in a log
    if not isinstance(value, str) or not value.strip() or _UNWRITABLE.search(value):
        raise ValueError(f"expected a text without control characters, got {value!r}")
    return value


def _texts(value: Any, is_text: bool) -> tuple[str, ...]:
    if is_text:
        parts = value.strip("[]()").replace('"', "").replace("'", "").split(",")
        value = [part.strip() for part in parts if part.strip()]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"expected a list of names, got {value!r}")
    return tuple(map(plain_text, value))
