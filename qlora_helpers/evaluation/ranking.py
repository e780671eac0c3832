"""Ranks runs that answered the same held-out rows, and says in plain words which of them can't be told apart.

Every pair is compared row by row with a bootstrap interval. The intervals are widened so that they hold for all pairs together
(Bonferroni): among many runs one is ahead by chance. Takes the values of `evaluation.json` files. Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.evaluation.metrics.measures import Answers, Measure, measure_of
from qlora_helpers.evaluation.result import score_text, scoring_from_dict
from qlora_helpers.evaluation.scorecard import FEWEST_ROWS, LEVEL, Difference, difference, interval, points

SAME = 1e-9


@dataclass(frozen=True)
class Place:
    """A run's place.

    Attributes:
        name: the run's name.
        value: the measure that counts, over the rows that all runs answered.
        low, high: its own interval; None with too few rows.
        behind: the first run against this one, `first - this`; None for the first.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    behind: Difference | None = None


@dataclass(frozen=True, repr=False)
class Ranking(Tabular):
    """Runs by the measure that counts, the best first.

    Attributes:
        measure: the key of the measure; empty where nothing could be ranked.
        rows: how many rows all of them answered.
        places: the runs in their order.
        apart: pairs of names, the better one first, whose intervals tell them apart.
        level: of each pair's interval, so that all hold together with 95 %.
        remarks: which runs are not ranked, and why.
    """

    measure: str
    rows: int
    places: tuple[Place, ...]
    apart: frozenset[tuple[str, str]]
    level: float
    remarks: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """Says what the rows tell about the order, also where they tell nothing."""
        if len(self.places) < 2:
            few = "Fewer than two runs have comparable scores, so nothing is ranked."
            return [few, *self.remarks]
        name, first = measure_of(self.measure).name, self.places[0]
        others = [place.name for place in self.places[1:]]
        alike = [name for name in others if (first.name, name) not in self.apart]
        behind = [name for name in others if name not in alike]
        best = f"{first.name} has the best {name} ({score_text(first.value, self.measure)})"
        if self.rows < FEWEST_ROWS:
            found = [
                f"{best}, but {self.rows} rows are too few to tell any of them apart: at least {FEWEST_ROWS} are needed."
            ]
        elif not behind:
            found = [f"{best}, but these {self.rows} rows can't tell it from {_listed(alike)}."]
        elif alike:
            found = [
                f"{best} and is better than {_listed(behind)}, but these {self.rows} rows can't tell it from {_listed(alike)}."
            ]
        else:
            found = [f"{best} and is better than {_listed(behind)}."]
        if len(self.places) > 2:
            found.append(
                f"The intervals of the pairs are those of {self.level:.1%}, so that all {len(self.places)} runs' together hold "
                f"with {LEVEL:.0%}. The first of several looks a little better than it is: confirm it on other rows."
            )
        return [*found, *self.remarks]

    def table(self) -> Table:
        """Returns a row for each run: its value with its interval, how far it is behind, and whether that can be told."""
        if not self.places:
            return Table((), (), caption=" ".join(self.sentences()))
        measure = measure_of(self.measure)
        header = ["", "run", measure.label, f"{LEVEL:.0%} interval", "behind the first", "of that, interval", "verdict"]
        lines = [_line(number, place, measure) for number, place in enumerate(self.places, start=1)]
        caption = f"{self.rows} held-out rows that all of them answered"
        return Table(header, lines, caption=caption, notes=self.sentences(), numbers=(0, 2, 3, 4, 5))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "measure": self.measure,
            "rows": self.rows,
            "places": [
                {
                    "run": place.name,
                    "value": place.value,
                    "low": place.low,
                    "high": place.high,
                    "behind": abs(place.behind.difference) if place.behind else 0.0,
                    "can_tell": place.behind.can_tell if place.behind else None,
                }
                for place in self.places
            ],
            "level": self.level,
            "sentences": self.sentences(),
        }


def _line(number: int, place: Place, measure: Measure) -> list[str]:
    own = "" if place.low is None or place.high is None else _between(place.low, place.high, measure.key)
    if place.behind is None:
        return [str(number), place.name, score_text(place.value, measure.key), own, "", "", ""]
    low, high = sorted((_signless(place.behind.low, measure), _signless(place.behind.high, measure)))
    return [
        str(number),
        place.name,
        score_text(place.value, measure.key),
        own,
        points(place.behind.difference, measure),
        _between(low, high, measure.key),
        "behind" if place.behind.can_tell else place.behind.verdict,
    ]


def _signless(value: float, measure: Measure) -> float:
    """A difference as how much the first is the better one."""
    return -value if measure.higher_is_better is False else value


def _between(low: float, high: float, key: str) -> str:
    return f"{score_text(low, key)} to {score_text(high, key)}"


def rank(evaluations: Mapping[str, Mapping[str, Any]], *, seed: int = 0) -> Ranking:
    """Ranks runs by the measure that counts for most of them.

    Args:
        evaluations: the values of each run's `evaluation.json` by its name; runs without one have empty values.
        seed: seed of the bootstrap.
    """
    remarks, keys = [], {}
    for name, values in evaluations.items():
        if not values or "tuned" not in values.get("scores", {}):
            remarks.append(f"{name} is not evaluated yet.")
        elif values.get("random_weights"):
            remarks.append(f"{name} has random weights, so its scores mean nothing.")
        else:
            keys[name] = scoring_from_dict(values.get("scoring", {})).main
    main = max(set(keys.values()), key=lambda key: (list(keys.values()).count(key), key), default="")
    for name in [name for name, key in keys.items() if key != main]:
        remarks.append(f"{name} is scored by {measure_of(keys.pop(name)).name} and not by {measure_of(main).name}.")
    answers, left_out = _same_rows({name: evaluations[name] for name in keys})
    remarks += left_out
    try:
        return _ranked(main, answers, tuple(remarks), seed)
    except (TypeError, ValueError, KeyError, OverflowError):  # scores that somebody else wrote
        return Ranking("", 0, (), frozenset(), LEVEL, (*remarks, "The scores of an answer are damaged."))


def _same_rows(evaluations: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Answers], list[str]]:
    """The tuned answers to the rows that all runs answered, by the run's name, and what there is to say about it."""
    by_row = {
        name: {
            (row["id"], row["dialogue"], row["summary"]): row["answers"]["tuned"]
            for row in values["rows"]
            if "tuned" in row["answers"]
        }
        for name, values in evaluations.items()
    }
    shared = set.intersection(*map(set, by_row.values())) if by_row else set()
    order = [row for row in next(iter(by_row.values()), {}) if row in shared]
    found: dict[str, Answers] = {name: [rows[row] for row in order] for name, rows in by_row.items()}
    if len(by_row) > 1 and not shared:
        return {}, ["The runs were evaluated on different rows, so their scores can't be compared."]
    if any(len(rows) != len(shared) for rows in by_row.values()):
        return found, [f"Only the {len(shared)} rows that all of them answered are compared."]
    return found, []


def _ranked(main: str, answers: Mapping[str, Answers], remarks: tuple[str, ...], seed: int) -> Ranking:
    measure = measure_of(main) if main else None
    values = {name: measure.of(rows) for name, rows in answers.items()} if measure else {}
    sign = -1 if measure and measure.higher_is_better is False else 1
    names = sorted((name for name in values if values[name] is not None), key=lambda name: -sign * (values[name] or 0))
    level = 1 - (1 - LEVEL) / max(1, len(names) * (len(names) - 1) // 2)
    apart, behind, rows = set(), {}, 0
    for better, worse in itertools.combinations(names, 2):
        assert measure is not None  # there are names
        found = difference(measure, answers[worse], answers[better], level=level, seed=seed)
        if found is None:
            continue
        rows = max(rows, found.rows)
        if better == names[0]:
            behind[worse] = found
        if found.can_tell and sign * found.difference > SAME:
            apart.add((better, worse))
    places = []
    for name in names:
        assert measure is not None
        low, high = interval(measure, answers[name], seed=seed) or (None, None)
        places.append(Place(name, values[name] or 0.0, low, high, behind.get(name)))
    return Ranking(main, rows, tuple(places), frozenset(apart), level, remarks)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
