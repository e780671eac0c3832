"""Gives each model's answers to the held-out rows, and the loss on their references; what is known already is not asked again.

Knows nothing of scores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlora_helpers.base import phases
from qlora_helpers.base.config import EvaluationConfig
from qlora_helpers.base.place import at
from qlora_helpers.data.batches import AllLogits, KeptLogits, PaddingMask, SequenceCollator
from qlora_helpers.evaluation.fast_answers.answer import AnswerForm, answering_form
from qlora_helpers.evaluation.generate import Answer, generate
from qlora_helpers.evaluation.kept_answers import KEY, KeptAnswers
from qlora_helpers.evaluation.scorecard import mean_loss
from qlora_helpers.evaluation.worth import model_name
from qlora_helpers.model.several import answering_as
from qlora_helpers.model.wiring import in_eval_mode, is_spread, row_losses, takes_logits_to_keep

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

LOSS_ROWS = 6  # at once; with more, padding and the logits of a large vocabulary cost more than the batch saves
Opened = Callable[[], "PeftModel"]


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


@dataclass(frozen=True)
class Asked:
    """What one model is asked.

    Attributes:
        name: the model's name in an evaluation.
        prompts: token ids for each row.
        labelled: the tokens and labels of each row that has a loss, by the row's index; None takes no loss.
    """

    name: str
    prompts: Sequence[list[int]]
    labelled: Mapping[int, dict[str, Any]] | None

    def digests(self, kept: KeptAnswers, config: EvaluationConfig) -> list[str]:
        """The digest of each row's question."""
        labelled = self.labelled or {}
        return [kept.digest(self.name, config, ids, labelled.get(index)) for index, ids in enumerate(self.prompts)]

    def without_loss(self, kept: KeptAnswers, digests: Sequence[str]) -> list[int]:
        """The rows whose loss is not known."""
        return [index for index in self.labelled or () if "nats" not in kept.known.get(digests[index], {})]


def answer_rows(
    model: PeftModel | Opened,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    asked: Sequence[Asked],
    config: EvaluationConfig,
    kept: KeptAnswers,
    *,
    adapters: Mapping[str, str],
    progress: bool,
) -> tuple[str, ...]:
    """Adds each model's answers to the rows, with their losses.

    Args:
        model: the peft model, or a function that returns it, which is called where an answer is missing.
        tokenizer: the model's.
        rows: each gets `answers` by the models' names.
        asked: the models, in the order in which they are asked.
        config: generation settings.
        kept: the answers that are known, each under its digest; takes the new ones.
        adapters: the name in the model of each other run's adapter, by the run's name in the evaluation; may be filled by `model`.
        progress: whether to show a bar.

    Returns:
        How the answers were made.
    """
    digests = {each.name: each.digests(kept, config) for each in asked}
    missing = {
        each.name: [i for i, digest in enumerate(digests[each.name]) if digest not in kept.known] for each in asked
    }
    total, new = len(asked) * len(rows), sum(map(len, missing.values()))
    form = kept.form
    if new or any(each.without_loss(kept, digests[each.name]) for each in asked):
        kept.begin(total, total - new)
        opened = model if isinstance(model, torch.nn.Module) else model()
        longest = max((len(ids) for each in asked for ids in each.prompts), default=0) + config.max_new_tokens
        with (
            _bar(total, total - new, progress) as bar,
            answering_form(opened, rows=min(config.batch_size, max(1, new)), tokens=longest) as found,
        ):
            for each in asked:
                bar.set_postfix_str(model_name(each.name))
                with answering_as(opened, _adapter(opened, each.name, adapters)):
                    work = _Work(opened, tokenizer, config, kept, each, digests[each.name])
                    work.answer(missing[each.name], bar.update, found)
                    work.losses()
            form = tuple(str(found).splitlines())
    else:
        kept.reused = total
    for each in asked:
        for row, digest in zip(rows, digests[each.name], strict=True):
            row["answers"][each.name] = dict(kept.known[digest]) | {KEY: digest}
    return form


def _adapter(model: PeftModel, name: str, adapters: Mapping[str, str]) -> str | None:
    if name in adapters:
        return adapters[name]
    return model.active_adapters[0] if name == "tuned" else None


@contextlib.contextmanager
def _bar(total: int, known: int, shown: bool) -> Iterator[Any]:
    with phases.bar("answering", total=total, unit=" answers", initial=known, disable=not shown) as bar:
        yield bar


@dataclass(frozen=True)
class _Work:
    """The questions to one model, and where its answers are kept."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    config: EvaluationConfig
    kept: KeptAnswers
    asked: Asked
    digests: Sequence[str]

    def answer(self, missing: Sequence[int], progress: Callable[[int], Any], form: AnswerForm) -> None:
        """Asks the rows whose answers are missing; each answer is kept as soon as it is there."""
        if not missing:
            return
        name = self.asked.name

        def given(place: int, answer: Answer) -> None:
            self.kept.add(self.digests[missing[place]], name, asdict(answer))

        prompts = [self.asked.prompts[index] for index in missing]
        answers = generate(self.model, self.tokenizer, prompts, self.config, progress=progress, given=given, form=form)
        for place, answer in enumerate(answers):
            if self.digests[missing[place]] not in self.kept.known:
                given(place, answer)

    def losses(self) -> None:
        """Takes the losses that are missing."""
        rows = self.asked.without_loss(self.kept, self.digests)
        labelled = self.asked.labelled or {}
        found = summary_losses(self.model, self.tokenizer, [labelled[index] for index in rows], self.config.batch_size)
        for index, (nats, tokens) in zip(rows, found, strict=True):
            self.kept.add(self.digests[index], self.asked.name, {"nats": nats, "loss_tokens": tokens})
