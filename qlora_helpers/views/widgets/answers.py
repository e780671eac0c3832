"""A panel to ask two models the same: untuned and tuned answer side by side, as they are written.

Knows no model: it is handed a function that answers, and calls it in a thread of its own, so that the kernel stays free. What
people and models write is escaped and never run.
"""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ipywidgets

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.tables import html_table
from qlora_helpers.base.text import plain
from qlora_helpers.views.widgets.panel import Panel, button, styled, wrong

MODELS = {"base": "untuned", "tuned": "tuned"}
DRAW_EVERY_S = 0.05
OWN = "your own"


class Answer(Protocol):
    """What answers; `workflow.streaming_answers` makes one for a run.

    Called in a thread of the panel's, one call after the other. When a person presses Stop, the iterator's `close` is called after
    the piece in hand, if it has one. A `UserError` that it raises is shown as it is, any other error with its type.
    """

    def __call__(
        self, dialogue: str, *, tuned: bool, temperature: float, top_p: float, max_new_tokens: int
    ) -> Iterator[str]:
        """The answer to a dialogue, in pieces of text as they come.

        Args:
            dialogue: turns, one a line.
            tuned: whether the adapters are on.
            temperature: of the sampling; 0 takes the likeliest token each time.
            top_p: samples from the likeliest tokens that make up this share.
            max_new_tokens: the longest answer, tokens.
        """
        ...


@dataclass(frozen=True)
class Example:
    """A dialogue to pick, and the summary that a person wrote of it, where there is one."""

    name: str
    dialogue: str
    summary: str = ""


@dataclass
class Given:
    """An answer as far as it has come.

    Attributes:
        text: so far.
        state: `waiting`, `writing`, `done`, `stopped` or `failed`.
        seconds: since it was asked for.
    """

    text: str = ""
    state: str = "waiting"
    seconds: float = 0.0


def answer_panel(
    answer: Answer,
    dialogues: Sequence[Any] = (),
    *,
    temperature: float = 0.0,
    top_p: float = 0.9,
    max_new_tokens: int = 80,
) -> AnswerPanel:
    """A panel that asks a function, once as the untuned and once as the tuned model.

    Args:
        answer: what answers; see `Answer`.
        dialogues: to pick from: texts, or objects or mappings with `dialogue` and, where there is one, `summary` and `id`.
        temperature, top_p, max_new_tokens: where the sliders start.
    """
    return AnswerPanel(answer, dialogues, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)


class AnswerPanel(Panel):
    """A dialogue, three sliders, and two answers; arguments as for `answer_panel`.

    Attributes:
        answers: `base` and `tuned`, of the dialogue asked last.
        examples: the dialogues to pick from.
    """

    def __init__(
        self, answer: Answer, dialogues: Sequence[Any] = (), *, temperature: float, top_p: float, max_new_tokens: int
    ) -> None:
        self._answer = answer
        self.examples = tuple(_example(item, number) for number, item in enumerate(dialogues, start=1))
        self.answers: dict[str, Given] = {}
        self._asked = ""
        self._stop, self._thread = threading.Event(), None
        self.box = self._layout(temperature, top_p, max_new_tokens)
        self._draw()

    # what a person does

    @property
    def busy(self) -> bool:
        """Whether an answer is being written."""
        return self._thread is not None and self._thread.is_alive()

    def ask(self) -> None:
        """Asks both models about the dialogue that is shown, and returns at once; does nothing while they answer."""
        if self.busy:
            return
        if not self._dialogue.value.strip():
            self._message.value = wrong("There is nothing to ask about: type a dialogue, one turn a line, or pick one.")
            return
        self._stop.clear()
        self._asked, self._message.value = self._dialogue.value, ""
        self.answers = {name: Given() for name in MODELS}
        settings = {
            "temperature": self._temperature.value,
            "top_p": self._top_p.value,
            "max_new_tokens": self._length.value,
        }
        self._switch(asking=True)
        self._draw()
        self._thread = threading.Thread(target=self._work, args=(settings,), name="answers", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the answer that is being written after its next piece; what is there stays."""
        self._stop.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until both have answered; for code, a person need not.

        Returns:
            Whether they have.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.busy

    # the thread

    def _work(self, settings: dict[str, Any]) -> None:
        try:
            for name, given in self.answers.items():
                if self._stop.is_set():
                    given.state = "stopped"
                else:
                    self._write(name, given, settings)
        except UserError as error:
            self._message.value = wrong(str(error))
        except Exception as error:  # the thread's end: nobody else would hear of it
            self._message.value = wrong(f"{type(error).__name__}: {error}")
        finally:
            for given in self.answers.values():
                if given.state in ("waiting", "writing"):
                    given.state = "failed"
            self._draw()
            self._switch(asking=False)

    def _write(self, name: str, given: Given, settings: dict[str, Any]) -> None:
        started = drawn = time.monotonic()
        pieces = self._answer(self._asked, tuned=name == "tuned", **settings)
        try:
            for piece in pieces:
                given.text, given.state = given.text + piece, "writing"
                given.seconds = time.monotonic() - started
                if self._stop.is_set():
                    break
                if time.monotonic() - drawn > DRAW_EVERY_S:
                    self._draw(name)
                    drawn = time.monotonic()
        finally:
            if hasattr(pieces, "close"):
                pieces.close()
        given.seconds = time.monotonic() - started
        given.state = "stopped" if self._stop.is_set() else "done"
        self._draw(name)

    # what it looks like

    def _layout(self, temperature: float, top_p: float, max_new_tokens: int) -> ipywidgets.VBox:
        wide, label = {"width": "auto"}, {"description_width": "124px"}
        names = [(OWN, -1), *((each.name, index) for index, each in enumerate(self.examples))]
        self._pick = ipywidgets.Dropdown(
            options=names, value=min(0, len(self.examples) - 1), description="dialogue", layout=wide, style=label
        )
        self._dialogue = ipywidgets.Textarea(
            self.examples[0].dialogue if self.examples else "",
            rows=8,
            layout=wide,
            continuous_update=True,
            placeholder="Ann: are we still on for lunch?\nBo: yes! at one, the usual place",
            tooltip="Turns as Name: text, one a line",
        )
        self._temperature = ipywidgets.FloatSlider(
            temperature,
            min=0,
            max=2,
            step=0.05,
            description="temperature",
            tooltip="0 takes the likeliest token each time; more draws more boldly",
            layout=wide,
            style=label,
        )
        self._top_p = ipywidgets.FloatSlider(
            top_p,
            min=0.01,
            max=1,
            step=0.01,
            description="top_p",
            layout=wide,
            style=label,
            tooltip="Draws from the likeliest tokens that make up this share; counts where temperature is above 0",
        )
        self._length = ipywidgets.IntSlider(
            max_new_tokens,
            min=1,
            max=max(256, max_new_tokens),
            description="max_new_tokens",
            tooltip="The longest answer, tokens",
            layout=wide,
            style=label,
        )
        self._ask_button = button("Ask both", "The untuned model answers, then the tuned one", self.ask, "primary")
        self._stop_button = button("Stop", "Ends the answers here", self.stop)
        self._stop_button.disabled = True
        self._message, self._reference = ipywidgets.HTML(), ipywidgets.HTML()
        self._shown = {name: ipywidgets.HTML(layout={"flex": "1 1 380px", "min_width": "0"}) for name in MODELS}
        for each, name in (
            (self._dialogue, "qlora-dialogue"),
            (self._ask_button, "qlora-ask"),
            (self._stop_button, "qlora-stop"),
            (self._pick, "qlora-pick"),
            *((shown, f"qlora-answer-{name}") for name, shown in self._shown.items()),
        ):
            each.add_class(name)
        self._pick.observe(self._on_pick, names="value")
        self._dialogue.observe(self._on_dialogue, names="value")
        left = ipywidgets.VBox([self._pick, self._dialogue], layout={"flex": "2 1 420px", "min_width": "0"})
        buttons = ipywidgets.HBox([self._ask_button, self._stop_button])
        right = ipywidgets.VBox(
            [self._temperature, self._top_p, self._length, buttons, self._message],
            layout={"flex": "1 1 320px", "min_width": "0"},
        )
        top, answers = ipywidgets.HBox([left, right]), ipywidgets.HBox([*self._shown.values()])
        for each in (top, answers):
            each.add_class("qlora-columns")
        panel = ipywidgets.VBox([top, answers, self._reference])
        panel.add_class("qlora-card")
        return styled([panel], "qlora-answers")

    def _on_pick(self, change: dict[str, Any]) -> None:
        if change["new"] >= 0:
            self._dialogue.value = self.examples[change["new"]].dialogue

    def _on_dialogue(self, change: dict[str, Any]) -> None:
        """What is typed over is no longer the dialogue that was picked."""
        if self._pick.value >= 0 and change["new"] != self.examples[self._pick.value].dialogue:
            self._pick.value = -1
        self._draw_reference()

    def _switch(self, *, asking: bool) -> None:
        self._ask_button.disabled, self._stop_button.disabled = asking, not asking

    def _draw(self, *names: str) -> None:
        for name in names or MODELS:
            given = self.answers.get(name)
            text = html.escape(plain(given.text).strip()) if given else ""
            if given and given.text and not text:
                text = '<span class="muted">nothing but white space so far</span>'
            cursor = "▌" if given and given.state == "writing" else ""
            self._shown[name].value = (
                f'<b>{MODELS[name]}</b> <span class="muted">{_state(given)}</span>'
                f'<div class="qlora-text" style="min-height:84px;max-height:260px" '
                f'aria-label="{MODELS[name]} answer" role="log" tabindex="0">{text}{cursor}</div>'
            )
        self._draw_reference()

    def _draw_reference(self) -> None:
        summary = self._summary(self._dialogue.value)
        self._reference.value = (
            f'<div class="muted">what a person wrote</div><div>{html.escape(summary)}</div>' if summary else ""
        )

    def _summary(self, dialogue: str) -> str:
        """The summary of a dialogue that is one of the examples, word for word."""
        return next((each.summary for each in self.examples if each.dialogue == dialogue), "")

    # where there are no widgets

    def _rows(self) -> list[tuple[str, str]]:
        dialogue = self._asked or self._dialogue.value
        rows = [("dialogue", dialogue)] if dialogue else []
        rows += [("reference", self._summary(dialogue))] if self._summary(dialogue) else []
        return rows + [
            (
                MODELS[name],
                f"{given.text.strip()} [{_state(given)}]" if (given := self.answers.get(name)) else "not asked yet",
            )
            for name in MODELS
        ]

    def still_text(self) -> str:
        """Dialogue, reference and the answers so far."""
        return "\n".join(f"{name:<10} {plain(text)}" for name, text in self._rows())

    def still_html(self) -> str:
        """The same as a table."""
        rows = [(name, plain(text)) for name, text in self._rows()]
        return html_table(["", "text"], rows).replace("<td ", '<td valign="top" ').replace("\n", "<br>")


def _example(item: Any, number: int) -> Example:
    if isinstance(item, str):
        return Example(f"{number}: {item.strip().splitlines()[0][:60] if item.strip() else ''}", item)
    get = item.get if isinstance(item, Mapping) else lambda key, other="": getattr(item, key, other)
    if not isinstance(get("dialogue", None), str):
        raise UserError(
            "that is no dialogue", expected="a text, or something with `dialogue` and `summary`", got=repr(item)[:80]
        )
    dialogue = get("dialogue", "")
    return Example(
        f"{get('id', number)}: {dialogue.splitlines()[0][:60] if dialogue else ''}", dialogue, get("summary", "")
    )


def _state(given: Given | None) -> str:
    if given is None:
        return ""
    if given.state == "waiting":
        return "waits for its turn"
    words = {"writing": "is writing", "done": "done", "stopped": "stopped", "failed": "failed"}[given.state]
    return f"{words}, {given.seconds:.1f} s" if given.text else words
