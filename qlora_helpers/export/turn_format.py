"""A chat template taken apart into the text around each turn, which other template languages can write too.

The parts are found by rendering probes, never by reading the template, and they count only where they write ten conversations
exactly as the template does. A template that does more, such as to put a system's text into the last question, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qlora_helpers.base.errors import ModelError

Messages = Sequence[Mapping[str, str]]
Render = Callable[[Messages], str]
INSTEAD = "Use --to gguf: llama.cpp's server reads the chat template that the file holds; --to vllm takes it too."
TURN, GO_ON = "\n\n", "user"

CONVERSATIONS: tuple[Messages, ...] = tuple(
    tuple({"role": role, "content": text} for role, text in each)
    for each in (
        (("user", "Where is my parcel?"),),
        (("user", "Where is it?"), ("assistant", "In Leeds."), ("user", "And when will it come?")),
        (("system", "You are brief."), ("user", "Hello!")),
        (("system", "Answer in\n\ntwo lines."), ("user", "a"), ("assistant", "b"), ("user", "c")),
        (
            ("user", 'Quote "this" and `that`, {{ .Content }} and {% if %}'),
            ("assistant", "<b>&amp;</b>"),
            ("user", "\\n"),
        ),
        (("system", "Sei freundlich 🎂."), ("user", "Grüße, 你好"), ("assistant", "مرحبا"), ("user", "Привет")),
        (("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"), ("user", "five")),
        (("user", "def f(x):\n    return x\n\n# end"), ("assistant", "1. a\n2. b"), ("user", "3\n---\n4")),
        (("system", "s"), ("user", "u" * 300)),
        (
            ("system", "Be kind; end with 'ok'."),
            ("user", "1"),
            ("assistant", "2"),
            ("user", "3"),
            ("assistant", "4"),
            ("user", "5"),
        ),
    )
)
"""Ten conversations that a template's parts are proved on; each ends with a question."""


@dataclass(frozen=True)
class TurnFormat:
    """What a chat template writes around the turns of a conversation that begins with a question or a system's message.

    Attributes:
        alone: before a conversation without a system's message.
        system: before and behind a system's message; None where it is written before the user's first text.
        takes_system: whether it takes one at all.
        user, assistant: before and behind a turn.
        answer: behind the last question, where the model begins to write.
        trims: whether white space at a text's ends is dropped.
    """

    alone: str
    system: tuple[str, str] | None
    takes_system: bool
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    trims: bool

    def render(self, messages: Messages) -> str:
        """Writes a conversation that ends with a question."""
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        pieces = [] if system else [self.alone]
        for number, message in enumerate(messages):
            text = message["content"]
            if message["role"] == "system":
                pieces += [self.system[0], text, self.system[1]] if self.system else [self.alone]
                continue
            before, behind = self.user if message["role"] == "user" else self.assistant
            joined = f"{system}{TURN}" if system and not self.system and number == 1 else ""
            pieces += [before, joined, text, behind]
        return "".join([*pieces, self.answer])


def turn_format(render: Render, end: str) -> TurnFormat:
    """Takes a chat template apart and proves the parts on `CONVERSATIONS`.

    Args:
        render: writes a conversation up to where the model begins to write.
        end: the string that ends a turn.

    Raises:
        ModelError: the template does more than stand around turns.
    """
    found = _parts(render, end)
    for messages in CONVERSATIONS:
        if messages[0]["role"] == "system" and not found.takes_system:
            continue
        if _tried(render, messages) != found.render(messages):
            raise _refused(f"it does more than stand around turns, as with {len(messages)} messages")
    return found


def _parts(render: Render, end: str) -> TurnFormat:
    first, answer, second, system = "qfirstq", "qanswerq", "qsecondq", "qsystemq"
    asked = {"role": "user", "content": first}
    turns = [asked, {"role": "assistant", "content": answer}, {"role": "user", "content": second}]
    opening, between, again, closing = _around(_tried(render, turns), first, answer, second)
    cut = _behind_end(between, end)
    behind_user = between[:cut] if cut and closing.startswith(between[:cut]) else _common(between, closing)
    cut = _behind_end(again, end)
    before_user = again[cut:] if cut and opening.endswith(again[cut:]) else _common(opening[::-1], again[::-1])[::-1]
    alone = opening[: len(opening) - len(before_user)]
    padded = _tried(render, [{"role": "user", "content": f"  {first}\n "}])
    parts = {
        "alone": alone,
        "user": (before_user, behind_user),
        "assistant": (between[len(behind_user) :], again[: len(again) - len(before_user)]),
        "answer": closing[len(behind_user) :],
        "trims": f"  {first}\n " not in padded,
    }
    try:
        said = render([{"role": "system", "content": system}, asked])
        before, behind, _ = _around(said, system, first)
    except Exception:  # the template refuses a system's message
        return TurnFormat(system=None, takes_system=False, **parts)  # type: ignore[arg-type]
    if before == opening and behind == TURN:
        return TurnFormat(system=None, takes_system=True, **parts)  # type: ignore[arg-type]
    if not behind.endswith(before_user):
        raise _refused("it writes a user's text in another way behind a system's message")
    around = (before, behind[: len(behind) - len(before_user)])
    return TurnFormat(system=around, takes_system=True, **parts)  # type: ignore[arg-type]


def _tried(render: Render, messages: Messages) -> str:
    try:
        return render(messages)
    except Exception as error:  # a template is a program that came with the model: it may raise anything
        raise _refused(f"it raises {type(error).__name__}") from error


def _around(text: str, *contents: str) -> list[str]:
    """Returns the text before, between and behind texts, each of which must occur once and in this order."""
    pieces = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found or content in text:
            raise _refused("it does not write each text once")
        pieces.append(before)
    return [*pieces, text]


def _behind_end(text: str, end: str) -> int:
    """Returns the place behind the end of turn and its line ends; 0 where there is none."""
    place = text.find(end) + len(end) if end and end in text else 0
    while place and text[place : place + 1] == "\n":
        place += 1
    return place


def _common(one: str, other: str) -> str:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return one[:count]


def _refused(what: str) -> ModelError:
    return ModelError(f"this chat template can't be written in Ollama's template language: {what}", next_step=INSTEAD)


def go_template(found: TurnFormat, *, begin: str = "") -> str:
    """Writes the parts as a Go `text/template`, as Ollama fills it: `.System` and `.Messages` with `.Role` and `.Content`.

    Args:
        found: the parts.
        begin: the begin-of-text token's string, which Ollama's tokenizer adds and the template must not.
    """
    alone = found.alone.removeprefix(begin)
    lines = []
    if found.system:
        lines.append(f"{{{{- if not .System }}}}{_go(alone)}{{{{ end }}}}" if alone else "")
    else:
        lines.append(f"{{{{- {_quoted(alone)} }}}}" if alone else "")
    user, assistant = found.user, found.assistant
    joined = ""
    if found.takes_system and not found.system:
        joined = f"{{{{ if and $.System (eq $number 1) }}}}{{{{ $.System }}}}{_go(TURN)}{{{{ end }}}}"
    content = "{{ $message.Content }}"
    lines += [
        "{{- range $number, $message := .Messages }}",
        f'{{{{- if eq $message.Role "user" }}}}{_go(user[0])}{joined}{content}{_go(user[1])}',
        f'{{{{- else if eq $message.Role "assistant" }}}}{_go(assistant[0])}{content}{_go(assistant[1])}',
    ]
    if found.system:
        before = found.system[0].removeprefix(begin)
        lines.append(f'{{{{- else if eq $message.Role "system" }}}}{_go(before)}{content}{_go(found.system[1])}')
    lines += ["{{- end }}", "{{- end }}"]
    return "\n".join(line for line in lines if line) + _go(found.answer)


def _go(text: str) -> str:
    return f"{{{{ {_quoted(text)} }}}}" if text else ""


def _quoted(text: str) -> str:
    """A text as a Go string; JSON's escapes are among Go's."""
    return json.dumps(text, ensure_ascii=False)
