"""Compares two models row by row: scores, differences with paired bootstrap intervals, wins, ties and losses.

Takes and gives plain values, the rows of an `evaluation.json`; `evaluate` asks the models, `metrics` says what is measured.
Bootstrap: Efron 1979; in this use Koehn 2004 (aclanthology.org/W04-3250). Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.evaluation.metrics.measures import COMMON, Answers, Measure, Metric, measure_of
from qlora_helpers.evaluation.metrics.text import TEXT, repetition

SAMPLES, LEVEL = 10_000, 0.95  # of the bootstrap
FEWEST_ROWS = 20  # with fewer, the bootstrap's intervals are too narrow to be trusted
SAME_SCORE = 1e-9  # of the measure that counts; a smaller difference is a tie
MOST_DRAWN = 20_000_000  # numbers in all samples together; where there are many rows, fewer samples are drawn


def resamples(rows: int, *, seed: int = 0) -> np.ndarray:
    """How often each row counts in each bootstrap sample, `(1 + samples, rows)`.

    The first sample is the rows themselves; for the others, as many rows as there are are drawn with replacement.
    """
    samples = min(SAMPLES, max(1000, MOST_DRAWN // rows))
    drawn = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=samples).astype(np.int16)
    return np.concatenate([np.ones((1, rows), np.int16), drawn])


@dataclass(frozen=True)
class Difference:
    """A measure of two models on the same rows.

    Attributes:
        measure: the key of a `Measure`; shares are in percent.
        first, second: the measure of each model.
        low, high: the interval of `second - first`.
        rows: how many were compared, those in which both models have the measure.
    """

    measure: str
    first: float
    second: float
    low: float
    high: float
    rows: int

    @property
    def difference(self) -> float:
        """How much larger the second value is than the first one, in the measure's unit."""
        return self.second - self.first

    @property
    def can_tell(self) -> bool:
        """Whether there are enough rows, and the interval does not contain zero."""
        return self.rows >= FEWEST_ROWS and (self.low > 0 or self.high < 0)

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `higher`, `lower`, or why the rows can't tell."""
        if self.rows < FEWEST_ROWS:
            return f"too few rows ({self.rows} of {FEWEST_ROWS})"
        if not self.can_tell:
            return "can't tell"
        up, good = self.low > 0, measure_of(self.measure).higher_is_better
        if good is None:
            return "higher" if up else "lower"
        return "better" if up == good else "worse"


@dataclass(frozen=True)
class Comparison(Tabular):
    """The comparison of two models on the same held-out rows.

    Attributes:
        first, second: their names in the rows' `answers`.
        differences: one for each measure, `second - first`.
        wins, ties, losses: ids of the rows that `second` answered better, as well or worse, by the measure that counts; the
            clearest first.
        main: the key of the measure that counts.
    """

    first: str
    second: str
    differences: tuple[Difference, ...]
    wins: tuple[str, ...]
    ties: tuple[str, ...]
    losses: tuple[str, ...]
    main: str = TEXT.main

    def __getitem__(self, measure: str) -> Difference:
        for item in self.differences:
            if item.measure == measure:
                return item
        raise KeyError(measure)

    @property
    def gain(self) -> Difference | None:
        """The difference in the measure that counts, or None where no row has it."""
        return next((item for item in self.differences if item.measure == self.main), None)

    def table(self) -> Table:
        """Returns a row for each measure: both values, the difference, its interval and what it says."""
        header = ["measure", self.first, self.second, "difference", f"{LEVEL:.0%} interval", "verdict"]
        lines = [
            [
                measure_of(d.measure).label,
                number_text(d.first),
                number_text(d.second),
                _signed(d.difference),
                f"{_signed(d.low)} to {_signed(d.high)}",
                d.verdict,
            ]
            for d in self.differences
        ]
        return Table(header, lines, notes=[self.verdict()], numbers=range(1, 5))

    def verdict(self) -> str:
        """Says in a sentence what the rows tell about the measure that counts, also where they tell nothing."""
        if not self.differences:
            return "no held-out row is left to compare."
        gain, measure = self.gain, measure_of(self.main)
        if gain is None:
            return f"no row has a {measure.name}: the references leave nothing to count."
        rows, between = gain.rows, f"{_signed(gain.low)} to {_signed(gain.high)}"
        if rows < FEWEST_ROWS:
            return f"{rows} rows are too few to tell the two apart: at least {FEWEST_ROWS} are needed."
        if not gain.can_tell:
            unsure = f"{rows} rows are too few to tell the two apart in {measure.name}"
            return f"{unsure}: the difference may be anything from {between}."
        more = "more" if gain.difference > 0 else "less"
        return (
            f"{amount(gain.difference, measure)} {more} ({LEVEL:.0%} interval {between}); {len(self.wins)} rows "
            f"won, {len(self.ties)} tied, {len(self.losses)} lost."
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self) | {
            "differences": [
                asdict(item) | {"difference": item.difference, "can_tell": item.can_tell, "verdict": item.verdict}
                for item in self.differences
            ],
            "verdict": self.verdict(),
            "level": LEVEL,
            "samples": SAMPLES,
        }


def comparison_from_dict(values: Mapping[str, Any]) -> Comparison:
    """Reads back what `Comparison.to_dict` wrote."""
    fields = Difference.__dataclass_fields__
    differences = tuple(Difference(**{key: item[key] for key in fields}) for item in values["differences"])
    wins, ties, losses = (tuple(values[name]) for name in ("wins", "ties", "losses"))
    main = values.get("main", TEXT.main)  # files of earlier versions have none
    return Comparison(values["first"], values["second"], differences, wins, ties, losses, main)


class Measured(Protocol):
    """What was scored: a metric, or what an evaluation says of one."""

    @property
    def measures(self) -> Sequence[str]:
        """Keys of the measures, as `measures.measure_of` takes them."""

    @property
    def main(self) -> str:
        """Key of the measure that decides."""


def compare(
    rows: Sequence[Mapping[str, Any]],
    first: str,
    second: str,
    *,
    metric: Measured = TEXT,
    seed: int = 0,
) -> Comparison:
    """Compares two models that answered the same rows.

    Args:
        rows: of an `evaluation.json`: each has an `id` and `answers`, which have their scores (`score_answers`).
        first, second: names in `answers`.
        metric: what was scored; its main measure decides which rows are won.
        seed: seed of the bootstrap.
    """
    if not rows:
        return Comparison(first, second, (), (), (), (), metric.main)
    drawn = resamples(len(rows), seed=seed)
    one, other = ([row["answers"][name] for row in rows] for name in (first, second))
    found = (_difference(measure_of(key), one, other, drawn) for key in (*metric.measures, *COMMON))
    gains = _gains(measure_of(metric.main), [row["id"] for row in rows], one, other)
    return Comparison(
        first,
        second,
        tuple(item for item in found if item is not None),
        tuple(name for gain, name in gains if gain > SAME_SCORE),
        tuple(name for gain, name in gains if abs(gain) <= SAME_SCORE),
        tuple(name for gain, name in reversed(gains) if gain < -SAME_SCORE),
        metric.main,
    )


def gain_cells(gain: Difference | None) -> list[str]:
    """Returns a difference as tables show it: the difference, its interval, and what it says."""
    if gain is None:
        return ["", "", "no row has it"]
    return [_signed(gain.difference), f"{_signed(gain.low)} to {_signed(gain.high)}", gain.verdict]


def _gains(measure: Measure, ids: Sequence[str], one: Answers, other: Answers) -> list[tuple[float, str]]:
    """By how much the second answer to each row is the better one, largest first; rows without the measure are left out."""
    sign = -1 if measure.higher_is_better is False else 1
    pairs = [
        (sign * (b[measure.row] - a[measure.row]), name)
        for name, a, b in zip(ids, one, other, strict=True)
        if a.get(measure.row) is not None and b.get(measure.row) is not None
    ]
    return sorted(pairs, key=lambda pair: -pair[0])


def difference(
    measure: Measure, one: Answers, other: Answers, *, level: float = LEVEL, seed: int = 0
) -> Difference | None:
    """The difference `other - one` in one measure, with its interval; None where no row has it.

    Args:
        measure: what is compared.
        one, other: two models' scored answers to the same rows.
        level: of the interval.
        seed: seed of the bootstrap.
    """
    return _difference(measure, one, other, resamples(len(one), seed=seed), level) if one else None


def _difference(
    measure: Measure, one: Answers, other: Answers, drawn: np.ndarray, level: float = LEVEL
) -> Difference | None:
    """The difference in a measure over the rows in which both have it, or None where there is no such row."""
    first, second = measure.parts(one), measure.parts(other)
    both = ~(np.isnan(first).any(axis=1) | np.isnan(second).any(axis=1))
    if not both.any():
        return None
    values, others = (_sampled(measure, np.where(both[:, None], parts, 0.0), drawn) for parts in (first, second))
    gains = (others - values)[1:]
    if not (np.isfinite(values[0]) and np.isfinite(others[0]) and np.isfinite(gains).any()):
        return None
    low, high = np.nanquantile(gains, [(1 - level) / 2, (1 + level) / 2])
    return Difference(measure.key, float(values[0]), float(others[0]), float(low), float(high), int(both.sum()))


def _sampled(measure: Measure, parts: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The measure over all rows and over each sample, `(1 + samples,)`."""
    groups = np.array_split(drawn, max(1, drawn.size // 1_000_000))
    return np.concatenate([measure.total(group @ parts) for group in groups])


def interval(measure: Measure, answers: Answers, *, seed: int = 0) -> tuple[float, float] | None:
    """The interval of one model's measure; None with fewer than `FEWEST_ROWS` rows that have it."""
    parts = measure.parts(answers) if answers else np.empty((0, 1))
    parts = parts[~np.isnan(parts).any(axis=1)]
    if len(parts) < FEWEST_ROWS:
        return None
    samples = _sampled(measure, parts, resamples(len(parts), seed=seed))[1:]
    low, high = np.nanquantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def score_answers(rows: Iterable[dict[str, Any]], metric: Metric = TEXT) -> None:
    """Adds a metric's scores and the repetition to every answer of rows that have `references` or one `summary`."""
    rows = list(rows)
    for name in rows[0]["answers"] if rows else ():
        answers = [row["answers"][name] for row in rows]
        references = [row.get("references") or [row["summary"]] for row in rows]
        for answer, scores in zip(answers, metric.score([a["text"] for a in answers], references), strict=True):
            answer |= scores | {"repetition": repetition(answer["text"])}


def unscored(rows: Sequence[Mapping[str, Any]], metric: Metric) -> list[str]:
    """Says how many rows a metric could not score, and why; `rows` have their scores."""
    found = []
    key = measure_of(metric.main).row
    for name in rows[0]["answers"] if rows else ():
        answers = [row["answers"][name] for row in rows]
        errors = [answer["score_error"] for answer in answers if "score_error" in answer]
        if errors:
            found.append(f"{len(errors)} answers of {name} have no score: your function failed, first with {errors[0]}")
    missing = [row["id"] for row in rows if all(answer.get(key) is None for answer in row["answers"].values())]
    if missing:
        found.append(
            f"{len(missing)} of {len(rows)} rows have no {measure_of(metric.main).name} and don't count in it: their reference "
            f"has nothing that it could measure (the first is {missing[0]})"
        )
    return found


def amount(difference: float, measure: Measure) -> str:
    """Returns a difference in a measure without its sign, such as `5.2 points of ROUGE-L`."""
    return f"{points(difference, measure)} of {measure.name}"


def points(difference: float, measure: Measure) -> str:
    """Returns a difference without its sign, in points where the measure has a scale of 100."""
    scaled = measure.unit in ("%", "points")
    return f"{abs(difference):.1f} points" if scaled else number_text(abs(difference))


def number_text(value: float) -> str:
    """Returns a number with as many digits as are worth reading."""
    return f"{value:,.1f}" if abs(value) >= 10 or value == 0 else f"{value:.3g}"


def _signed(value: float) -> str:
    text = number_text(abs(value))
    zero = not any(digit in "123456789" for digit in text)
    return text if zero else f"{'+' if value > 0 else chr(0x2212)}{text}"


def mean_loss(nats: Sequence[float], tokens: Sequence[int]) -> float | None:
    """Nats per token over rows, weighted by tokens, so that rows of different length count as they should."""
    count = sum(tokens)
    return math.fsum(nats) / count if count else None
