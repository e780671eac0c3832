"""What a learner sees of a lesson: the exercises that the teacher has shown, how each stands, and which solutions are open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.teaching.attempts import attempts
from qlora_helpers.teaching.exercise import Exercise
from qlora_helpers.teaching.releases import Release, released


@dataclass(frozen=True)
class Today(Tabular):
    """The exercises that the class has come to; shows as a table.

    Attributes:
        exercises: in the order in which they were shown, each with its notebook.
        states: exercise -> `right`, `wrong`, or empty where there is no answer yet.
        release: what the teacher has opened.
    """

    exercises: tuple[tuple[str, Exercise], ...]
    states: Mapping[str, str]
    release: Release

    def table(self) -> Table:
        """Returns a row for each exercise."""
        if not self.exercises:
            return Table((), (), caption="The teacher has shown no exercise yet.")
        rows = [
            [
                each.title,
                f"exercises.{each.name}",
                notebook,
                str(each.minutes),
                self.states.get(each.name, ""),
                "open" if each.name in self.release.solutions else "",
            ]
            for notebook, each in self.exercises
        ]
        return Table(["exercise", "name", "notebook", "minutes", "yours", "solution"], rows, numbers={3})


def today(by_notebook: Mapping[str, Sequence[Exercise]]) -> Today:
    """Returns what the teacher has shown on the board that `QLORA_BOARD` names.

    Args:
        by_notebook: all exercises.
    """
    release = released()
    known = {each.name: (notebook, each) for notebook, several in by_notebook.items() for each in several}
    states: dict[str, str] = {}
    for line in attempts():
        if line.outcome in ("right", "wrong") and states.get(line.exercise) != "right":
            states[line.exercise] = line.outcome
    return Today(tuple(known[name] for name in release.shown if name in known), states, release)
