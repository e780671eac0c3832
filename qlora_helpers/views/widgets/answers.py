"""A panel that asks the untuned and the tuned model the same question and shows both answers as they are written.

It knows no model: it is handed a function that answers, which `asking` calls in a thread. What people and models write is escaped
and never executed.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.tables import Table
from qlora_helpers.base.text import plain
from qlora_helpers.data.examples import Example
from qlora_helpers.views.widgets.asking import MODELS, Answer, AnswerProgress, Asking
from qlora_helpers.views.widgets.panel import Panel, add_classes, button, error_html, styled

OWN = "your own"


@dataclass(frozen=True)
class Sample:
    """A dialogue to pick, and the summary that a person wrote of it, if there is one."""

    name: str
    dialogue: str
    summary: str = ""


def answer_panel(
    answer: Answer,
    dialogues: Sequence[Any] = (),
    *,
    temperature: float = 0.0,
    top_p: float = 0.9,
    max_new_tokens: int = 80,
) -> AnswerPanel:
    """Makes a panel that asks a function once as the untuned and once as the tuned model.

    Args:
        answer: the function that answers; see `Answer`.
        dialogues: the dialogues to pick from: texts, rows of the data, or mappings with `dialogue`, `summary` and `id`.
        temperature, top_p, max_new_tokens: where the sliders start.

    Raises:
        UserError: an item of `dialogues` has no dialogue.
    """
    return AnswerPanel(answer, dialogues, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)


class AnswerPanel(Panel):
    """A dialogue, three sliders and two answers; the arguments are those of `answer_panel`.

    Attributes:
        examples: the dialogues to pick from.
    """

    def __init__(
        self, answer: Answer, dialogues: Sequence[Any] = (), *, temperature: float, top_p: float, max_new_tokens: int
    ) -> None:
        self.asking = Asking(answer, changed=self._draw, failed=self._show_error, ended=self._allow_asking)
        self.examples = tuple(_sample(item, number) for number, item in enumerate(dialogues, start=1))
        self._make_controls(temperature, top_p, max_new_tokens)
        self.box = self._layout()
        self._draw(*MODELS)

    # what a person does

    @property
    def answers(self) -> dict[str, AnswerProgress]:
        """The answers `base` and `tuned` to the dialogue asked last."""
        return self.asking.answers

    @property
    def busy(self) -> bool:
        """Whether an answer is being written."""
        return self.asking.busy

    def ask(self) -> None:
        """Asks both models about the shown dialogue and returns at once; does nothing while they answer."""
        if self.busy:
            return
        if not self._dialogue.value.strip():
            self._show_error("There is nothing to ask about. Type a dialogue with one turn per line, or pick one.")
            return
        self._message.value = ""
        settings = {
            "temperature": self._temperature.value,
            "top_p": self._top_p.value,
            "max_new_tokens": self._length.value,
        }
        self._ask_button.disabled, self._stop_button.disabled = True, False
        self.asking.start(self._dialogue.value, settings)

    def stop(self) -> None:
        """Ends the answer that is being written after its next piece and keeps its text."""
        self.asking.stop()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until both models have answered and returns whether they have; meant for code."""
        return self.asking.wait(timeout_s)

    # what it looks like

    def _make_controls(self, temperature: float, top_p: float, max_new_tokens: int) -> None:
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
            tooltip="One turn per line, as Name: text",
        )
        self._temperature = ipywidgets.FloatSlider(
            temperature,
            min=0,
            max=2,
            step=0.05,
            description="temperature",
            tooltip="0 takes the likeliest token each time; a higher value draws unlikely tokens more often",
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
            tooltip="Draws from the likeliest tokens that make up this share; has no effect at temperature 0",
        )
        self._length = ipywidgets.IntSlider(
            max_new_tokens,
            min=1,
            max=max(256, max_new_tokens),
            description="max_new_tokens",
            tooltip="The length of the longest answer, in tokens",
            layout=wide,
            style=label,
        )
        self._message, self._reference = ipywidgets.HTML(), ipywidgets.HTML()
        self._shown = {name: ipywidgets.HTML(layout={"flex": "1 1 380px", "min_width": "0"}) for name in MODELS}
        self._pick.observe(self._on_pick, names="value")
        self._dialogue.observe(self._on_dialogue, names="value")

    def _layout(self) -> ipywidgets.VBox:
        self._ask_button = button("Ask both", "The untuned model answers, then the tuned one", self.ask, "primary")
        self._stop_button = button("Stop", "Ends both answers and keeps their text", self.stop)
        self._stop_button.disabled = True
        for each, name in (
            (self._dialogue, "qlora-dialogue"),
            (self._ask_button, "qlora-ask"),
            (self._stop_button, "qlora-stop"),
            (self._pick, "qlora-pick"),
            *((shown, f"qlora-answer-{name}") for name, shown in self._shown.items()),
        ):
            add_classes(each, name)
        left = ipywidgets.VBox([self._pick, self._dialogue], layout={"flex": "2 1 420px", "min_width": "0"})
        buttons = ipywidgets.HBox([self._ask_button, self._stop_button])
        right = ipywidgets.VBox(
            [self._temperature, self._top_p, self._length, buttons, self._message],
            layout={"flex": "1 1 320px", "min_width": "0"},
        )
        top, answers = ipywidgets.HBox([left, right]), ipywidgets.HBox([*self._shown.values()])
        for each in (top, answers):
            add_classes(each, "qlora-columns")
        panel = ipywidgets.VBox([top, answers, self._reference])
        return styled([add_classes(panel, "qlora-card")], "qlora-answers")

    def _on_pick(self, change: dict[str, Any]) -> None:
        if change["new"] >= 0:
            self._dialogue.value = self.examples[change["new"]].dialogue

    def _on_dialogue(self, change: dict[str, Any]) -> None:
        """Shows `your own` once the picked dialogue has been edited."""
        if self._pick.value >= 0 and change["new"] != self.examples[self._pick.value].dialogue:
            self._pick.value = -1
        self._draw_reference()

    def _show_error(self, message: str) -> None:
        self._message.value = error_html(message)

    def _allow_asking(self) -> None:
        self._ask_button.disabled, self._stop_button.disabled = False, True

    def _draw(self, *names: str) -> None:
        for name in names:
            progress = self.answers.get(name)
            text = html.escape(plain(progress.text).strip()) if progress else ""
            if progress and progress.text and not text:
                text = '<span class="muted">only white space so far</span>'
            cursor = "▌" if progress and progress.state == "writing" else ""
            self._shown[name].value = (
                f'<b>{MODELS[name]}</b> <span class="muted">{progress.describe() if progress else ""}</span>'
                f'<div class="qlora-text qlora-answer" '
                f'aria-label="{MODELS[name]} answer" role="log" tabindex="0">{text}{cursor}</div>'
            )
        self._draw_reference()

    def _draw_reference(self) -> None:
        summary = self._summary(self._dialogue.value)
        self._reference.value = (
            f'<div class="muted">summary that a person wrote</div><div>{html.escape(summary)}</div>' if summary else ""
        )

    def _summary(self, dialogue: str) -> str:
        """Returns the summary of a dialogue that equals one of the examples."""
        return next((each.summary for each in self.examples if each.dialogue == dialogue), "")

    # where there are no widgets

    def _rows(self) -> list[tuple[str, str]]:
        dialogue = self.asking.dialogue or self._dialogue.value
        rows = [("dialogue", dialogue)] if dialogue else []
        rows += [("reference", self._summary(dialogue))] if self._summary(dialogue) else []
        return rows + [
            (
                MODELS[name],
                f"{progress.text.strip()} [{progress.describe()}]"
                if (progress := self.answers.get(name))
                else "not asked yet",
            )
            for name in MODELS
        ]

    def still_text(self) -> str:
        """Returns the dialogue, the reference and the answers so far."""
        return "\n".join(f"{name:<10} {plain(text)}" for name, text in self._rows())

    def still_html(self) -> str:
        """Returns the same as a table."""
        return Table(["model", "text"], [(name, plain(text)) for name, text in self._rows()])._repr_html_()


def _sample(item: Any, number: int) -> Sample:
    if isinstance(item, str):
        return Sample(f"{number}: {item.strip().splitlines()[0][:60] if item.strip() else ''}", item)
    values = item if isinstance(item, Mapping) else vars(item) if hasattr(item, "__dict__") else {}
    if isinstance(item, Example):
        values = {"id": item.id, "dialogue": item.prompt, "summary": item.answer}
    dialogue = values.get("dialogue")
    if not isinstance(dialogue, str):
        raise UserError(
            "this is not a dialogue",
            expected="a text, a row of the data, or an object with `dialogue` and optionally `summary`",
            got=repr(item)[:80],
        )
    first = dialogue.splitlines()[0][:60] if dialogue else ""
    return Sample(f"{values.get('id', number)}: {first}", dialogue, values.get("summary", ""))
