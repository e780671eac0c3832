"""The controls of the answer panel and their places; what they do is in `answers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets

from qlora_helpers.views.widgets.asking import SIDES
from qlora_helpers.views.widgets.panel import add_classes, button, styled

OWN = "your own"
LONGEST = 1024  # tokens, where the slider ends unless the panel begins with more
SEEDS = 2**31 - 1
PLACEHOLDER = "Ann: are we still on for lunch?\nBo: yes! at one, the usual place"
# The kernel gets no keys: Ctrl+Enter presses the button in the page. A style sheet's `onload` runs where a script would not.
# What was typed is sent first, as one message: sent key by key, the last keys would wait until the kernel has taken those before
# them, and the button would overtake them.
KEYS = """<style onload="
const panel = this.closest('.qlora-answers');
if (panel && !panel.dataset.keys) {
  panel.dataset.keys = 'on';
  panel.addEventListener('keydown', event => {
    if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault(); event.stopPropagation();
    const ask = panel.querySelector('button.qlora-ask');
    if (!ask || ask.disabled) return;
    if (event.target.tagName === 'TEXTAREA') event.target.dispatchEvent(new Event('change', {bubbles: true}));
    ask.click();
  }, true);
}">.qlora-answers { --qlora-keys: on; }</style>"""
WIDE = {"width": "auto"}
LOOK = {"layout": WIDE, "style": {"description_width": "124px"}}


class Controls:
    """The widgets of an answer panel.

    Args:
        samples: names of the rows to pick.
        models: who can be asked: the name, and what people read.
        values: where `temperature`, `top_p`, `max_new_tokens` and `seed` start.
        can_vote: whether there are buttons to vote.
    """

    def __init__(
        self, samples: Sequence[str], models: Mapping[str, str], values: Mapping[str, Any], *, can_vote: bool
    ) -> None:
        self.pick = ipywidgets.Dropdown(
            options=[(OWN, -1), *((name, index) for index, name in enumerate(samples))],
            value=min(0, len(samples) - 1),
            description="row of the data",
            **LOOK,
        )
        self.question = ipywidgets.Textarea(
            rows=7,
            layout=WIDE,
            continuous_update=False,
            placeholder=PLACEHOLDER,
            tooltip="The question; Ctrl+Enter asks",
        )
        self.models = _model_choices(models)
        self.temperature, self.top_p, self.length, self.seed = _answer_settings(values)
        self.blind = ipywidgets.Checkbox(
            False,
            description="hide who answers until I vote",
            tooltip="The two models change sides by chance, and their names are shown after the vote",
            indent=False,
            layout=WIDE,
        )
        self.message, self.reference, self.votes = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self.shown = {side: ipywidgets.HTML(layout={"flex": "1 1 380px", "min_width": "0"}) for side in SIDES}
        self.can_vote = can_vote

    def settings(self) -> dict[str, Any]:
        """Returns how an answer is asked for, as the controls say."""
        return {
            "temperature": self.temperature.value,
            "top_p": self.top_p.value,
            "max_new_tokens": self.length.value,
            "seed": self.seed.value,
        }

    def lay_out(self, actions: Mapping[str, Callable[[], Any]]) -> ipywidgets.VBox:
        """Puts everything in its place.

        Args:
            actions: what `ask`, `again`, `stop`, `new`, `left`, `tie` and `right` do.
        """
        self.ask = button("Ask both", "Both models answer, one after the other (Ctrl+Enter)", actions["ask"], "primary")
        self.again = button(
            "Ask again", "The last question, with the models and settings as they are now", actions["again"]
        )
        self.stop = button("Stop", "Ends both answers and keeps their text", actions["stop"])
        self.new = button("New conversation", "Forgets the questions and answers so far", actions["new"])
        self.vote = {
            "left": button("Left is better", "Keeps a vote for the left answer in the run's folder", actions["left"]),
            "tie": button("As good", "Keeps a vote for neither", actions["tie"]),
            "right": button(
                "Right is better", "Keeps a vote for the right answer in the run's folder", actions["right"]
            ),
        }
        for name, widget in (
            ("dialogue", self.question),
            ("ask", self.ask),
            ("again", self.again),
            ("stop", self.stop),
            ("new", self.new),
            ("pick", self.pick),
            ("votes", self.votes),
            *((f"answer-{side}", shown) for side, shown in self.shown.items()),
            *((f"model-{side}", model) for side, model in self.models.items()),
            *((f"vote-{name}", each) for name, each in self.vote.items()),
        ):
            add_classes(widget, f"qlora-{name}")
        buttons = add_classes(ipywidgets.HBox([self.ask, self.again, self.stop, self.new]), "qlora-buttons")
        keys = ipywidgets.HTML(KEYS, layout={"display": "none"})
        left = ipywidgets.VBox(
            [self.pick, self.question, buttons, self.message, keys], layout={"flex": "2 1 420px", "min_width": "0"}
        )
        sliders = [*self.models.values(), self.temperature, self.top_p, self.length, self.seed]
        right = ipywidgets.VBox(
            [*sliders, *([self.blind] if self.can_vote else [])], layout={"flex": "1 1 320px", "min_width": "0"}
        )
        top, answers = ipywidgets.HBox([left, right]), ipywidgets.HBox([*self.shown.values()])
        for each in (top, answers):
            add_classes(each, "qlora-columns")
        voting = add_classes(ipywidgets.HBox([*self.vote.values(), self.votes]), "qlora-buttons")
        panel = ipywidgets.VBox([top, answers, *([voting] if self.can_vote else []), self.reference])
        return styled([add_classes(panel, "qlora-card")], "qlora-answers")

    def enable(self, *, busy: bool, asked: bool, votable: bool) -> None:
        """Enables what can be done now."""
        self.ask.disabled = busy
        self.again.disabled = self.new.disabled = busy or not asked
        self.stop.disabled = not busy
        for each in self.vote.values():
            each.disabled = busy or not votable


def _model_choices(models: Mapping[str, str]) -> dict[str, ipywidgets.Dropdown]:
    """Makes a choice of who answers for each side; they begin with the first two."""
    names = list(models)
    return {
        side: ipywidgets.Dropdown(
            options=[(text, name) for name, text in models.items()],
            value=names[min(number, len(names) - 1)],
            description=f"model on the {side}",
            **LOOK,
        )
        for number, side in enumerate(SIDES)
    }


def _answer_settings(values: Mapping[str, Any]) -> tuple[ipywidgets.Widget, ...]:
    """Makes the controls of how an answer is drawn: temperature, top_p, the longest answer and the seed."""
    longest = max(LONGEST, values["max_new_tokens"])
    greedy = "has no effect at temperature 0"
    wanted: list[tuple[Any, str, tuple[float, float], dict[str, float], str]] = [
        (
            ipywidgets.FloatSlider,
            "temperature",
            (0, 2),
            {"step": 0.05},
            "0 takes the likeliest token each time; a higher value draws unlikely tokens more often",
        ),
        (
            ipywidgets.FloatSlider,
            "top_p",
            (0.01, 1),
            {"step": 0.01},
            f"Draws from the likeliest tokens that make up this share; {greedy}",
        ),
        (ipywidgets.IntSlider, "max_new_tokens", (1, longest), {}, "The length of the longest answer, in tokens"),
        (ipywidgets.BoundedIntText, "seed", (0, SEEDS), {}, f"Another seed draws other tokens; {greedy}"),
    ]
    return tuple(
        kind(values[name], min=low, max=high, description=name, tooltip=text, **step, **LOOK)
        for kind, name, (low, high), step, text in wanted
    )
