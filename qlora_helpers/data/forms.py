"""Recognises what the rows of a source are by their columns: messages, conversations, Alpaca, pairs of columns, documents.

`recognised` says what it found and why, or refuses with the settings to choose from. What a form's columns become is in
`conversion`. Knows nothing of files.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.data.conversations import chat_keys
from qlora_helpers.data.placeholders import Filled
from qlora_helpers.data.rows import listed

CHATS = ("messages", "conversations", "conversation", "chat", "dialog", "turns")
TEXTS = ("text", "content", "document", "markdown", "passage")
IDS = ("id", "_id", "idx", "index", "uuid", "row_id", "split", "__index_level_0__", "unnamed: 0", "")
SYSTEMS = ("system", "system_prompt", "system_message")
ANSWERS = ("summary", "highlights", "answer", "response", "completion", "output", "target", "translation")
CONTEXTS = ("context", "passage", "document", "contexts")
BESIDE_TEXT = (
    "url",
    "title",
    "source",
    "meta",
    "metadata",
    "timestamp",
    "date",
    "lang",
    "language",
    "license",
    "token_count",
)
PAIRS = {  # form -> names of what is asked, and of what is answered
    "alpaca": (("instruction",), ("output", "response", "completion", "answer")),
    "prompt_completion": (
        ("prompt", "input", "query", "source", "user"),
        ("completion", "response", "output", "target", "answer", "assistant"),
    ),
    "question_answer": (("question",), ("answer", "answers", "response")),
}
DEFAULTS = DataConfig()


@dataclass(frozen=True)
class Form:
    """What the rows of a source are.

    Attributes:
        name: one of `data.format`'s choices.
        columns: what a column is for (`messages`, `prompt`, `answer`, `input`, `system`, `tools`, `text`, `reference 1`) -> its
            name in the source.
        prompt, answer: the texts with columns in braces, where the settings give them.
    """

    name: str
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: Filled | None = None
    answer: Filled | None = None

    @property
    def needed(self) -> list[str]:
        """The columns that are read."""
        filled = [column for text in (self.prompt, self.answer) if text for column in text.columns]
        return list(dict.fromkeys([*self.columns.values(), *filled]))

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(f'{part} in {column!r}' for part, column in self.columns.items())})"


def recognised(
    name: str, columns: Mapping[str, Sequence[object]], kinds: Mapping[str, str], config: DataConfig, notes: list[str]
) -> Form:
    """Returns what the rows are, by the settings where they say it.

    Args:
        name: the source's name, for messages.
        columns: each column's first values, without missing ones.
        kinds: columns that can hold no text -> what they hold instead.
        config: `format`, `prompt`, `answer`, the names of columns.
        notes: gets a line on what was recognised, which columns are not used, and how to say otherwise.

    Raises:
        DataError: no form fits or several do, or a column that the settings name is not there; the message names the settings.
    """
    named = _by_settings(name, columns, config)
    form = named or _by_columns(name, columns, kinds, config)
    for column in form.needed:
        if column in kinds:
            raise DataError(
                f"the column {column!r} of {name} holds {kinds[column]}",
                expected="texts, numbers, lists or objects",
                next_step="Write it as text, or name another column.",
            )
    if config.format == "auto" and named is None:
        unused = [column for column in columns if column not in form.needed and column.strip().lower() not in IDS]
        rest = f"; not used: {listed(unused)}" if unused else ""
        notes.append(f"{name}: read as {form}{rest}; data.format, data.prompt and data.answer choose otherwise")
    return form


def _by_settings(name: str, columns: Mapping[str, Sequence[object]], config: DataConfig) -> Form | None:
    if config.prompt or config.answer:
        if not (config.prompt and config.answer) or config.format not in ("auto", "columns"):
            other = f"data.format={config.format}" if config.prompt and config.answer else "one of them alone"
            raise DataError(
                "data.prompt and data.answer belong together, with data.format=columns",
                got=other,
                next_step="Set both.",
            )
        prompt, answer = Filled("data.prompt", config.prompt), Filled("data.answer", config.answer)
        for text in (prompt, answer):
            text.check(name, columns)
        return Form("columns", {}, prompt, answer)
    names = (config.dialogue_column, config.summary_column)
    own = names != (DEFAULTS.dialogue_column, DEFAULTS.summary_column)
    if config.format == "dialogue" or (config.format == "auto" and own):
        _need(name, columns, {"dialogue_column": names[0], "summary_column": names[1]})
        return _dialogue(columns, config)
    if config.column is not None:
        _need(name, columns, {"column": config.column})
    return None


def _by_columns(
    name: str, columns: Mapping[str, Sequence[object]], kinds: Mapping[str, str], config: DataConfig
) -> Form:
    found = _candidates(columns, kinds, config)
    asked = config.format
    if asked != "auto":
        found = [form for form in found if form.name == asked]
        if not found and asked == "text" and config.column is None:
            found = [Form("text", {"text": column}) for column in columns if column.lower() in TEXTS][:1]
    if len(found) == 1:
        return found[0]
    if not found:
        raise _unknown(name, columns, asked)
    ways = " or ".join(
        f"`--set data.format={form.name}`"
        if len({each.name for each in found}) == len(found)
        else f"`--set data.column={shlex.quote(form.columns.get('messages', form.columns.get('text', 'NAME')))}`"
        for form in found
    )
    raise DataError(
        f"{name} can be read in several ways", got="; ".join(map(str, found)), next_step=f"Choose one: {ways}."
    )


def _candidates(columns: Mapping[str, Sequence[object]], kinds: Mapping[str, str], config: DataConfig) -> list[Form]:
    lower = {column.strip().lower(): column for column in reversed(list(columns))}
    usable = [column for column in columns if column.strip().lower() not in IDS and column not in kinds]
    if config.column is not None:
        chat = _chat_form(config.column, columns, lower)
        return [chat or Form("text", {"text": config.column})]
    found = [_dialogue(columns, config)] if {config.dialogue_column, config.summary_column} <= set(columns) else []
    pairs = [form for name, (asked, answered) in PAIRS.items() if (form := _pair(name, asked, answered, lower))]
    if any(form.name == "alpaca" for form in pairs):
        pairs = [form for form in pairs if form.name == "alpaca"]  # its `input` and `output` are no pair of their own
    taken = {column for form in pairs for column in form.needed}
    chats = {column: form for column in usable if column not in taken and (form := _chat_form(column, columns, lower))}
    found += [*chats.values(), *pairs]
    text = next((lower[name] for name in TEXTS if name in lower and lower[name] in usable), None)
    beside = [column for column in usable if column != text and column.strip().lower() not in BESIDE_TEXT]
    if text and not found and (len(usable) == 1 or len(beside) != 1):
        found.append(Form("text", {"text": text}))
    elif text and not found:
        is_answer = beside[0].strip().lower() in ANSWERS
        found += [] if is_answer else [Form("text", {"text": text})]
        found.append(Form("columns", {"prompt": text, "answer": beside[0]}))
    if not found and len(usable) == 2 and all(map(columns.get, usable)):
        found.append(Form("columns", {"prompt": usable[0], "answer": usable[1]}))
    if not found and len(usable) == 1 and not kinds:
        found.append(Form("text", {"text": usable[0]}))
    return found


def _chat_form(column: str, columns: Mapping[str, Sequence[object]], lower: Mapping[str, str]) -> Form | None:
    keys = next((keys for value in columns.get(column, ()) if (keys := chat_keys(value))), None)
    if keys is None:
        return None
    more = _system(lower) | ({"tools": lower["tools"]} if "tools" in lower else {})
    return Form("messages" if keys[0] == "role" else "conversations", {"messages": column, **more})


def _pair(form: str, asked: Sequence[str], answered: Sequence[str], lower: Mapping[str, str]) -> Form | None:
    prompt = next((lower[name] for name in asked if name in lower), None)
    answer = next((lower[name] for name in answered if name in lower), None)
    if prompt is None or answer is None:
        return None
    context = next((lower[name] for name in CONTEXTS if name in lower), None)
    if form == "question_answer" and context:
        return None  # the answers depend on a text that a pair would leave out
    more = _system(lower)
    if form == "alpaca" and ("input" in lower or context):
        more["input"] = lower.get("input", context or "")
    return Form(form, {"prompt": prompt, "answer": answer, **more})


def _system(lower: Mapping[str, str]) -> dict[str, str]:
    return next(({"system": lower[name]} for name in SYSTEMS if name in lower), {})


def _dialogue(columns: Iterable[str], config: DataConfig) -> Form:
    siblings = numbered_siblings(config.summary_column, columns)
    more = {f"reference {number}": column for number, column in enumerate(siblings, start=1)}
    return Form("dialogue", {"prompt": config.dialogue_column, "answer": config.summary_column, **more})


def numbered_siblings(column: str, found: Iterable[str]) -> list[str]:
    """Other columns with the same name but for a number at its end: `summary2` and `summary3` beside `summary1` or `summary`."""
    stem = column.rstrip("0123456789")
    return [name for name in found if name != column and name.startswith(stem) and name[len(stem) :].isdecimal()]


def _need(name: str, columns: Mapping[str, Sequence[object]], wanted: Mapping[str, str]) -> None:
    missing = {setting: column for setting, column in wanted.items() if column not in columns}
    if missing:
        settings = " ".join(f"--set data.{setting}={_likely(column, columns)}" for setting, column in missing.items())
        raise DataError(
            f"{name} has no column {' or '.join(map(repr, missing.values()))}",
            got=f"the columns {listed(columns)}",
            next_step=f"Name the right one: `{settings}`.",
        )


def _likely(column: str, found: Iterable[str]) -> str:
    by_lower = {str(name).lower().strip(): str(name) for name in islice(found, 1000)}
    close = difflib.get_close_matches(column.lower(), by_lower, n=1, cutoff=0.5)
    return shlex.quote(by_lower[close[0]]) if close and by_lower[close[0]].isprintable() else "NAME"


def _unknown(name: str, columns: Mapping[str, Sequence[object]], asked: str) -> DataError:
    usable = [column for column in columns if column.strip().lower() not in IDS and column.isprintable()]
    first, last = (usable[0], usable[-1]) if len(usable) > 1 else ("question", "answer")
    template = f"`--set data.prompt='{{{first}}}' --set data.answer='{{{last}}}'`".replace("\n", " ")
    problem = f"the columns of {name} are of no known form" if asked == "auto" else f"{name} is not of the form {asked}"
    return DataError(
        problem,
        expected="messages, conversations, instruction and output, prompt and completion, question and answer, or two columns",
        got=f"the columns {listed(columns)}",
        next_step=f"Say what is asked and what is answered, such as {template}, or name the column of messages or documents: "
        "`--set data.column=NAME`.",
    )
