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
from qlora_helpers.data.conversations import ROLE_NAMES, as_turns, chat_keys, parsed
from qlora_helpers.data.placeholders import Filled
from qlora_helpers.data.refusals import refuse_broken_turns, refuse_marked_answers, refuse_single_turns
from qlora_helpers.data.rows import listed
from qlora_helpers.data.transcripts import MARKUP, style_of

CHATS = ("messages", "conversations", "conversation", "chat", "dialog", "turns")
TEXTS = ("text", "content", "document", "markdown", "passage")
IDS = ("id", "_id", "idx", "index", "uuid", "row_id", "split", "__index_level_0__", "unnamed: 0", "")
SYSTEMS = ("system", "system_prompt", "system_message", "systeminstruction", "system_instruction")
LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "emotion", "topic")
ANSWERS = (
    "summary",
    "highlights",
    "answer",
    "response",
    "completion",
    "output",
    "target",
    "translation",
    "reply",
    *LABELS,
)
PREFERRED, REJECTED = "chosen", "rejected"
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
        ("completion", "response", "output", "target", "answer", "assistant", PREFERRED),
    ),
    "question_answer": (("question",), ("answer", "answers", "response", PREFERRED)),
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
    if config.format == "auto" and form.name == "text" and (marks := _markup(columns[form.columns["text"]])):
        notes.append(
            f"{name}: its texts hold marks of conversations, such as {marks!r}; as documents they are learned as they are, the "
            "questions too, and the marks as plain text; data.format=transcript reads turns where marks and turns make up a text"
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
    if asked != "text":
        refuse_broken_turns(name, columns, {column for form in found for column in form.needed} or set(columns))
    if asked != "auto":
        found = [form for form in found if form.name == asked]
        if not found and asked == "text" and config.column is None:
            found = [Form("text", {"text": column}) for column in columns if column.lower() in TEXTS][:1]
    if len(found) == 1:
        if asked == "auto" and found[0].name == "text":
            refuse_single_turns(name, columns)
        elif asked == "auto":
            refuse_marked_answers(name, columns, found[0].needed, found[0].name)
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
    left_out = (*IDS, REJECTED) if PREFERRED in lower else IDS
    usable = [column for column in columns if column.strip().lower() not in left_out and column not in kinds]
    if config.column is not None:
        column = config.column
        chat = _chat_form(column, columns, lower) or _transcript_form(column, columns, config.format)
        return [chat or Form("text", {"text": column})]
    found = [_dialogue(columns, config)] if {config.dialogue_column, config.summary_column} <= set(columns) else []
    pairs = [form for name, (asked, answered) in PAIRS.items() if (form := _pair(name, asked, answered, lower))]
    pairs = [form for form in pairs if form.columns["answer"].lower() != PREFERRED or not _is_whole(form, columns)]
    if any(form.name == "alpaca" for form in pairs):
        pairs = [form for form in pairs if form.name == "alpaca"]  # its `input` and `output` are no pair of their own
    taken = {column for form in pairs for column in form.needed}
    chats = {column: form for column in usable if column not in taken and (form := _chat_form(column, columns, lower))}
    found += [*chats.values(), *pairs]
    text = next((lower[name] for name in TEXTS if name in lower and lower[name] in usable), None)
    if not found or config.format == "transcript":
        written = [form for column in usable if (form := _transcript_form(column, columns, config.format))]
        found += written if len(written) == 1 else []
    beside = [column for column in usable if column != text and column.strip().lower() not in BESIDE_TEXT]
    if text and not found and (len(usable) == 1 or len(beside) != 1):
        found.append(Form("text", {"text": text}))
    elif text and not found:
        is_answer = beside[0].strip().lower() in ANSWERS
        found += [] if is_answer else [Form("text", {"text": text})]
        found.append(Form("columns", {"prompt": text, "answer": beside[0]}))
    if not found and len(usable) == 2 and all(map(columns.get, usable)):
        found.append(Form("columns", {"prompt": usable[0], "answer": usable[1]}))
    is_answer_alone = usable == [lower.get(PREFERRED)] and REJECTED in lower
    if not found and len(usable) == 1 and not kinds and not is_answer_alone and not _holds_lists(columns[usable[0]]):
        found.append(Form("text", {"text": usable[0]}))
    return found


def _holds_lists(values: Sequence[object]) -> bool:
    """Whether a column holds lists, which may be turns of nobody knows whom."""
    return any(isinstance(parsed(value), list) for value in values)


def _chat_form(column: str, columns: Mapping[str, Sequence[object]], lower: Mapping[str, str]) -> Form | None:
    keys = next((keys for value in columns.get(column, ()) if (keys := chat_keys(value))), None)
    if keys is None:
        return None
    more = _system(lower) | ({"tools": lower["tools"]} if "tools" in lower else {})
    return Form("messages" if keys[0] == "role" else "conversations", {"messages": column, **more})


def _transcript_form(column: str, columns: Mapping[str, Sequence[object]], asked: str) -> Form | None:
    """Returns the form of texts that are conversations with marks, unless they are to be something else."""
    texts = [value for value in columns.get(column, ()) if isinstance(value, str)]
    if asked not in ("auto", "transcript") or not texts or style_of(texts) is None:
        return None
    return Form("transcript", {"messages": column})


def _markup(values: Sequence[object]) -> str:
    """Returns the first mark of a conversation in a column's texts; empty without one."""
    return next(
        (found[0].strip() for value in values if isinstance(value, str) and (found := MARKUP.search(value))), ""
    )


def _pair(form: str, asked: Sequence[str], answered: Sequence[str], lower: Mapping[str, str]) -> Form | None:
    prompt = next((lower[name] for name in asked if name in lower), None)
    answer = next((lower[name] for name in answered if name in lower), None)
    if prompt is None or answer is None:
        return None
    context = next((lower[name] for name in CONTEXTS if name in lower), None)
    more = _system(lower)
    if form == "alpaca" and ("input" in lower or context):
        more["input"] = lower.get("input", context or "")
    elif form == "question_answer" and context:
        more["input"] = context  # the text that the answer depends on
    return Form(form, {"prompt": prompt, "answer": answer, **more})


def _is_whole(form: Form, columns: Mapping[str, Sequence[object]]) -> bool:
    """Whether the answers are whole conversations, the question among them."""
    for value in columns.get(form.columns["answer"], ()):
        if keys := chat_keys(value):
            first = as_turns(value)[0].get(keys[0])
            return ROLE_NAMES.get(str(first).strip().lower()) != "assistant"
    return False


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
    lists = [column for column in usable if _holds_lists(columns[column])]
    if lists and len(usable) == 1 and asked == "auto":
        return DataError(
            f"the column {lists[0]!r} of {name} holds lists without roles",
            expected="turns such as {'role': 'user', 'content': ...}, which say who speaks",
            next_step=f"Write who speaks; or take each list as a document: `--set data.column={shlex.quote(lists[0])}`.",
        )
    template = f"`{_proposed(usable)}`".replace("\n", " ")
    problem = f"the columns of {name} are of no known form" if asked == "auto" else f"{name} is not of the form {asked}"
    return DataError(
        problem,
        expected="messages, conversations, instruction and output, prompt and completion, question and answer, or two columns",
        got=f"the columns {listed(columns)}",
        next_step=f"Say what is asked and what is answered, such as {template}, or name the column of messages or documents: "
        "`--set data.column=NAME`.",
    )


def _proposed(usable: Sequence[str]) -> str:
    """Returns settings that ask with all columns but one, and answer with the one that is called so, else the last."""
    named = [column for column in usable if column.strip().lower() in (*ANSWERS, "answers", PREFERRED)]
    answer = (named or list(usable[-1:]) or ["answer"])[0]
    asked = [column for column in usable if column not in (answer, REJECTED)][:4] or ["question"]
    prompt = "\\n\\n".join(f"{{{column}}}" for column in asked)
    return f"--set data.prompt='{prompt}' --set data.answer='{{{answer}}}'"
