"""What a person sees while something takes long: one bar a phase, the losses as a table, lines of text.

Steps ask `bar` for a bar and tell `current()` of their figures; they know nothing of where these are shown. In a notebook and in a
script this module's own `Show` draws with tqdm; the command line puts another in its place (`commands.terminal`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, Protocol, TypeVar

from qlora_helpers.base.units import duration

Item = TypeVar("Item")
MOST_LINES = 20  # of the table of losses; every evaluation has one besides


class Bar(Protocol):
    """A bar as tqdm has it."""

    def update(self, n: int = 1, /) -> Any:
        """Moves it on."""

    def set_postfix_str(self, text: str, /) -> Any:
        """Says what is being done."""

    def close(self) -> Any:
        """Ends it."""


class Show:
    """Shows phases and figures in a notebook or a script: bars that go when they end, and lines.

    Attributes:
        table: the lines of the losses, which a new training begins anew.
        is_own: whether phases are shown whatever a library's own bars are set to.
    """

    is_own = False  # whether bars of the data set library's own kind are shown whatever that library is told

    def __init__(self) -> None:
        self.table = LossTable()

    def bar(self, desc: str, *, total: float | None = None, unit: str = "it", **options: Any) -> Any:
        """Opens a bar for a phase; it is a context manager, too.

        Args:
            desc: what is done, such as `labelling`.
            total: how much there is to do; None where that is not known.
            unit: of `total`, such as ` rows`.
            options: tqdm's, of which the command line takes `disable=True`, `initial` and `unit_scale` alone.
        """
        from tqdm.auto import tqdm

        return tqdm(desc=desc, total=total, unit=unit, **{"leave": False} | options)

    def say(self, text: str) -> None:
        """Shows a line of text, above a bar if there is one."""
        from tqdm import tqdm

        tqdm.write(text)

    def result(self, command: str, found: Any, *, said: bool = False) -> None:
        """Shows what a command found.

        Args:
            command: its name.
            found: a path, or what prints itself.
            said: whether it was shown already.
        """
        if not said:
            self.say(str(found))

    def training(self, max_steps: int, done: int) -> Any:
        """Opens the bar of a training, with `done` of its steps behind it."""
        self.table = LossTable(max_steps)
        return self.bar("training", total=max_steps, unit=" steps", initial=done)

    def step(self, values: Mapping[str, Any]) -> None:
        """Shows the figures of a logged step, as `LossTable.lines` takes them."""
        for line in self.table.lines(values):
            self.say(line)


class LossTable:
    """The losses of a training, a line for each evaluation and for some of the other logged steps.

    Args:
        max_steps: optimizer steps of the whole run.
    """

    HEAD = "     step  training loss  evaluation loss  tokens/s  left"

    def __init__(self, max_steps: int = 0) -> None:
        self.max_steps, self._next, self._begun = max_steps, 0, False
        self._loss: float | None = None  # logged, and not in a line yet

    def lines(self, values: Mapping[str, Any]) -> list[str]:
        """Returns the lines to add for a logged step; none where it is left out.

        Args:
            values: `step`, and of `loss`, `eval_loss`, `tokens_per_s` and `seconds_left` what is known.
        """
        step, evaluated = int(values["step"]), values.get("eval_loss")
        self._loss = loss = values.get("loss", self._loss)
        if evaluated is None and step < self._next and step != self.max_steps:
            return []
        self._next = step + max(1, self.max_steps // MOST_LINES)
        self._loss, left = None, values.get("seconds_left")
        cells = [
            f"{step:>9,}",
            _number(loss).rjust(13),
            _number(evaluated).rjust(15),
            (f"{values['tokens_per_s']:,.0f}" if values.get("tokens_per_s") is not None else "").rjust(8),
            duration(left) if left else "",
        ]
        head = [] if self._begun else [self.HEAD]
        self._begun = True
        return [*head, "  ".join(cells).rstrip()]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


_shown: list[Show] = [Show()]


def current() -> Show:
    """Returns what shows phases and figures now."""
    return _shown[-1]


@contextlib.contextmanager
def showing(show: Show) -> Iterator[Show]:
    """Shows phases and figures with `show` during the block."""
    _shown.append(show)
    try:
        yield show
    finally:
        _shown.remove(show)


def bar(desc: str, *, total: float | None = None, unit: str = "it", **options: Any) -> Any:
    """Opens a bar for a phase where bars are shown now; see `Show.bar`."""
    return current().bar(desc, total=total, unit=unit, **options)


def passing(items: Iterable[Item], desc: str, *, unit: str = "it", **options: Any) -> Iterator[Item]:
    """Yields the items of an iterable, and moves a bar on with each."""
    total = len(items) if isinstance(items, Sized) else None
    with bar(desc, total=total, unit=unit, **options) as shown:
        for item in items:
            yield item
            shown.update(1)
