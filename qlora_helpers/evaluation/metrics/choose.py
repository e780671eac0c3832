"""Chooses the metric that fits a task by looking at its answers, and says why. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_helpers.base.config import EvaluationConfig
from qlora_helpers.data.prepared_file import read_prepared_file
from qlora_helpers.evaluation.metrics.exact import EXACT
from qlora_helpers.evaluation.metrics.fields import json_metric, object_of
from qlora_helpers.evaluation.metrics.labels import labels_metric
from qlora_helpers.evaluation.metrics.measures import Metric
from qlora_helpers.evaluation.metrics.numbers import decimal_sign, is_identifier, numbers_metric
from qlora_helpers.evaluation.metrics.own import Function, own_metric
from qlora_helpers.evaluation.metrics.text import TEXT
from qlora_helpers.evaluation.metrics.words import words
from qlora_helpers.runs.folder import Run

FEWEST_ANSWERS = 20  # with fewer, repeats and lengths say little about the task
MOST_LABELS, LABEL_REPEATS, LONGEST_LABEL = 50, 5, 100  # labels; answers to each, on average; characters
JSON_SHARE = 0.95  # of answers that are JSON objects
SHORT_WORDS, SHORT_MOST = 5, 12  # words of the middle answer, and of all but one in ten
TRIED = 3  # references that a user's function is tried on
SHOWN = 6  # labels that a reason names


@dataclass(frozen=True)
class Choice:
    """A metric by its setting, and the sentence that says why."""

    name: str
    reason: str


def choose(answers: Sequence[str]) -> Choice:
    """Chooses a metric from the answers that a model is trained on.

    Args:
        answers: all of them, or a sample.

    Returns:
        `json`, `labels`, `numbers`, `exact` or `text`.
    """
    count = len(answers)
    if not count:
        return Choice("text", "no training answer could be looked at")
    objects = sum(isinstance(object_of(answer), dict) for answer in answers)
    if objects >= JSON_SHARE * count:
        return Choice("json", f"{_share(objects, count)} are JSON objects")
    different = Counter(answer.strip() for answer in answers)
    repeated = count >= FEWEST_ANSWERS and LABEL_REPEATS * len(different) <= count
    if repeated and len(different) <= MOST_LABELS and max(map(len, different)) <= LONGEST_LABEL:
        names = ", ".join(repr(label) for label, _ in different.most_common(SHOWN))
        rest = ", ..." if len(different) > SHOWN else ""
        return Choice("labels", f"{count} training answers have only {len(different)} different texts ({names}{rest})")
    if decimal_sign(answers) and not any(map(is_identifier, answers)):
        return Choice("numbers", f"{_share(count, count)} are numbers")
    lengths = sorted(len(words(answer)) for answer in answers)
    middle, long = lengths[count // 2], lengths[(9 * count) // 10]
    if count >= FEWEST_ANSWERS and middle <= SHORT_WORDS and long <= SHORT_MOST:
        return Choice("exact", f"training answers are short: half of them have at most {middle} words")
    few = f"; fewer than {FEWEST_ANSWERS} can't show labels or short answers" if count < FEWEST_ANSWERS else ""
    return Choice("text", f"training answers are texts, half of them of {middle} words or more{few}")


def _share(found: int, count: int) -> str:
    return f"all {count} training answers" if found == count else f"{found} of {count} training answers"


def metric_for(
    config: EvaluationConfig,
    answers: Sequence[str],
    references: Sequence[str] = (),
    *,
    function: Function | None = None,
) -> tuple[Metric, str]:
    """Returns the metric of an evaluation, and why it is this one.

    Args:
        config: `metric`, and the settings of the metrics.
        answers: of the training rows, or a sample of them; empty looks at the references.
        references: right answers of the held-out rows.
        function: the user's own, which goes before the settings.

    Raises:
        UserError: the function fails on the references, or the schema can't be used.
    """
    if function is not None:
        return own_metric(function, (references or answers)[:TRIED]), "you passed it"
    if config.metric == "auto":
        choice = choose(answers or references)
        reason = choice.reason if answers else choice.reason.replace("training answer", "held-out answer")
        name = choice.name
    else:
        name, reason = config.metric, f"evaluation.metric={config.metric}"
    return _metric(name, config, [*answers, *references]), reason


def refuse_metric(run: Run, function: Function | None = None) -> None:
    """Tries an evaluation's metric on the references of a run's prepared data, which needs no model.

    Args:
        run: the run; where no data is prepared, nothing is tried.
        function: as for `metric_for`.

    Raises:
        UserError: as for `metric_for`.
    """
    prepared = read_prepared_file(run.data_dir)
    if prepared is not None:
        references = [text for row in prepared.test for text in (row.answer, *row.references)]
        metric_for(run.config().evaluation, prepared.train_answers, references, function=function)


def _metric(name: str, config: EvaluationConfig, answers: Sequence[str]) -> Metric:
    if name == "labels":
        return labels_metric(answers)
    if name == "json":
        return json_metric(Path(config.json_schema).expanduser() if config.json_schema else None)
    if name == "numbers":
        return numbers_metric(config.tolerance, decimal_sign(answers) or ".")
    return EXACT if name == "exact" else TEXT
