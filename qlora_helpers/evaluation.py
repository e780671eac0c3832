"""Base and tuned model on the same held-out rows: answers, ROUGE, loss, and how often an answer ends by itself.

ROUGE: Lin 2004 (aclanthology.org/W04-1013), by the rouge-score package with stemming. Knows nothing of training or run folders.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlora_helpers.blocks import BlockCollator, is_spread, row_losses, takes_logits_to_keep
from qlora_helpers.config import EvaluationConfig
from qlora_helpers.evaluation_result import MODELS, Evaluation, Scores, evaluation_from_dict
from qlora_helpers.fast_answers import AnswerForm, NotFast, answer_fast, answering_form
from qlora_helpers.generation import generation_settings
from qlora_helpers.labels import label_row
from qlora_helpers.prompts import prompt_tokens
from qlora_helpers.scorecard import compare, dialogue_key, mean_loss, rouge_rows, score_answers
from qlora_helpers.sources import Dialogue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


__all__ = [
    "Answer",
    "Evaluation",
    "Scores",
    "evaluate",
    "evaluation_from_dict",
    "generate",
    "rouge",
    "same_answers",
    "summary_loss",
]

LOSS_ROWS = 6  # more rows of unlike length at once cost more padding, and logits of a large vocabulary, than they save


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without control tokens.
        tokens: new tokens, the end-of-text token counted.
        stopped: whether it ended by itself, before the limit.
    """

    text: str
    tokens: int
    stopped: bool


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: EvaluationConfig,
    *,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
    form: AnswerForm | None = None,
) -> list[Answer]:
    """Answers prompts in batches of similar length, greedily or by sampling.

    Args:
        model: with or without adapters.
        tokenizer: the model's.
        prompts: token ids of each.
        config: batch size, longest answer, sampling.
        seed: of the sampling.
        progress: told how many prompts were answered.
        form: what `fast_answers.answering_form` opened: greedy answers then come the fast way, which `form` is told of; None takes
            `model.generate`.

    Returns:
        An answer for each prompt, in the order given.
    """
    was_training = model.training
    model.eval()
    try:
        if form is not None and not config.do_sample:
            try:
                lines = answer_fast(
                    model, prompts, pad=tokenizer.pad_token_id, end=tokenizer.eos_token_id, most=config.max_new_tokens,
                    slots=config.batch_size, form=form, progress=progress,
                )  # fmt: skip
                return [_answer(line, tokenizer) for line in lines]
            except NotFast as reason:
                form.note(f"answers by model.generate: {reason}")
        return _generate_plainly(model, tokenizer, prompts, config, seed, progress)
    finally:
        model.train(was_training)


def _generate_plainly(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], config: EvaluationConfig,
    seed: int, progress: Callable[[int], Any] | None,
) -> list[Answer]:  # fmt: skip
    settings = generation_settings(tokenizer, config)
    device = model.get_input_embeddings().weight.device
    torch.manual_seed(seed)
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), config.batch_size):
        group = order[start : start + config.batch_size]
        ids, mask = _left_padded([prompts[index] for index in group], tokenizer.pad_token_id, device)
        produced = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for index, line in zip(group, produced[:, ids.shape[1] :].tolist(), strict=True):
            answers[index] = _answer(line, tokenizer)
        if progress is not None:
            progress(len(group))
    return [answers[index] for index in range(len(prompts))]


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _answer(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    stopped = tokenizer.eos_token_id in tokens
    if stopped:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id) + 1]
    return Answer(tokenizer.decode(tokens, skip_special_tokens=True).strip(), len(tokens), stopped)


def summary_loss(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], batch_size: int
) -> float:
    """Mean loss over all trained tokens of labelled rows, in nats a token: weighted by tokens, whatever the batches."""
    losses = summary_losses(model, tokenizer, rows, batch_size)
    return mean_loss([nats for nats, _ in losses], [tokens for _, tokens in losses]) or 0.0


@torch.no_grad()
def summary_losses(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], batch_size: int
) -> list[tuple[float, int]]:
    """Loss summed over each row's trained tokens, nats, and their number; in the order of the rows."""
    collate = BlockCollator(
        tokenizer.pad_token_id, packed=False, keep_trained_logits=takes_logits_to_keep(model), plain_positions=is_spread(model)
    )  # fmt: skip
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    at_once = min(batch_size, LOSS_ROWS)
    for start in range(0, len(order), at_once):
        group = order[start : start + at_once]
        batch = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in collate([rows[index] for index in group]).items()
        }
        losses, tokens = row_losses(model, batch)
        for index, *pair in zip(group, losses.tolist(), tokens.tolist(), strict=True):
            found[index] = (pair[0], pair[1])
    model.train(was_training)
    return found


def rouge(answers: Sequence[str], references: Sequence[str]) -> tuple[float, float, float]:
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L F-measure, 0 to 100."""
    rows = rouge_rows(answers, [[reference] for reference in references])
    one, two, longest = (sum(row[name] for row in rows) / max(1, len(rows)) for name in ("rouge1", "rouge2", "rouge_l"))
    return one, two, longest


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Dialogue],
    config: EvaluationConfig,
    *,
    template: str,
    max_tokens: int,
    train_keys: Collection[str] = (),
    only: Collection[str] = tuple(MODELS),
    progress: bool = True,
) -> Evaluation:
    """Asks the model with its adapters off and on, on the same rows and prompts.

    Args:
        model: a peft model.
        tokenizer: the model's.
        dialogues: held-out rows; those with one dialogue become one row with several references.
        config: generation settings.
        template: the prompt that was trained.
        max_tokens: longest row; a longer dialogue is trimmed as in training.
        train_keys: `scorecard.dialogue_key` of what was trained on: a held-out row that is among them is left out.
        only: which of `MODELS` are asked.
        progress: whether to show a bar.
    """
    from tqdm.auto import tqdm

    items, rows, left_out = _held_out(dialogues, set(train_keys))
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
                    losses[name] = _add_losses(model, tokenizer, items, rows, name, config, template, max_tokens)
    score_answers(rows)
    scores = {name: _scores([row["answers"][name] for row in rows], losses[name]) for name in asked}
    against = {name: compare(rows, name, "tuned") for name in asked if name != "tuned" and "tuned" in asked}
    return Evaluation(scores, tuple(rows), trimmed, against, left_out, tuple(str(form).splitlines()))


def _held_out(
    dialogues: Sequence[Dialogue], trained: set[str]
) -> tuple[list[Dialogue], list[dict[str, Any]], tuple[str, ...]]:
    """Rows with one dialogue as one row, and apart the ids of those that were trained on."""
    kept: dict[str, tuple[Dialogue, dict[str, Any]]] = {}
    left_out = []
    for item in dialogues:
        key = dialogue_key(item.dialogue)
        if key in trained:
            left_out.append(item.id)
        elif key in kept:
            kept[key][1]["references"] += [item.summary, *item.references]
        else:
            row = {
                "id": item.id,
                "dialogue": item.dialogue,
                "summary": item.summary,
                "references": [item.summary, *item.references],
                "answers": {},
            }
            kept[key] = (item, row)
    return [item for item, _ in kept.values()], [row for _, row in kept.values()], tuple(left_out)


def _add_losses(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, items: Sequence[Dialogue], rows: Sequence[dict[str, Any]],
    name: str, config: EvaluationConfig, template: str, max_tokens: int,
) -> float | None:  # fmt: skip
    """Each row's loss beside its answer, and the mean; a row whose summary does not fit the block has none."""
    labelled = {}
    for index, item in enumerate(items):
        row = label_row(item.id, item.dialogue, item.summary, tokenizer, template=template, max_tokens=max_tokens)
        if row is not None:
            labelled[index] = {"input_ids": row.input_ids, "labels": row.labels, "segment_ids": [1] * len(row)}
    losses = summary_losses(model, tokenizer, list(labelled.values()), config.batch_size)
    for index, (nats, tokens) in zip(labelled, losses, strict=True):
        rows[index]["answers"][name] |= {"nats": nats, "loss_tokens": tokens}
    return mean_loss([nats for nats, _ in losses], [tokens for _, tokens in losses])


def _scores(answers: Sequence[dict[str, Any]], loss: float | None) -> Scores:
    def mean(key: str) -> float:
        return sum(answer[key] for answer in answers) / max(1, len(answers))

    return Scores(
        mean("rouge1"), mean("rouge2"), mean("rouge_l"), mean("stopped"), mean("tokens"), loss, mean("repetition")
    )


def _prompts(
    dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerBase, template: str, max_tokens: int, room: int
) -> tuple[list[list[int]], int]:
    prompts, trimmed = [], 0
    for item in dialogues:
        tokens = prompt_tokens(item.dialogue, template, tokenizer)
        excess = max(0, len(tokens) + room - max_tokens)
        trimmed += excess > 0
        prompts.append(tokens.trimmed(excess).ids)
    return prompts, trimmed


def same_answers(
    live: torch.nn.Module, reloaded: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]
) -> float:
    """Largest difference between two models' next-token logits on the same prompts; 0.0 when they are the same model."""
    pairs = zip(next_token_logits(live, prompts), next_token_logits(reloaded, prompts), strict=True)
    return max((float((one - other).abs().max()) for one, other in pairs), default=0.0)


@torch.no_grad()
def next_token_logits(model: torch.nn.Module, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    """`(vocabulary,)` after each prompt, in 32 bits on the CPU."""
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    found = [model(input_ids=torch.tensor([prompt], device=device)).logits[0, -1].float().cpu() for prompt in prompts]
    model.train(was_training)
    return found
