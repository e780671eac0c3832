"""Compares base and tuned model on the same held-out rows: answers, their scores, loss, and how often an answer ends by itself.

What is measured is in `metrics`, what can be said of it in `scorecard`. Knows nothing of training or run folders.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from qlora_helpers.base.config import EvaluationConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.place import at
from qlora_helpers.data.batches import AllLogits, KeptLogits, PaddingMask, SequenceCollator
from qlora_helpers.data.duplicates import is_known, prompt_key
from qlora_helpers.data.examples import Example
from qlora_helpers.data.labels import label_row
from qlora_helpers.data.plain_templates import Template
from qlora_helpers.data.prompts import Prompt, prompt_tokens
from qlora_helpers.data.rendering import RowProblem
from qlora_helpers.data.shots import with_shots
from qlora_helpers.data.templates import make_template
from qlora_helpers.evaluation.fast_answers.answer import answering_form
from qlora_helpers.evaluation.few_shot import few_shot_prompts, first_answer, no_examples
from qlora_helpers.evaluation.generate import generate
from qlora_helpers.evaluation.metrics.choose import metric_for
from qlora_helpers.evaluation.metrics.measures import Metric, measure_of
from qlora_helpers.evaluation.metrics.own import Function
from qlora_helpers.evaluation.metrics.text import rouge_rows
from qlora_helpers.evaluation.result import MODELS, Evaluation, Scores, Scoring
from qlora_helpers.evaluation.scorecard import compare, interval, mean_loss, score_answers, unscored
from qlora_helpers.model.wiring import in_eval_mode, is_spread, row_losses, takes_logits_to_keep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LOSS_ROWS = 6  # at once; with more, padding and the logits of a large vocabulary cost more than the batch saves


def summary_loss(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], batch_size: int
) -> float:
    """The mean loss over all trained tokens of labelled rows, in nats a token, which does not depend on the batches."""
    losses = summary_losses(model, tokenizer, rows, batch_size)
    return mean_loss([nats for nats, _ in losses], [tokens for _, tokens in losses]) or 0.0


@at("generation")
@torch.no_grad()
def summary_losses(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], batch_size: int
) -> list[tuple[float, int]]:
    """The loss summed over each row's trained tokens, in nats, and their number; in the order of the rows."""
    targets = KeptLogits(as_list=is_spread(model)) if takes_logits_to_keep(model) else AllLogits()
    collate = SequenceCollator(tokenizer.pad_token_id, PaddingMask(), targets)
    device = model.get_input_embeddings().weight.device
    found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    at_once = min(batch_size, LOSS_ROWS)
    with in_eval_mode(model):
        for start in range(0, len(order), at_once):
            group = order[start : start + at_once]
            batch = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in collate([rows[index] for index in group]).items()
            }
            losses, tokens = row_losses(model, batch)
            for index, *pair in zip(group, losses.tolist(), tokens.tolist(), strict=True):
                found[index] = (pair[0], pair[1])
    return found


def rouge(answers: Sequence[str], references: Sequence[str]) -> tuple[float, float, float]:
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L F-measure, 0 to 100, over the rows whose reference has words to count."""
    rows = rouge_rows(answers, [[reference] for reference in references])
    one, two, longest = (measure_of(key).of(rows) or 0.0 for key in ("rouge1", "rouge2", "rouge_l"))
    return one, two, longest


@at("generation")
def evaluate(
    model: torch.nn.Module,
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
    progress: bool = True,
) -> Evaluation:
    """Asks the model with its adapters off and on about the same rows, in the same prompts.

    Args:
        model: a peft model.
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
        progress: whether to show a bar.

    Raises:
        UserError: the metric can't be used; nothing was asked yet.
    """
    asking = _Asking(make_template(template, tokenizer), max_tokens, config.max_new_tokens, long_rows)
    usable, remarks = asking.usable(examples)
    items, rows, skipped = _held_out(usable, set(train_keys))
    references = [reference for row in rows for reference in row["references"]]
    scored_by, reason = metric_for(config, train_answers, references, function=metric)
    labelled = asking.labelled(items)
    asked, trimmed, more = _asked(items, tokenizer, config, asking, shots, only)
    losses, form = _answered(model, tokenizer, rows, asked, config, labelled, progress=progress)
    if "base_few" in asked and shots and asking.template.name != "chat":
        for row in rows:
            answer = row["answers"]["base_few"]
            answer["text"] = first_answer(answer["text"], shots[: config.few_shot], asking.template.opening(shots[0]))
    remarks += more
    score_answers(rows, scored_by)
    scores = {name: _scores([row["answers"][name] for row in rows], losses[name], scored_by) for name in asked}
    against = {
        name: compare(rows, name, "tuned", metric=scored_by) for name in asked if name != "tuned" and "tuned" in asked
    }
    scoring = Scoring(scored_by.name, scored_by.task, scored_by.main, scored_by.measures, reason, scored_by.notes)
    remarks += unscored(rows, scored_by)
    return Evaluation(scores, tuple(rows), trimmed, against, skipped, form, scoring, tuple(remarks))


@dataclasses.dataclass(frozen=True)
class _Asking:
    """How rows become prompts: their template, and the tokens of the longest row and of the longest answer."""

    template: Template
    max_tokens: int
    answer_tokens: int
    long_rows: str

    def usable(self, examples: Sequence[Example]) -> tuple[list[Example], list[str]]:
        """The rows that can be asked, and a remark on those that can't."""
        found, reasons = [], Counter[str]()
        for example in examples:
            try:
                if example.is_document:
                    raise RowProblem("a document asks for no answer")
                self.template.render(example)
                self.prompt(example)
                found.append(example)
            except RowProblem as problem:
                reasons[str(problem)] += 1
        return found, [f"{count} held-out rows were not asked: {reason}" for reason, count in reasons.items()]

    def prompt(self, example: Example) -> Prompt:
        room = self.max_tokens - self.answer_tokens
        return prompt_tokens(example, self.template, max_tokens=room, long_rows=self.long_rows)

    def prompts(self, examples: Sequence[Example]) -> tuple[list[list[int]], int]:
        """The prompt of each row, and how many were cut."""
        found = [self.prompt(example) for example in examples]
        return [prompt.ids for prompt in found], sum(prompt.trimmed_tokens > 0 for prompt in found)

    def labelled(self, items: Sequence[Example]) -> dict[int, dict[str, Any]]:
        """Labels each row's last answer by the row's index; a row whose answer alone exceeds `max_tokens` is skipped."""
        found = {}
        for index, item in enumerate(items):
            learned = dataclasses.replace(item.messages[-1], learned=True)
            asked = dataclasses.replace(item, messages=(*item.messages[:-1], learned))
            row = label_row(
                asked, self.template, train_on="last_turn", max_tokens=self.max_tokens, long_rows=self.long_rows
            )
            if row is not None:
                found[index] = row.sequence
        return found


def _asked(
    items: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    asking: _Asking,
    shots: Sequence[Example] | None,
    only: Collection[str],
) -> tuple[dict[str, list[list[int]]], int, list[str]]:
    """The prompts of each model that is asked, how many were trimmed, and what a person should know of them."""
    prompts, trimmed = asking.prompts(items)
    asked, remarks = {"base": prompts}, []
    if config.chat_baseline and asking.template.name != "chat" and tokenizer.chat_template and "base_chat" in only:
        try:
            chat = dataclasses.replace(asking, template=make_template("chat", tokenizer))
            asked["base_chat"], _ = chat.prompts(items)
        except (ModelError, RowProblem) as error:
            reason = f"{error.problem} ({error.got})" if isinstance(error, ModelError) and error.got else str(error)
            remarks.append(f"the untuned model was not asked under its own chat template: {reason}")
    if config.few_shot and shots is not None and items and "base_few" in only:
        template = asking.template
        try:
            found = few_shot_prompts(
                items,
                shots[: config.few_shot],
                lambda item, before: prompt_tokens(with_shots(item, before), template).ids,
                asking.max_tokens - asking.answer_tokens,
            )
            remarks.append(found.remark() if found is not None else no_examples(shots))
            if found is not None:
                asked["base_few"] = found.ids
        except RowProblem as problem:
            remarks.append(f"the untuned model was not asked with examples in its prompt: {problem}")
    asked["tuned"] = prompts
    return {name: questions for name, questions in asked.items() if name in only}, trimmed, remarks


def _answered(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    asked: dict[str, list[list[int]]],
    config: EvaluationConfig,
    labelled: dict[int, dict[str, Any]],
    *,
    progress: bool,
) -> tuple[dict[str, float | None], tuple[str, ...]]:
    """Adds each model's answers to the rows; returns the models' losses, and how the answers were made."""
    from tqdm.auto import tqdm

    longest = max((len(prompt) for several in asked.values() for prompt in several), default=0) + config.max_new_tokens
    losses: dict[str, float | None] = dict.fromkeys(asked)
    with (
        tqdm(total=len(asked) * len(rows), desc="answering", disable=not progress, leave=False) as bar,
        answering_form(model, rows=min(config.batch_size, len(rows)), tokens=longest) as form,
    ):
        for name, questions in asked.items():
            bar.set_postfix_str(MODELS[name])
            with contextlib.nullcontext() if name == "tuned" else model.disable_adapter():
                given = generate(model, tokenizer, questions, config, progress=bar.update, form=form)
                for row, answer in zip(rows, given, strict=True):
                    row["answers"][name] = asdict(answer)
                if name in ("base", "tuned"):
                    found = summary_losses(model, tokenizer, list(labelled.values()), config.batch_size)
                    losses[name] = _add_losses([row["answers"][name] for row in rows], found, labelled)
        return losses, tuple(str(form).splitlines())


def _held_out(
    examples: Sequence[Example], trained: set[str]
) -> tuple[list[Example], list[dict[str, Any]], tuple[str, ...]]:
    """Merges rows with the same prompt into one, and returns the ids of those that were trained on separately."""
    kept: dict[str, tuple[Example, dict[str, Any]]] = {}
    skipped = []
    for item in examples:
        key = prompt_key(item)
        if is_known(item, trained):
            skipped.append(item.id)
        elif key in kept:
            kept[key][1]["references"] += [item.answer, *item.references]
        else:
            row = {
                "id": item.id,
                "dialogue": item.prompt,
                "summary": item.answer,
                "references": [item.answer, *item.references],
                "answers": {},
            }
            kept[key] = (item, row)
    return [item for item, _ in kept.values()], [row for _, row in kept.values()], tuple(skipped)


def _add_losses(
    answers: Sequence[dict[str, Any]], losses: Sequence[tuple[float, int]], indices: Iterable[int]
) -> float | None:
    """Adds the losses of the rows with these indices to their answers, and returns the mean."""
    for index, (nats, tokens) in zip(indices, losses, strict=True):
        answers[index] |= {"nats": nats, "loss_tokens": tokens}
    return mean_loss([nats for nats, _ in losses], [tokens for _, tokens in losses])


def _scores(answers: Sequence[dict[str, Any]], loss: float | None, metric: Metric) -> Scores:
    def mean(key: str) -> float:
        return sum(answer[key] for answer in answers) / max(1, len(answers))

    found = {key: measure_of(key).of(answers) for key in metric.measures}
    one, two, longest = (found.get(key) for key in ("rouge1", "rouge2", "rouge_l"))
    low, high = interval(measure_of(metric.main), answers) or (None, None)
    return Scores(one, two, longest, mean("stopped"), mean("tokens"), loss, mean("repetition"), found, low, high)
