"""Turns rows into examples by their form, with a reason for every row that can't be used.

Rows stream through: of a row nothing is kept but its example. The form is recognised in `forms`, cells are cleaned in `texts`,
and conversations are read in `conversations`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.data.conversations import as_turns, chat_keys, conversation, is_answer, parsed, tools_of
from qlora_helpers.data.examples import SUMMARIZE, Example, Message
from qlora_helpers.data.forms import Form
from qlora_helpers.data.rows import MAX_ROWS, Part, Row, SkippedRows
from qlora_helpers.data.texts import MISSING, Cleaner, Unusable
from qlora_helpers.data.transcripts import style_of, turns

SAMPLE_ROWS = 1000  # in which columns and their values are looked for
SAMPLE_CELLS = 500_000
SAMPLE_VALUES = 3


def as_columns(values: Any) -> Mapping[str, Any] | None:
    """Returns a row as a mapping of columns; a list of turns is taken as messages, a text as a document."""
    if isinstance(values, Mapping):
        return values
    if isinstance(values, str):
        return {"text": values}
    return {"messages": values} if chat_keys(values) else None


def first_values(parts: list[Part]) -> dict[str, list[Any]]:
    """Returns the columns of a source's first rows, in their order, each with a few values that are not missing."""
    found: dict[str, list[Any]] = {}
    cells = 0
    for part in parts:
        found.update((column, found.get(column, [])) for column in part.kinds)
        rows = part.rows(None)
        for row in islice(rows, SAMPLE_ROWS):
            cells += len(row.values) if isinstance(row.values, Mapping) else 1
            if cells > SAMPLE_CELLS:
                break
            for column, value in (as_columns(row.values) or {}).items():
                values = found.setdefault(column, [])
                if len(values) < SAMPLE_VALUES and value not in (None, ""):
                    values.append(value)
        rows.close() if hasattr(rows, "close") else None
    return found


class Conversion:
    """Makes examples of rows.

    Args:
        form: what the rows are.
        config: instruction and system message.
        skipped: gets the rows that can't be used.
    """

    def __init__(self, form: Form, config: DataConfig, skipped: SkippedRows) -> None:
        self._form, self._skipped = form, skipped
        self._cleaner = Cleaner()
        instruction = SUMMARIZE if form.name == "dialogue" and config.instruction is None else config.instruction or ""
        self._instruction = instruction if not instruction or instruction[-1].isspace() else instruction + "\n\n"
        self._system = config.system or ""
        self._ids: set[str] = set()
        self._shared: dict[str, str] = {self._system: self._system}  # one object for a text that stands in many rows
        self._cut = self._gaps = self._seen = self._given = 0
        self._objects: bool | None = None
        makers: dict[str, Callable[[Mapping[str, Any]], Example]] = {
            **dict.fromkeys(("messages", "conversations"), self._chat),
            "transcript": self._transcript,
            "alpaca": self._alpaca,
            "text": self._document,
        }
        self._make = makers.get(form.name, self._filled if form.prompt else self._pair)

    def examples(self, rows: Iterator[Row]) -> Iterator[Example]:
        """Yields the usable rows as examples; an id that is missing or was seen before is replaced by the row's `where`.

        Raises:
            DataError: there are more than `MAX_ROWS`, usable or not.
        """
        for where, values in rows:
            self._seen += 1
            if self._seen > MAX_ROWS:
                raise DataError(
                    f"{where}: there are too many rows",
                    expected=f"{MAX_ROWS:,} at most",
                    next_step="Take a part of them.",
                )
            columns = None if isinstance(values, str) and self._form.name != "text" else as_columns(values)
            removed = self._cleaner.removed
            try:
                if columns is None:
                    raise Unusable("not an object with columns", f" but {type(values).__name__}")
                made = self._make(columns)
            except Unusable as reason:
                self._skipped.add(where, reason.kind, reason.detail)
                continue
            row_id = _id(columns.get("id"))
            if row_id is None or row_id in self._ids:
                row_id = where
            self._ids.add(row_id)
            self._cleaner.touched += self._cleaner.removed > removed
            yield Example(row_id, where, made.messages, made.text, made.tools, made.references)

    def notes(self, name: str) -> list[str]:
        """Returns what was changed in the rows, counted."""
        found = self._cleaner.notes(name)
        if self._cut:
            found.append(f"{name}: left out {self._cut} turns that stand behind a conversation's last answer")
        if self._given:
            found.append(f"{name}: answers in prompts, which are read and not learned: {self._given}")
        if self._gaps:
            found.append(f"{name}: empty cells that data.prompt names, left out of their prompts: {self._gaps}")
        return found

    def _example(
        self,
        messages: list[Message] | tuple[Message, ...],
        tools: tuple[Mapping[str, Any], ...] = (),
        references: tuple[str, ...] = (),
        system: str = "",
    ) -> Example:
        """Returns an example of messages, with the system's message and the instruction before them."""
        system = system or self._system
        if system and messages[0].role != "system":
            messages = [Message("system", self._shared.setdefault(system, system)), *messages]
        return Example("", "", tuple(messages), "", tools, references)

    def _asked(self, text: str, body: tuple[int, int]) -> Message:
        before = len(self._instruction)
        return Message("user", self._instruction + text, body=(before + body[0], before + body[1]))

    def _pair(self, values: Mapping[str, Any]) -> Example:
        columns = self._form.columns
        prompt, answer = parsed(values.get(columns["prompt"])), values.get(columns["answer"])
        if chat_keys(prompt):
            return self._chat_pair(values.get(columns["prompt"]), answer, values)
        names = ("dialogue", "summary") if self._form.name == "dialogue" else ("prompt", "answer")
        text = self._cleaner.text(values.get(columns["prompt"]), names[0])
        text, body = self._with_input(text, values)
        references: list[str] = []
        answer = parsed(answer)["text"] if _is_squad(parsed(answer)) else answer
        if isinstance(answer, list) and answer and all(isinstance(item, str) for item in answer):
            answer, *references = dict.fromkeys(answer)  # several right answers
        answered = self._cleaner.answer(self._written(answer), names[1])
        for part, column in columns.items():
            if part.startswith("reference"):
                references.append(values.get(column) or "")
        asked = self._asked(text, body)
        right = tuple(filter(None, map(self._reference, references)))
        return self._example([asked, Message("assistant", answered)], (), right, self._system_of(values))

    def _written(self, answer: Any) -> Any:
        """Returns an answer that is an object as JSON, where answers are objects from the first on; any other as it is."""
        if answer not in (None, "", []) and self._objects is None:
            self._objects = isinstance(answer, Mapping)
        if not (self._objects and isinstance(answer, Mapping) and answer):
            return answer
        self._cleaner.objects += 1
        return json.dumps(answer, ensure_ascii=False, default=str)

    def _reference(self, value: Any) -> str:
        try:
            return self._cleaner.optional(value, "reference", numbers=True)
        except Unusable:
            return ""

    def _chat_pair(self, prompt: Any, answer: Any, values: Mapping[str, Any]) -> Example:
        """Returns an example of turns and the answer to them; the answers among the turns are given, and not learned."""
        asked, answered = as_turns(prompt, strict=True), as_turns(answer, strict=True)
        answered = answered if isinstance(answered, list) else [{"role": "assistant", "content": answer}]
        given = [{**turn, "weight": 0} if isinstance(turn, Mapping) and is_answer(turn) else turn for turn in asked]
        self._given += sum(given_turn is not turn for given_turn, turn in zip(given, asked, strict=True))
        messages, _ = conversation([*given, *answered], self._cleaner)
        return self._with_instruction(messages, (), self._system_of(values))

    def _chat(self, values: Mapping[str, Any]) -> Example:
        columns = self._form.columns
        messages, cut = conversation(values.get(columns["messages"]), self._cleaner)
        self._cut += cut
        tools = tools_of(values.get(columns["tools"])) if "tools" in columns else ()
        return self._with_instruction(messages, tools, self._system_of(values))

    def _transcript(self, values: Mapping[str, Any]) -> Example:
        text = self._cleaner.text(values.get(self._form.columns["messages"]), "text")
        style = style_of([text])
        if style is None:
            raise Unusable("it is no conversation with marks that say who speaks")
        messages, cut = conversation(turns(text, style), self._cleaner)
        self._cut += cut
        return self._with_instruction(messages, (), "")

    def _with_instruction(self, messages: list[Message], tools: tuple[Mapping[str, Any], ...], system: str) -> Example:
        first = next(place for place, message in enumerate(messages) if message.role == "user")
        if self._instruction:
            asked = messages[first].content
            messages[first] = self._asked(asked, (0, len(asked)))
        return self._example(messages, tools, (), system)

    def _system_of(self, values: Mapping[str, Any]) -> str:
        column = self._form.columns.get("system")
        value = parsed(values.get(column)) if column else None
        value = (
            value.get("parts") if isinstance(value, Mapping) and "parts" in value else value
        )  # as Gemini's files have it
        return self._cleaner.optional(value, "system message") if column else ""

    def _alpaca(self, values: Mapping[str, Any]) -> Example:
        columns = self._form.columns
        text = self._cleaner.text(values.get(columns["prompt"]), "instruction")
        asked = self._asked(*self._with_input(text, values))
        given = self._written(values.get(columns["answer"]))
        answer = Message("assistant", self._cleaner.answer(given, "output"))
        return self._example([asked, answer], (), (), self._system_of(values))

    def _with_input(self, text: str, values: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
        """Returns a question with the text that it is about, and which of its characters may be cut where it is too long."""
        column = self._form.columns.get("input")
        more = self._cleaner.optional(values.get(column), "input", numbers=True) if column else ""
        whole = f"{text}\n\n{more}" if more else text
        return whole, (len(whole) - len(more) if more else 0, len(whole))

    def _document(self, values: Mapping[str, Any]) -> Example:
        return Example("", "", (), self._cleaner.text(values.get(self._form.columns["text"]), "text"))

    def _filled(self, values: Mapping[str, Any]) -> Example:
        assert self._form.prompt is not None and self._form.answer is not None
        gaps: list[str] = []

        def asked_text(value: Any, column: str) -> str:
            text = "" if _is_missing_word(value) else self._cleaner.optional(value, f"{column!r}", numbers=True)
            gaps.extend([] if text else [column])
            return text

        text, body = self._form.prompt.fill(values, asked_text)
        if len(gaps) == len(self._form.prompt.columns):
            raise Unusable("all that data.prompt names is empty")
        answer, _ = self._form.answer.fill(values, lambda value, column: self._answer_text(value, column))
        self._gaps += len(gaps)
        return self._example([self._asked(text, body), Message("assistant", answer)])

    def _answer_text(self, value: Any, column: str) -> str:
        if isinstance(value, dict | list) and value:
            value = json.dumps(value, ensure_ascii=False)  # such as fields to be found in a text
        return self._cleaner.answer(value, f"answer ({column!r})")


def _is_squad(answer: Any) -> bool:
    """Whether an answer is SQuAD's object of answers and their places in the context."""
    return isinstance(answer, Mapping) and set(answer) == {"text", "answer_start"} and isinstance(answer["text"], list)


def _is_missing_word(value: Any) -> bool:
    return isinstance(value, str) and value.strip() in MISSING


def _id(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    text = str(value).strip()
    return text if text and text.isprintable() and len(text) <= 100 else None
