"""Rows in the words of the model's own chat template, and which of their turns can be trained.

A template is a program: it may drop thoughts from earlier turns, refuse a system's text, write today's date or raise. So nothing
is assumed of it. Each turn is rendered as the model would be asked for it, and is trained only where the whole row goes on from
exactly that prompt. Knows nothing of token ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.text import brief
from qlora_helpers.data.chat_template import asks_for_date, chat_message, chat_template_of, has_marks, render_chat
from qlora_helpers.data.encoding import control_strings
from qlora_helpers.data.examples import Example, Message
from qlora_helpers.data.plain_templates import Template
from qlora_helpers.data.rendering import PRIVATE, ControlTokens, Rendering, RowProblem, Span, Turn, row_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REWRITTEN = "the chat template writes it otherwise once another turn follows"
NO_PREFIX = "the chat template asks for it with a prompt that is not how the row goes on"
NOT_WRITTEN = "the chat template does not write its text as it is"
NO_CALLS = "the chat template does not write its tool calls"
NO_END = "the chat template writes no end of turn behind it"
NOT_MARKED = "the chat template does not mark it as the assistant's"

DATE_NOTE = "the chat template writes today's date; rows and prompts get one fixed date, so that they agree"
THINKING_NOTE = "rows without thoughts are written with enable_thinking=false; serve the model the same way"
SYSTEM_NOTE = "the chat template takes no system role: a system's text is written before the user's next one"
TOOLS_NOTE = "the chat template does not write the tools that rows describe"
THOUGHTS_NOTE = "the chat template does not write the thoughts that rows hold"

_QUESTION, _ANSWER, _SYSTEM, _TOOL = "qprobequestionq", "qprobeanswerq", "qprobesystemq", "qprobetoolq"


class ChatTemplate(Template):
    """The model's own chat template.

    Attributes:
        text, text_with_tools: the template, for rows without and with tools.
        lead: control tokens that the model writes before its answer's own text; empty for most.
        knows_system, writes_tools: whether it writes a system's text, and descriptions of tools, so that a row can be trained.

    Raises:
        ModelError: the tokenizer has no chat template, or one that raises or does not write what it is given.
    """

    name = "chat"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        if not tokenizer.chat_template:
            raise ModelError("this model has no chat template", next_step="Set data.template=plain.")
        self.text = chat_template_of(tokenizer, tools=False)
        self.text_with_tools = chat_template_of(tokenizer, tools=True)
        self.variables = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if value}
        self.knows_system = self.writes_tools = True
        self.lead = ""
        self._probe()
        self.notes = (DATE_NOTE,) if asks_for_date(self.text) else ()

    def prompt(self, example: Example) -> Rendering:
        row = _ChatRow(self, example)
        text, typed = row.written(len(row.messages) - 1, prompt=True)
        return Rendering(text, typed=typed, notes=tuple(row.notes))

    def _conversation(self, example: Example) -> Rendering:
        return _ChatRow(self, example).rendering()

    def _probe(self) -> None:
        """Finds the template's end of turn, and whether it takes a system's text, on a short conversation.

        Raises:
            ModelError: the template raises, or loses or doubles a text.
        """
        asked, answered = Message("user", _QUESTION), Message("assistant", _ANSWER)
        row = Example("probe", "", (asked, answered))
        try:
            probe = _ChatRow(self, row)
            text, whole = probe.written(1, prompt=True)[0], probe.written(2)[0]
        except RowProblem as error:
            raise broken_template(got=brief(error.__cause__ or error)) from error
        for found, wanted in ((text, _QUESTION), (whole, _QUESTION), (whole, _ANSWER)):
            if (count := found.count(wanted)) != 1:
                raise broken_template(expected="a text with the message in it once", got=f"one with it {count} times")
        added = {str(token.content) for token in self.tokenizer.added_tokens_decoder.values()}
        written = {each for each in added if each in whole and "think" not in each}
        self.control = ControlTokens({*control_strings(self.tokenizer), *written})
        behind = self.control.spans(whole, whole.index(_ANSWER) + len(_ANSWER))
        self.end = whole[slice(*behind[0])] if behind else self.tokenizer.eos_token
        rendering = self.render(row)
        if rendering.turns:
            piece = rendering.text[rendering.turns[0].start : whole.index(_ANSWER)]
            self.lead = piece if self.control.any_in([piece]) else ""
        else:
            raise broken_template(expected="a prompt with which the whole row begins", got=rendering.masked[0][1])
        self.knows_system = self._writes(
            dataclasses.replace(row, messages=(Message("system", _SYSTEM), asked, answered))
        )
        tool = {"type": "function", "function": {"name": _TOOL, "description": _TOOL, "parameters": {"type": "object"}}}
        self.writes_tools = self._writes(dataclasses.replace(row, tools=(tool,)))

    def _writes(self, row: Example) -> bool:
        """Whether rows like this one, with a system's text or with tools, are written with them and can be trained."""
        wanted = _TOOL if row.tools else _SYSTEM
        try:
            rendering = self.render(row)
        except RowProblem:
            return False
        return bool(rendering.turns) and wanted in rendering.text


class _ChatRow:
    """One row and its template; each part of the conversation is rendered when it is asked for."""

    def __init__(self, template: ChatTemplate, example: Example) -> None:
        self.template, self.example = template, example
        self.notes: list[str] = []
        numbered = list(enumerate(example.messages))
        if not template.knows_system and any(message.role == "system" for message in example.messages):
            numbered = _without_system(numbered)
            self.notes.append(SYSTEM_NOTE)
        self.numbers = [number for number, _ in numbered]
        self.messages = [message for _, message in numbered]
        self.text = template.text_with_tools if example.tools else template.text
        self.values = [chat_message(message) for message in self.messages]
        self.tools = [dict(tool) for tool in example.tools]
        self.variables: dict[str, Any] = dict(template.variables)
        if "enable_thinking" in self.text:
            thinks = any(message.thinking or "</think>" in message.content for message in self.messages)
            self.variables["enable_thinking"] = thinks
            self.notes += [] if thinks else [THINKING_NOTE]
        self.has_typed = template.control.any_in(row_texts(example))
        if self.has_typed and any(PRIVATE.search(text) for text in row_texts(example)):
            raise RowProblem("it holds private-use characters beside the string of a control token")
        self._marks: list[Span] = []

    def written(self, count: int, *, prompt: bool = False) -> tuple[str, tuple[Span, ...]]:
        """Renders the first messages; returns the text and where in it the row's own text reads like a control token.

        Raises:
            RowProblem: the template raises.
        """
        text, self._marks = self._render(self.values[:count], self.tools, prompt)
        if not self.has_typed:
            return text, ()
        marked = self.template.control.marked
        values = [_mapped(value, marked) for value in self.values[:count]]
        again, typed = self.template.control.unmarked(self._render(values, _mapped(self.tools, marked), prompt)[0])
        if again != text:
            raise RowProblem("the chat template takes apart the string of a control token that it holds")
        return text, typed

    def _render(self, values: Sequence[Mapping[str, Any]], tools: Any, prompt: bool) -> tuple[str, list[Span]]:
        try:
            return render_chat(self.text, values, tools=tools, generation_prompt=prompt, variables=self.variables)
        except Exception as error:  # a template is a program that came with the model: it may raise anything
            raise RowProblem(f"the chat template refuses it ({brief(error)})") from error

    def rendering(self) -> Rendering:
        """Renders the row and finds the turns that can be trained.

        Raises:
            RowProblem: the template can't write the row at all.
        """
        last = len(self.messages) - 1
        text, typed = self.written(last + 1)
        marks = self._marks
        turns, masked = [], []
        for number, message in enumerate(self.messages):
            if message.role != "assistant" or not message.learned:
                continue
            try:
                upto = (text, typed) if number == last else self.written(number + 1)
                start, piece = self._piece(number, *upto)
                if number == last:  # nothing is written behind the last end of turn
                    text = text[:start] + piece
                elif not text.startswith(piece, start) or text[:start] != upto[0][:start]:
                    raise RowProblem(REWRITTEN)
                end = start + len(piece)
                if has_marks(self.text):
                    start = _marked_start(marks, start, end)
                turns.append(Turn(self.numbers[number], start, end))
            except RowProblem as problem:
                masked.append((self.numbers[number], str(problem)))
        if self.tools and not self.template.writes_tools:
            self.notes.append(TOOLS_NOTE)
        typed = tuple(span for span in typed if span[1] <= len(text))
        return Rendering(text, tuple(turns), tuple(masked), typed, notes=tuple(self.notes))

    def _piece(self, number: int, upto: str, typed: Sequence[Span]) -> tuple[int, str]:
        """Returns where a turn begins, and what the model has to write from there, its end of turn included.

        Args:
            number: the turn's place in the messages.
            upto: the conversation up to this turn.
            typed: what in it reads like a control token.

        Raises:
            RowProblem: the turn can't be trained.
        """
        before = self.written(number, prompt=True)[0]
        if not upto.startswith(before):
            raise RowProblem(NO_PREFIX)
        message, start = self.messages[number], len(before)
        end = self._end(upto, start, typed, bool(message.tool_calls))
        if end is None and number < len(self.messages) - 1:
            raise RowProblem(NO_END)
        piece = upto[start:end] if end is not None else upto[start:].rstrip() + self.template.tokenizer.eos_token
        written = "".join(piece.split())
        if "".join(message.content.split()) not in written:
            raise RowProblem(NOT_WRITTEN)
        if any(str(call.get("name", "")) not in piece for call in message.tool_calls):
            raise RowProblem(NO_CALLS)
        if "".join(message.thinking.split()) not in written:
            self.notes.append(THOUGHTS_NOTE)
        return start, piece

    def _end(self, upto: str, place: int, typed: Sequence[Span], calls: bool) -> int | None:
        """Returns where the end of turn ends: a control token with nothing behind it but others and white space."""
        tail: list[Span] = []
        rest = len(upto)
        for start, end in reversed(self.template.control.spans(upto, place, typed=typed)):
            if upto[end:rest].strip():
                break
            tail.insert(0, (start, end))
            rest = start
        if not tail:
            return None
        for start, end in tail:
            if upto[start:end] == self.template.end:
                return end
        return tail[-1 if calls else 0][1]


def _without_system(numbered: Sequence[tuple[int, Message]]) -> list[tuple[int, Message]]:
    """Puts a system's texts before the user's next one."""
    found: list[tuple[int, Message]] = []
    waiting: list[str] = []
    for number, message in numbered:
        if message.role == "system":
            waiting.append(message.content)
            continue
        if message.role == "user" and waiting:
            message = dataclasses.replace(message, content="\n\n".join([*waiting, message.content]))
            waiting = []
        found.append((number, message))
    if waiting:
        raise RowProblem("its system's text comes after the last user's, which the chat template can't write")
    return found


def _marked_start(marks: Sequence[Span], start: int, end: int) -> int:
    for place, stop in marks:
        if start <= place < end and stop > place:
            return place
    raise RowProblem(NOT_MARKED)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: item if key == "role" else _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value


def broken_template(**found: str) -> ModelError:
    """The error for a chat template that can't be used."""
    return ModelError(
        "this model's chat template does not work",
        **found,
        next_step="Set data.template=plain and evaluation.chat_baseline=false.",
    )
