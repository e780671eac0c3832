"""Reads a JSON file into a dataclass and checks every value against the field's annotation.

A run's file may be damaged, edited by hand or written by an earlier version. Whatever it holds, its reader gets values of the
declared types, or one error that names the file. This module knows no file in particular.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import RESTORE, read_json

Record = TypeVar("Record")
LARGEST_WHOLE = 2**53
"""JSON numbers are exact up to here in every reader, JavaScript's included."""


def read_record(path: Path, kind: type[Record], *, next_step: str = RESTORE) -> Record:
    """Reads a file into a dataclass.

    Unknown keys are ignored, missing ones take their default. A class may declare `RENAMED`, a mapping from a key of earlier
    versions to its name today, a static method `upgraded` that returns an object of earlier versions as today's (it raises
    `ValueError` where it can't), and a property `is_plausible` that judges the values together.

    Args:
        path: the JSON file.
        kind: a dataclass whose fields are annotated with `str`, `bool`, `int`, `float`, `Any`, dataclasses, and tuples, lists,
            dictionaries and optionals of these.
        next_step: what a person should do about a damaged file.

    Raises:
        RunError: the file is missing, is not valid JSON, or a value is not of its declared type.
    """
    return _read(path, kind, next_step, build=True)


def read_values(path: Path, kind: type, *, next_step: str = RESTORE) -> dict[str, Any]:
    """Reads a file as `read_record` does and returns its plain values, unknown keys included, under today's names.

    Raises:
        RunError: as for `read_record`.
    """
    return _read(path, kind, next_step, build=False)


def read_object(path: Path, *, next_step: str = RESTORE) -> dict[str, Any]:
    """Reads a file that holds a JSON object, whatever is in it.

    Raises:
        RunError: the file is missing, is not valid JSON, or holds something other than an object.
    """
    values = read_json(path, next_step=next_step)
    if not isinstance(values, dict):
        raise RunError(f"{path} is damaged (expected an object, got {_named(values)})", next_step=next_step)
    return values


def _read(path: Path, kind: Any, next_step: str, *, build: bool) -> Any:
    values = read_object(path, next_step=next_step)
    try:
        return _object(kind, values, "", build)
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error})", next_step=next_step) from None


_hints = functools.cache(typing.get_type_hints)  # it evaluates every annotation of a class again


def _object(kind: Any, values: Any, place: str, build: bool) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{place}expected an object, got {_named(values)}")
    values = kind.upgraded(values) if hasattr(kind, "upgraded") else values
    renamed = getattr(kind, "RENAMED", {})
    values = {renamed[key]: value for key, value in values.items() if key in renamed} | {
        key: value for key, value in values.items() if key not in renamed
    }
    found = {}
    for item in dataclasses.fields(kind):
        if item.name in values:
            found[item.name] = _value(_hints(kind)[item.name], values[item.name], f"{place}{item.name}: ", build)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ValueError(f"{place}{item.name} is missing")
    if not build:
        return values | found
    record = kind(**found)
    if not getattr(record, "is_plausible", True):
        raise ValueError(f"{place}a value is out of its range")
    return record


def _value(hint: Any, value: Any, place: str, build: bool) -> Any:
    if hint is Any:
        return value
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = (kind for kind in inner if kind is not types.NoneType)
        return _value(hint, value, place, build)
    if dataclasses.is_dataclass(hint):
        return _object(hint, value, place, build)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{place}expected an object, got {_named(value)}")
        return {key: _value(inner[1], item, f"{place}{key}: ", build) for key, item in value.items()}
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise ValueError(f"{place}expected a list, got {_named(value)}")
        items = [_value(inner[0], item, f"{place}{number}: ", build) for number, item in enumerate(value, start=1)]
        return tuple(items) if build and origin is tuple else items
    return _scalar(hint, value, place)


def _scalar(hint: type, value: Any, place: str) -> Any:
    if hint is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value)
    fits = type(value) is hint
    if fits and hint is int:
        fits = abs(value) <= LARGEST_WHOLE
    elif fits and hint is float:
        fits = math.isfinite(value)
    if not fits:
        raise ValueError(f"{place}expected {_SCALARS[hint]}, got {_named(value)}")
    return value


_SCALARS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


def _named(value: Any) -> str:
    """A value for a message: its kind where it has parts, else itself, shortened."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return "null" if value is None else repr(value)[:60]
