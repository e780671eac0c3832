"""Scores of answers that are JSON objects: whether they parse, their keys, and the F1 of their fields.

A field is a path of keys with a plain value; the order of keys and of a list's items never counts. Imports no
torch.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.files import read_json
from qlora_helpers.base.text import brief
from qlora_helpers.evaluation.metrics.measures import Metric, Scored

DEEPEST = 100  # levels of objects and lists
_FENCE = "```"
Field = tuple[str, Any]


def parsed(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or is nested too deeply. NaN and Infinity are not, and neither is an object that has a key
            twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key twice")
        return found

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value]
    for _ in range(DEEPEST):
        level = [item for each in level for item in _inside(each)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def unfenced(text: str) -> str | None:
    """The text inside a Markdown fence that is all of an answer; None where there is none."""
    text = text.strip()
    first, line_end, rest = text.partition("\n")
    if not (line_end and first.startswith(_FENCE) and rest.endswith(_FENCE)):
        return None
    return rest.removesuffix(_FENCE)


def object_of(text: str) -> Any:
    """The JSON object or list of a text, or None where it is neither."""
    try:
        value = parsed(text)
    except ValueError:
        return None
    return value if isinstance(value, dict | list) else None


def fields(value: Any, path: str = "") -> Iterator[Field]:
    """Yields each plain value with its path; an empty object or list is a value too. Items of a list share their path."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from fields(item, f"{path}/{key.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(value, list) and value:
        for item in value:
            yield from fields(item, f"{path}/*")
    else:
        yield path, _plain(value)


def _plain(value: Any) -> Any:
    """A value as it is compared: texts without outer white space, 1 and 1.0 as one number, true apart from 1."""
    if isinstance(value, str):
        return "text", unicodedata.normalize("NFC", value).strip()
    if isinstance(value, bool) or value is None:
        return "constant", value
    return ("number", value) if isinstance(value, int | float) else ("empty", type(value).__name__)


def json_metric(schema: Path | None = None) -> Metric:
    """The metric for JSON objects.

    Args:
        schema: a file with a JSON schema, against which answers are checked too.

    Raises:
        UserError: the schema can't be read, or is none.
    """
    fits = None if schema is None else _checker(schema)

    def score(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[Scored]:
        return [_scored(answer, several, fits) for answer, several in zip(answers, references, strict=True)]

    measures = ("field_f1", "all_fields", "keys", "valid_json", *(("fits_schema",) if fits else ()))
    return Metric(
        "json",
        "JSON objects",
        measures,
        "field_f1",
        score,
        (
            "Field F1 counts the fields of all rows together: a path of keys with its value is right or wrong. "
            "An answer in a Markdown fence is not valid JSON, but its fields count.",
        ),
    )


def _scored(answer: str, references: Sequence[str], fits: Callable[[Any], bool] | None) -> Scored:
    whole, fenced = object_of(answer), unfenced(answer)
    given = object_of(fenced) if whole is None and fenced is not None else whole
    scores: Scored = {"valid_json": 100.0 * (whole is not None)}
    if fits is not None:
        scores["fits_schema"] = 100.0 * (whole is not None and fits(whole))
    wanted = [value for value in map(object_of, references) if value is not None]
    if not wanted:  # the reference itself is not JSON
        return scores | dict.fromkeys(
            ("keys", "all_fields", "fields_right", "fields_given", "fields_wanted", "row_field_f1")
        )
    return scores | max((_against(given, value) for value in wanted), key=lambda found: found["row_field_f1"])


def _against(given: Any, wanted: Any) -> Scored:
    have, want = Counter(() if given is None else fields(given)), Counter(fields(wanted))
    right = (have & want).total()
    return {
        "keys": 100.0 * ({path for path, _ in have} == {path for path, _ in want}),
        "all_fields": 100.0 * (have == want),
        "fields_right": right,
        "fields_given": have.total(),
        "fields_wanted": want.total(),
        "row_field_f1": 200 * right / (have.total() + want.total()),
    }


def _checker(path: Path) -> Callable[[Any], bool]:
    import referencing
    from jsonschema import exceptions, validators

    schema = read_json(path, next_step="evaluation.json_schema names a file with a JSON schema.")
    try:
        kind = validators.validator_for(schema, default=validators.Draft202012Validator)
        kind.check_schema(schema)
    except (exceptions.SchemaError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} is not a JSON schema",
            got=brief(error),
            next_step="Correct it, or leave evaluation.json_schema out.",
        ) from error
    validator = kind(schema, registry=referencing.Registry())  # fetches nothing

    def fits(value: Any) -> bool:
        return validator.is_valid(value)

    try:
        fits({})
    except Exception as error:  # a reference that leads nowhere, in whatever way the library says it
        raise UserError(
            f"{path} can't be used", got=brief(error), next_step="Put what its $ref names into the file itself."
        ) from error
    return fits
