"""Compares base and tuned model on the same held-out rows: answers, ROUGE, loss, and how often an answer ends by itself.

ROUGE: Lin 2004 (aclanthology.org/W04-1013), by the rouge-score package with stemming. Knows nothing of training or run folders.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from qlora_helpers.base.config import EvaluationConfig
from qlora_helpers.base.place import at
from qlora_helpers.data.batches import AllLogits, KeptLogits, PaddingMask, SequenceCollator
from qlora_helpers.data.duplicates import is_known, prompt_key
from qlora_helpers.data.examples import Example
from qlora_helpers.data.labels import label_row
from qlora_helpers.data.prompts import prompt_tokens
from qlora_helpers.evaluation.fast_answers.answer import answering_form
from qlora_helpers.evaluation.generate import generate
from qlora_helpers.evaluation.metrics.text import rouge_rows
from qlora_helpers.evaluation.result import MODELS, Evaluation, Scores
from qlora_helpers.evaluation.scorecard import compare, mean_loss, score_answers
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
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L F-measure, 0 to 100."""
    rows = rouge_rows(answers, [[reference] for reference in references])
    one, two, longest = (sum(row[name] for row in rows) / max(1, len(rows)) for name in ("rouge1", "rouge2", "rouge_l"))
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
    train_keys: Collection[str] = (),
    only: Collection[str] = tuple(MODELS),
    progress: bool = True,
) -> Evaluation:
    """Asks the model with its adapters off and on about the same rows, in the same prompts.

    Args:
        model: a peft model.
        tokenizer: the model's.
        examples: held-out rows; those with one prompt become one row with several references.
        config: generation settings.
        template: the prompt that was trained.
        max_tokens: of the longest row; a longer dialogue is trimmed as in training.
        train_keys: `duplicates.prompt_key` of every training row: a held-out row that is among them is skipped.
        only: which of `MODELS` are asked.
        progress: whether to show a bar.
    """
    from tqdm.auto import tqdm

    items, rows, skipped = _held_out(examples, set(train_keys))
    labelled = _labelled(items, tokenizer, template, max_tokens)
    prompts, trimmed = _prompts(items, tokenizer, template, max_tokens, config.max_new_tokens)
    asked = {"base": prompts, "tuned": prompts}
    if config.chat_baseline and template != "chat" and tokenizer.chat_template:
        chat, _ = _prompts(items, tokenizer, "chat", max_tokens, config.max_new_tokens)
        asked = {"base": prompts, "base_chat": chat, "tuned": prompts}
    asked = {name: questions for name, questions in asked.items() if name in only}
    longest = max((len(prompt) for several in asked.values() for prompt in several), default=0) + config.max_new_tokens
    losses: dict[str, float | None] = {}
    with (
        tqdm(total=len(asked) * len(items), desc="answering", disable=not progress, leave=False) as bar,
        answering_form(model, rows=min(config.batch_size, len(items)), tokens=longest) as form,
    ):
        for name, questions in asked.items():
            bar.set_postfix_str(MODELS[name])
            with contextlib.nullcontext() if name == "tuned" else model.disable_adapter():
                given = generate(model, tokenizer, questions, config, progress=bar.update, form=form)
                for row, answer in zip(rows, given, strict=True):
                    row["answers"][name] = asdict(answer)
                losses[name] = None
                if name != "base_chat":
                    found = summary_losses(model, tokenizer, list(labelled.values()), config.batch_size)
                    losses[name] = _add_losses([row["answers"][name] for row in rows], found, labelled)
    score_answers(rows)
    scores = {name: _scores([row["answers"][name] for row in rows], losses[name]) for name in asked}
    against = {name: compare(rows, name, "tuned") for name in asked if name != "tuned" and "tuned" in asked}
    return Evaluation(scores, tuple(rows), trimmed, against, skipped, tuple(str(form).splitlines()))


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


def _labelled(
    items: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: str, max_tokens: int
) -> dict[int, dict[str, Any]]:
    """Labels each row by its index; a row whose summary alone exceeds `max_tokens` is skipped."""
    found = {}
    for index, item in enumerate(items):
        row = label_row(item.id, item.prompt, item.answer, tokenizer, template=template, max_tokens=max_tokens)
        if row is not None:
            found[index] = {"input_ids": row.input_ids, "labels": row.labels, "segment_ids": [1] * len(row)}
    return found


def _add_losses(
    answers: Sequence[dict[str, Any]], losses: Sequence[tuple[float, int]], indices: Iterable[int]
) -> float | None:
    """Adds the losses of the rows with these indices to their answers, and returns the mean."""
    for index, (nats, tokens) in zip(indices, losses, strict=True):
        answers[index] |= {"nats": nats, "loss_tokens": tokens}
    return mean_loss([nats for nats, _ in losses], [tokens for _, tokens in losses])


def _scores(answers: Sequence[dict[str, Any]], loss: float | None) -> Scores:
    def mean(key: str) -> float:
        return sum(answer[key] for answer in answers) / max(1, len(answers))

    return Scores(
        mean("rouge1"), mean("rouge2"), mean("rouge_l"), mean("stopped"), mean("tokens"), loss, mean("repetition")
    )


def _prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: str, max_tokens: int, room: int
) -> tuple[list[list[int]], int]:
    prompts, trimmed = [], 0
    for item in examples:
        tokens = prompt_tokens(item.prompt, template, tokenizer)
        trimmed += len(tokens) + room > max_tokens
        prompts.append(tokens.fitted(max_tokens - room).ids)
    return prompts, trimmed
