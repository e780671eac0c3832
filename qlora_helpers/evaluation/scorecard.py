"""Compares two models row by row: scores, differences with paired bootstrap intervals, wins, ties and losses.

Takes and gives plain values, the rows of an `evaluation.json`; `evaluate` asks the models. ROUGE: Lin 2004
(aclanthology.org/W04-1013), by the rouge-score package with stemming. Bootstrap: Efron 1979; in this use Koehn 2004
(aclanthology.org/W04-3250). Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qlora_helpers.base.tables import Table, Tabular

SAMPLES, LEVEL = 10_000, 0.95  # of the bootstrap
FEWEST_ROWS = 20  # with fewer, the bootstrap's intervals are too narrow to be trusted
SAME_SCORE = 1e-9  # points of ROUGE-L; a smaller difference is a tie
MOST_DRAWN = 20_000_000  # numbers in all samples together; where there are many rows, fewer samples are drawn
REPEATED_WORDS = 4
ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l"}
HIGHER_IS_BETTER = {
    "rouge1": True,
    "rouge2": True,
    "rouge_l": True,
    "loss": False,
    "perplexity": False,
    "stop_rate": True,
    "repetition": False,
    "tokens": None,
}
"""The measures in the table's order; None where higher is neither better nor worse."""
NAMES = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "loss": "loss",
    "perplexity": "perplexity",
    "stop_rate": "stops, %",
    "repetition": "repeated, %",
    "tokens": "tokens",
}


def rouge_rows(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures of each answer, 0 to 100; of several references the best counts for each measure."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(tuple(ROUGE), use_stemmer=True)
    rows = []
    for answer, several in zip(answers, references, strict=True):
        found = [scorer.score(reference, answer) for reference in several]
        rows.append({name: 100 * max(one[key].fmeasure for one in found) for key, name in ROUGE.items()})
    return rows


def repetition(text: str) -> float:
    """The share of an answer's runs of four words that occurred in it before, 0 to 1.

    The seq-rep-4 of Welleck et al. 2019 (arXiv:1908.04319), over words.
    """
    words = text.casefold().split()
    runs = [tuple(words[index : index + REPEATED_WORDS]) for index in range(len(words) - REPEATED_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


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
        measure: a key of `NAMES`; shares are in percent.
        first, second: the measure of each model.
        low, high: the interval of `second - first`.
        rows: how many were compared.
    """

    measure: str
    first: float
    second: float
    low: float
    high: float
    rows: int

    @property
    def difference(self) -> float:
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
        up, good = self.low > 0, HIGHER_IS_BETTER[self.measure]
        if good is None:
            return "higher" if up else "lower"
        return "better" if up == good else "worse"


@dataclass(frozen=True)
class Comparison(Tabular):
    """The comparison of two models on the same held-out rows.

    Attributes:
        first, second: their names in the rows' `answers`.
        differences: one for each measure, `second - first`.
        wins, ties, losses: ids of the rows in which `second` has the higher, the same or the lower ROUGE-L, clearest first.
    """

    first: str
    second: str
    differences: tuple[Difference, ...]
    wins: tuple[str, ...]
    ties: tuple[str, ...]
    losses: tuple[str, ...]

    def __getitem__(self, measure: str) -> Difference:
        return next(item for item in self.differences if item.measure == measure)

    def table(self) -> Table:
        """Returns a row for each measure: both values, the difference, its interval and what it says."""
        header = ["measure", self.first, self.second, "difference", f"{LEVEL:.0%} interval", "verdict"]
        lines = [
            [
                NAMES[d.measure],
                _number(d.first),
                _number(d.second),
                _signed(d.difference),
                f"{_signed(d.low)} to {_signed(d.high)}",
                d.verdict,
            ]
            for d in self.differences
        ]
        return Table(header, lines, notes=[self.verdict()], numbers=range(1, 5))

    def verdict(self) -> str:
        """Says in a sentence what the rows tell about ROUGE-L, also where they tell nothing."""
        if not self.differences:
            return "no held-out row is left to compare."
        gain, rows = self["rouge_l"], self["rouge_l"].rows
        between = f"{_signed(gain.low)} to {_signed(gain.high)}"
        if rows < FEWEST_ROWS:
            return f"{rows} rows are too few to tell the two apart: at least {FEWEST_ROWS} are needed."
        if not gain.can_tell:
            return f"{rows} rows are too few to tell the two apart in ROUGE-L: the difference may be anything from {between}."
        more = "more" if gain.difference > 0 else "less"
        return (
            f"{abs(gain.difference):.1f} points of ROUGE-L {more} ({LEVEL:.0%} interval {between}); {len(self.wins)} rows won, "
            f"{len(self.ties)} tied, {len(self.losses)} lost."
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
    ids = (tuple(values[name]) for name in ("wins", "ties", "losses"))
    return Comparison(values["first"], values["second"], differences, *ids)


def compare(rows: Sequence[Mapping[str, Any]], first: str, second: str, *, seed: int = 0) -> Comparison:
    """Compares two models that answered the same rows.

    Args:
        rows: of an `evaluation.json`: each has an `id` and `answers`, which have their scores (`score_answers`).
        first, second: names in `answers`.
        seed: seed of the bootstrap.
    """
    if not rows:
        return Comparison(first, second, (), (), (), ())
    drawn = resamples(len(rows), seed=seed)
    one, other = ([row["answers"][name] for row in rows] for name in (first, second))
    differences = []
    for measure in HIGHER_IS_BETTER:
        first_found, second_found = (_measured(answers, measure, drawn) for answers in (one, other))
        if first_found is None or second_found is None:
            continue
        (value, samples), (other_value, other_samples) = first_found, second_found
        low, high = np.quantile(other_samples - samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        differences.append(Difference(measure, value, other_value, float(low), float(high), len(rows)))
    gains = [(b["rouge_l"] - a["rouge_l"], row["id"]) for row, a, b in zip(rows, one, other, strict=True)]
    gains.sort(key=lambda pair: -pair[0])
    return Comparison(
        first,
        second,
        tuple(differences),
        tuple(name for gain, name in gains if gain > SAME_SCORE),
        tuple(name for gain, name in gains if abs(gain) <= SAME_SCORE),
        tuple(name for gain, name in reversed(gains) if gain < -SAME_SCORE),
    )


def _measured(answers: Sequence[Mapping[str, Any]], measure: str, drawn: np.ndarray) -> tuple[float, np.ndarray] | None:
    """A measure over all rows and over each sample, or None where no answer has it. Loss is weighted by tokens, not by rows."""
    key = {"stop_rate": "stopped", "loss": "nats", "perplexity": "nats"}.get(measure, measure)
    if all(answer.get(key) is None for answer in answers):
        return None
    values = np.array([float(answer.get(key) or 0) for answer in answers])
    weights = np.ones_like(values)
    if key == "nats":
        weights = np.array([float(answer.get("loss_tokens", 0)) for answer in answers])
    parts = np.array_split(drawn, max(1, drawn.size // 1_000_000))
    sums = np.concatenate([part @ np.stack([values, weights], axis=1) for part in parts])
    means = sums[:, 0] / np.maximum(1, sums[:, 1])
    if measure == "perplexity":
        means = np.exp(np.minimum(means, 50.0))
    if measure in ("stop_rate", "repetition"):
        means = 100 * means
    return float(means[0]), means[1:]


def score_answers(rows: Iterable[dict[str, Any]]) -> None:
    """Adds ROUGE and repetition to every answer of rows that have `references` or one `summary`."""
    rows = list(rows)
    for name in rows[0]["answers"] if rows else ():
        answers = [row["answers"][name] for row in rows]
        references = [row.get("references") or [row["summary"]] for row in rows]
        for answer, scores in zip(answers, rouge_rows([a["text"] for a in answers], references), strict=True):
            answer |= scores | {"repetition": repetition(answer["text"])}


def _number(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 10 or value == 0 else f"{value:.3g}"


def _signed(value: float) -> str:
    text = _number(abs(value))
    zero = not any(digit in "123456789" for digit in text)
    return text if zero else f"{'+' if value > 0 else chr(0x2212)}{text}"


def mean_loss(nats: Sequence[float], tokens: Sequence[int]) -> float | None:
    """Nats per token over rows, weighted by tokens, so that rows of different length count as they should."""
    count = sum(tokens)
    return math.fsum(nats) / count if count else None
