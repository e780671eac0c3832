"""Calls of tools in an answer: how a run's template writes them, found by rendering probes, and read back from an answer's text.

A template that does not show the tools to the model, or whose probes are not read back exactly, has no form. A text that is not
wholly in the form stays text. Knows nothing of HTTP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.text import plain
from qlora_helpers.data.examples import Example, Message
from qlora_helpers.data.rendering import Rendering, RowProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.data.plain_templates import Template
    from qlora_helpers.data.templates import AnswerMarks

_NAMES = ("probe_first", "probe_other")
_SIMPLE: dict[str, Any] = {"place": "Oslo"}
_HARD: dict[str, Any] = {"place": 'a "b" \\ {c} \u00fc\n</tool_call>', "days": [1, {"deep": None}], "sure": True}
_CONTENT = "Let me look."


@dataclass(frozen=True)
class Call:
    """A call of a tool: its name and its arguments."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class CallForm:
    """How a template writes calls: JSON objects with texts around them.

    Attributes:
        open, close: the texts before the first call and behind the last.
        between: the text between two calls; None where the template writes one call at most.
        name_key, arguments_key: of the objects.
    """

    open: str
    close: str
    between: str | None
    name_key: str
    arguments_key: str

    def read(self, text: str, names: Collection[str]) -> tuple[str, tuple[Call, ...]] | None:
        """Returns the text before the calls, and the calls; None where the text is not wholly in this form.

        Args:
            text: of an answer.
            names: of the tools that may be called; a call of any other is none.
        """
        begin = text.find(self.open.strip())
        if begin < 0:
            return None
        place = begin + len(self.open.strip())
        calls: list[Call] = []
        while True:
            place += len(text[place:]) - len(text[place:].lstrip())
            try:
                value, end = json.JSONDecoder(parse_constant=_no_constant).raw_decode(text, place)
            except (ValueError, RecursionError):
                return None
            call = self._call(value, names)
            if call is None:
                return None
            calls.append(call)
            if _spaced(self.close).fullmatch(text, end):
                return text[:begin].rstrip(), tuple(calls)
            found = _spaced(self.between).match(text, end) if self.between is not None else None
            if found is None:
                return None
            place = found.end()

    def _call(self, value: Any, names: Collection[str]) -> Call | None:
        if not isinstance(value, dict) or not {self.name_key, self.arguments_key} <= value.keys():
            return None
        arguments = _arguments(value[self.arguments_key])
        if value[self.name_key] not in names or arguments is None:
            return None
        return Call(value[self.name_key], arguments)


def call_form(template: Template, tokenizer: PreTrainedTokenizerBase, marks: AnswerMarks) -> CallForm | None:
    """Returns how a template writes calls of tools, or None where it shows no tools or its calls are not read back.

    Args:
        template: the run's.
        tokenizer: the model's.
        marks: the tokens around an answer.
    """

    def written(content: str, *calls: Call) -> str:
        """The text that a server reads where the model writes exactly what would be trained."""
        from qlora_helpers.evaluation.generate import answer_of

        row = _probe(content, calls)
        prompt, whole = template.prompt(row).text, template.render(row)
        if not whole.text.startswith(prompt):
            raise RowProblem("its prompt does not begin the row")
        start = len(prompt)
        typed = tuple((begin - start, end - start) for begin, end in whole.typed if begin >= start)
        (encoded,) = template.encoder.encode([Rendering(whole.text[start:], typed=typed, begin=False)])
        return plain(answer_of(encoded.ids.tolist(), tokenizer, marks).text)

    simple, other, hard = Call(_NAMES[0], _SIMPLE), Call(_NAMES[1], _SIMPLE), Call(_NAMES[0], _HARD)
    try:
        shown = template.prompt(_probe("", (simple,))).text
        form = _one(written("", simple)) if all(name in shown for name in _NAMES) else None
        if form is None:
            return None
        form = _several(form, written, simple, other)
        asked: list[tuple[str, tuple[Call, ...]]] = [("", (simple,)), ("", (hard,))]
        asked += [("", (hard, other))] if form.between is not None else []
        exact = all(form.read(written(content, *calls), _NAMES) == (content, calls) for content, calls in asked)
        # Some templates write no text beside a call, so that no model that they train writes one.
        beside = form.read(written(_CONTENT, simple), _NAMES) in ((_CONTENT, (simple,)), ("", (simple,)))
        return form if exact and beside and form.read(written(_CONTENT), _NAMES) is None else None
    except RowProblem:
        return None


def _probe(content: str, calls: Collection[Call]) -> Example:
    tools = tuple(
        {
            "type": "function",
            "function": {
                "name": name,
                "description": f"Looks at {name}.",
                "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
            },
        }
        for name in _NAMES
    )
    made = tuple(
        {"id": f"call{number:05d}", "name": call.name, "arguments": dict(call.arguments)}
        for number, call in enumerate(calls)
    )
    turns = (Message("user", "How is it there?"), Message("assistant", content, tool_calls=made))
    return Example("probe", "probe", turns, tools=tools)


def _one(text: str) -> CallForm | None:
    """The form of one call, of a text that holds nothing else."""
    found = _object(text, 0, _NAMES[0])
    if found is None:
        return None
    begin, end, value = found
    (name_key,) = (key for key, each in value.items() if each == _NAMES[0])
    arguments = [key for key, each in value.items() if _arguments(each) == _SIMPLE]
    return CallForm(text[:begin], text[end:], None, name_key, arguments[0]) if len(arguments) == 1 else None


def _several(form: CallForm, written: Any, one: Call, other: Call) -> CallForm:
    """The same form with the text between two calls, where the template writes two."""
    try:
        text = written("", one, other)
    except RowProblem:
        return form
    first = _object(text, 0, one.name)
    second = _object(text, first[1], other.name) if first else None
    if first is None or second is None:
        return form
    return CallForm(form.open, form.close, text[first[1] : second[0]], form.name_key, form.arguments_key)


def _object(text: str, start: int, name: str) -> tuple[int, int, dict[str, Any]] | None:
    """The first JSON object behind a place that has a name among its own values, with where it begins and ends."""
    for begin in (found.start() for found in re.finditer(r"\{", text) if found.start() >= start):
        try:
            value, end = json.JSONDecoder(parse_constant=_no_constant).raw_decode(text, begin)
        except ValueError:
            continue
        if isinstance(value, dict) and list(value.values()).count(name) == 1:
            return begin, end, value
    return None


def _arguments(value: Any) -> Mapping[str, Any] | None:
    """Arguments as an object, which some templates write as a text that holds JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _spaced(text: str) -> re.Pattern[str]:
    """Matches a text with any white space around its words."""
    return re.compile("".join(rf"\s*{re.escape(word)}" for word in text.split()) + r"\s*")


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity, which are not JSON
