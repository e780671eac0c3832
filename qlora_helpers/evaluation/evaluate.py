"""Compares base and tuned model on the same held-out rows: answers, their scores, loss, and how often an answer ends by itself.

What is asked is in `questions`, who answers in `answering`, what is measured in `metrics`, what can be said of it in `scorecard`.
Knows nothing of training or run folders.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import EvaluationConfig, RunConfig
from qlora_helpers.base.place import at
from qlora_helpers.data.examples import Example
from qlora_helpers.data.plain_templates import template_name
from qlora_helpers.data.templates import make_template
from qlora_helpers.evaluation.answering import Asked, answer_rows, summary_loss, summary_losses
from qlora_helpers.evaluation.few_shot import first_answer
from qlora_helpers.evaluation.kept_answers import KeptAnswers
from qlora_helpers.evaluation.metrics.choose import metric_for
from qlora_helpers.evaluation.metrics.measures import Metric, measure_of
from qlora_helpers.evaluation.metrics.own import Function
from qlora_helpers.evaluation.metrics.text import rouge_rows
from qlora_helpers.evaluation.questions import Asking, Rival, asked_prompts, asks_alike, held_out, known_to_rivals
from qlora_helpers.evaluation.result import MODELS, Evaluation, Scores, Scoring
from qlora_helpers.evaluation.scorecard import Comparison, compare, interval, mean_loss, score_answers, unscored

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.data.packing import PreparedData

__all__ = ["MODELS", "Rival", "evaluate", "evaluate_prepared", "rouge", "summary_loss", "summary_losses"]


def rouge(answers: Sequence[str], references: Sequence[str]) -> tuple[float, float, float]:
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L F-measure, 0 to 100, over the rows whose reference has words to count."""
    rows = rouge_rows(answers, [[reference] for reference in references])
    one, two, longest = (measure_of(key).of(rows) or 0.0 for key in ("rouge1", "rouge2", "rouge_l"))
    return one, two, longest


@at("generation")
def evaluate(
    model: PeftModel | Callable[[], PeftModel],
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: EvaluationConfig,
    *,
    template: str,
    max_tokens: int,
    long_rows: str = "auto",
    train_keys: Collection[str] = (),
    train_answers: Sequence[str] = (),
    shots: Sequence[Example] | None = None,
    metric: Function | None = None,
    only: Collection[str] = tuple(MODELS),
    rivals: Sequence[Rival] = (),
    kept: KeptAnswers | None = None,
    progress: bool = True,
) -> Evaluation:
    """Asks the model with its adapters off and on about the same rows, in the same prompts.

    Args:
        model: a peft model, or a function that returns one, which is called where an answer is missing.
        tokenizer: the model's.
        examples: held-out rows; those with one prompt become one row with several references.
        config: generation settings, and how answers are scored.
        template: the name of the template that rows were written with (`templates.template_name`).
        max_tokens: of the longest row; a longer prompt is cut as in training.
        long_rows: where it is cut, as in the settings.
        train_keys: `duplicates.prompt_key` of every training row: a held-out row that is among them is skipped.
        train_answers: of the training rows, or a sample; they say what kind of task it is.
        shots: training rows of which the untuned model gets the first `config.few_shot` in its prompt; None does not ask it so.
        metric: a function of an answer and a reference that returns a number, of which higher is better.
        only: which of `MODELS` are asked.
        rivals: other runs whose adapters the model holds, each asked in the prompt that it was trained with; a row that one of them
            was trained on is skipped for all.
        kept: the answers that are known, which are not asked again; it takes the new ones as they come.
        progress: whether to show a bar.

    Raises:
        UserError: the metric can't be used; nothing was asked yet.
    """
    asking = Asking(make_template(template, tokenizer), max_tokens, config.max_new_tokens, long_rows)
    beside = [(rival, _asking_of(rival, tokenizer, config)) for rival in rivals]
    usable, remarks = _usable(examples, asking, beside)
    remarks += known_to_rivals(usable, train_keys, rivals)
    items, rows, skipped = held_out(usable, set(train_keys).union(*(rival.train_keys or () for rival in rivals)))
    references = [reference for row in rows for reference in row["references"]]
    scored_by, reason = metric_for(config, train_answers, references, function=metric)
    prompts, trimmed, more = asked_prompts(items, tokenizer, config, asking, shots, only, beside)
    alike = {"base", "tuned", *(rival.name for rival, its in beside if asks_alike(its, asking))}
    labelled = asking.labelled(items)
    asked = [Asked(name, questions, labelled if name in alike else None) for name, questions in prompts.items()]
    kept = KeptAnswers({name: name for name in prompts}) if kept is None else kept
    adapters = {rival.name: rival.adapter for rival in rivals}
    form = answer_rows(model, tokenizer, rows, asked, config, kept, adapters=adapters, progress=progress)
    if "base_few" in prompts and shots and asking.template.name != "chat":
        _cut_after_first_answer(rows, shots[: config.few_shot], asking.template.opening(shots[0]))
    scores, against = _scored(rows, tuple(prompts), scored_by)
    scoring = Scoring(scored_by.name, scored_by.task, scored_by.main, scored_by.measures, reason, scored_by.notes)
    remarks += [*more, *unscored(rows, scored_by)]
    return Evaluation(scores, tuple(rows), trimmed, against, skipped, form, scoring, tuple(remarks))


def _cut_after_first_answer(rows: Sequence[dict[str, Any]], shots: Sequence[Example], opening: str) -> None:
    """Cuts the answers that were given after examples where the model goes on to write an example of its own."""
    for row in rows:
        answer = row["answers"]["base_few"]
        answer["text"] = first_answer(answer["text"], shots, opening)


def _scored(
    rows: list[dict[str, Any]], names: Sequence[str], metric: Metric
) -> tuple[dict[str, Scores], dict[str, Comparison]]:
    """Scores each answer in its row; returns each model's scores, and each other model's comparison with the tuned one."""
    score_answers(rows, metric)
    scores = {name: _scores([row["answers"][name] for row in rows], metric) for name in names}
    others = [name for name in names if name != "tuned" and "tuned" in names]
    return scores, {name: compare(rows, name, "tuned", metric=metric) for name in others}


def evaluate_prepared(
    model: PeftModel | Callable[[], PeftModel],
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    config: RunConfig,
    **options: Any,
) -> Evaluation:
    """Asks the model about a run's held-out rows, as its settings and its prepared data say.

    Args:
        model, tokenizer: as for `evaluate`.
        data: the run's.
        config: the run's.
        options: `metric`, `only`, `rivals`, `kept` and `progress`, as for `evaluate`.

    Raises:
        UserError: as for `evaluate`.
    """
    return evaluate(
        model,
        tokenizer,
        data.test,
        config.evaluation,
        template=template_name(config.data),
        max_tokens=config.data.seq_len_tokens,
        long_rows=config.data.long_rows,
        train_keys=data.train_keys,
        train_answers=data.train_answers,
        shots=data.shots,
        **options,
    )


def _asking_of(rival: Rival, tokenizer: PreTrainedTokenizerBase, config: EvaluationConfig) -> Asking:
    template = make_template(rival.template, tokenizer)
    return Asking(template, rival.max_tokens, config.max_new_tokens, rival.long_rows)


def _usable(
    examples: Sequence[Example], asking: Asking, beside: Sequence[tuple[Rival, Asking]]
) -> tuple[list[Example], list[str]]:
    """Returns the rows that the run and every rival can be asked, and remarks on those that are skipped."""
    usable, remarks = asking.usable(examples)
    for rival, its in beside:
        usable, more = its.usable(usable)
        remarks += [f"{remark} (by {rival.run})" for remark in more]
    return usable, remarks


def _scores(answers: Sequence[dict[str, Any]], metric: Metric) -> Scores:
    def mean(key: str) -> float:
        return sum(answer[key] for answer in answers) / max(1, len(answers))

    with_loss = [answer for answer in answers if "nats" in answer]
    loss = mean_loss([answer["nats"] for answer in with_loss], [answer["loss_tokens"] for answer in with_loss])
    found = {key: measure_of(key).of(answers) for key in metric.measures}
    one, two, longest = (found.get(key) for key in ("rouge1", "rouge2", "rouge_l"))
    low, high = interval(measure_of(metric.main), answers) or (None, None)
    return Scores(one, two, longest, mean("stopped"), mean("tokens"), loss, mean("repetition"), found, low, high)
