"""Base and tuned model on the same held-out rows: answers, ROUGE, loss, and how often an answer ends by itself.

ROUGE: Lin 2004 (aclanthology.org/W04-1013), by the rouge-score package with stemming. Knows nothing of training or run folders.
"""

from __future__ import annotations

import contextlib
import html
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlora_helpers.blocks import BlockCollator, row_losses, takes_logits_to_keep
from qlora_helpers.config import EvaluationConfig
from qlora_helpers.generation import generation_settings
from qlora_helpers.labels import label_row
from qlora_helpers.prompts import prompt_tokens
from qlora_helpers.sources import Dialogue
from qlora_helpers.tables import html_table, text_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


@dataclass(frozen=True)
class Scores:
    """One model under one prompt, over all held-out rows.

    Attributes:
        rouge1, rouge2, rouge_l: mean F-measure, 0 to 100.
        loss: nats a summary token; None where the model was only asked for answers.
        stop_rate: share of the answers that ended by themselves, 0 to 1.
        mean_tokens: length of an answer.
    """

    rouge1: float
    rouge2: float
    rouge_l: float
    stop_rate: float
    mean_tokens: float
    loss: float | None = None

    @property
    def perplexity(self) -> float | None:
        """exp of the loss."""
        return None if self.loss is None else math.exp(min(self.loss, 50.0))


MODELS = {"base": "untuned", "base_chat": "untuned, chat template", "tuned": "tuned"}


@dataclass(frozen=True)
class Evaluation:
    """The comparison; what `evaluation.json` holds.

    Attributes:
        scores: `base`, `tuned` and, where it was asked, `base_chat` (the untuned model under its own chat template).
        rows: one object a held-out row: `id`, `dialogue`, `summary` and each model's `answers`.
        prompt_tokens_trimmed: rows whose dialogue was cut to fit the block.
    """

    scores: dict[str, Scores]
    rows: tuple[dict[str, Any], ...]
    prompt_tokens_trimmed: int = 0

    @property
    def rouge_l_gain(self) -> float:
        """Points of ROUGE-L, tuned over untuned on the same prompt."""
        return self.scores["tuned"].rouge_l - self.scores["base"].rouge_l

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and lines of the comparison."""
        header = ["model", "ROUGE-1", "ROUGE-2", "ROUGE-L", "stops", "tokens", "loss", "perplexity"]
        lines = []
        for name, score in self.scores.items():
            loss = "" if score.loss is None else f"{score.loss:.3f}"
            perplexity = "" if score.perplexity is None else f"{score.perplexity:,.1f}"
            lines.append(
                [MODELS[name], f"{score.rouge1:.1f}", f"{score.rouge2:.1f}", f"{score.rouge_l:.1f}",
                 f"{score.stop_rate:.0%}", f"{score.mean_tokens:.0f}", loss, perplexity]
            )  # fmt: skip
        return header, lines

    def __repr__(self) -> str:
        header, lines = self.table()
        return text_table(header, lines, numbers=range(1, len(header)))

    def _repr_html_(self) -> str:
        header, lines = self.table()
        return html_table(header, lines, numbers=range(1, len(header)), caption=f"{len(self.rows)} held-out rows")

    def side_by_side(self, rows: int = 5) -> SideBySide:
        """The first rows: dialogue, reference and each model's answer."""
        return SideBySide(self.rows[:rows])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        scores = {name: asdict(score) | {"perplexity": score.perplexity} for name, score in self.scores.items()}
        return {
            "scores": scores, "rouge_l_gain": self.rouge_l_gain, "prompt_tokens_trimmed": self.prompt_tokens_trimmed,
            "rows": list(self.rows),
        }  # fmt: skip


def evaluation_from_dict(values: dict[str, Any]) -> Evaluation:
    """Reads back what `Evaluation.to_dict` wrote."""
    known = Scores.__dataclass_fields__
    scores = {
        name: Scores(**{key: item for key, item in score.items() if key in known})
        for name, score in values["scores"].items()
    }
    return Evaluation(scores, tuple(values["rows"]), values["prompt_tokens_trimmed"])


class SideBySide:
    """Dialogues with the reference and the answers beside them; everything is escaped, nothing in a dialogue is ever run."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows

    def __repr__(self) -> str:
        parts = []
        for row in self.rows:
            answers = [f"{MODELS[name] + ':':<24} {_one_line(a['text'])}" for name, a in row["answers"].items()]
            parts.append("\n".join([row["dialogue"], f"{'reference:':<24} {row['summary']}", *answers]))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        cell = "text-align:left;vertical-align:top;white-space:pre-wrap;max-width:22em;padding:6px 10px"
        names = ["dialogue", "reference", *(MODELS[name] for name in (self.rows[0]["answers"] if self.rows else ()))]
        head = "".join(f"<th style='{cell}'>{html.escape(name)}</th>" for name in names)
        lines = []
        for row in self.rows:
            texts = [row["dialogue"], row["summary"], *(_one_line(a["text"]) for a in row["answers"].values())]
            lines.append("<tr>" + "".join(f"<td style='{cell}'>{html.escape(text)}</td>" for text in texts) + "</tr>")
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _one_line(text: str, most: int = 400) -> str:
    shown = " ".join(text.split())
    return shown if len(shown) <= most else shown[:most] + " ..."


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: EvaluationConfig,
    *,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> list[Answer]:
    """Answers prompts in batches of similar length, greedily or by sampling.

    Args:
        model: with or without adapters.
        tokenizer: the model's.
        prompts: token ids of each.
        config: batch size, longest answer, sampling.
        seed: of the sampling.
        progress: told how many prompts were answered.

    Returns:
        An answer for each prompt, in the order given.
    """
    settings = generation_settings(tokenizer, config)
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
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
    model.train(was_training)
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


@torch.no_grad()
def summary_loss(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], batch_size: int
) -> float:
    """Mean loss over all trained tokens of labelled rows, in nats a token."""
    collate = BlockCollator(tokenizer.pad_token_id, packed=False, keep_trained_logits=takes_logits_to_keep(model))
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
    at_once = min(batch_size, LOSS_ROWS)
    for start in range(0, len(rows), at_once):
        batch = {name: value.to(device) for name, value in collate(rows[start : start + at_once]).items()}
        losses, tokens = row_losses(model, batch)
        total, count = total + float(losses.sum()), count + int(tokens.sum())
    model.train(was_training)
    return total / max(1, count)


def rouge(answers: Sequence[str], references: Sequence[str]) -> tuple[float, float, float]:
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L F-measure, 0 to 100."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    results = [
        scorer.score(reference, answer) for reference, answer in zip(references, answers, strict=True)
    ]  # fmt: skip
    one, two, longest = (
        100 * sum(result[name].fmeasure for result in results) / max(1, len(results)) for name in names
    )
    return one, two, longest


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Dialogue],
    config: EvaluationConfig,
    *,
    template: str,
    max_tokens: int,
    progress: bool = True,
) -> Evaluation:
    """Asks the model with its adapters off and on, on the same rows and prompts.

    Args:
        model: a peft model.
        tokenizer: the model's.
        dialogues: held-out rows.
        config: generation settings.
        template: the prompt that was trained.
        max_tokens: longest row; a longer dialogue is trimmed as in training.
        progress: whether to show a bar.
    """
    from tqdm.auto import tqdm

    prompts, trimmed = _prompts(dialogues, tokenizer, template, max_tokens, config.max_new_tokens)
    labelled = _labelled(dialogues, tokenizer, template, max_tokens)
    asked = {"base": prompts, "tuned": prompts}
    if config.chat_baseline and template != "chat" and tokenizer.chat_template:
        chat, _ = _prompts(dialogues, tokenizer, "chat", max_tokens, config.max_new_tokens)
        asked = {"base": prompts, "base_chat": chat, "tuned": prompts}
    scores, answers = {}, {}
    with tqdm(total=len(asked) * len(dialogues), desc="answering", disable=not progress, leave=False) as bar:
        for name, questions in asked.items():
            bar.set_postfix_str(MODELS[name])
            with contextlib.nullcontext() if name == "tuned" else model.disable_adapter():
                given = generate(model, tokenizer, questions, config, progress=bar.update)
                loss = None
                if name != "base_chat" and labelled:
                    loss = summary_loss(model, tokenizer, labelled, config.batch_size)
            answers[name], scores[name] = given, _score(given, dialogues, loss)
    rows = tuple(
        {"id": item.id, "dialogue": item.dialogue, "summary": item.summary,
         "answers": {name: asdict(given[index]) for name, given in answers.items()}}
        for index, item in enumerate(dialogues)
    )  # fmt: skip
    return Evaluation(scores, rows, trimmed)


def _score(answers: Sequence[Answer], dialogues: Sequence[Dialogue], loss: float | None) -> Scores:
    one, two, longest = rouge([answer.text for answer in answers], [item.summary for item in dialogues])
    count = max(1, len(answers))
    stops = sum(answer.stopped for answer in answers) / count
    return Scores(one, two, longest, stops, sum(answer.tokens for answer in answers) / count, loss)


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


def _labelled(
    dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerBase, template: str, max_tokens: int
) -> list[dict[str, Any]]:
    rows = [
        label_row(item.id, item.dialogue, item.summary, tokenizer, template=template, max_tokens=max_tokens)
        for item in dialogues
    ]
    return [
        {"input_ids": row.input_ids, "labels": row.labels, "segment_ids": [1] * len(row)} for row in rows if row
    ]  # fmt: skip


def same_answers(
    live: torch.nn.Module, reloaded: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]
) -> float:
    """Largest difference between two models' next-token logits on the same prompts; 0.0 when they are the same model."""
    worst = 0.0
    for prompt in prompts:
        outputs = []
        for model in (live, reloaded):
            was_training = model.training
            model.eval()
            device = model.get_input_embeddings().weight.device
            with torch.no_grad():
                outputs.append(model(input_ids=torch.tensor([prompt], device=device)).logits[0, -1].float().cpu())
            model.train(was_training)
        worst = max(worst, float((outputs[0] - outputs[1]).abs().max()))
    return worst
