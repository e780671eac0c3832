"""Finds out whether two models are the same by what they answer to held-out prompts: next-token logits and greedy answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.model.run_model import RunModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.evaluation.generate import Answer

RELOAD_TOLERANCE = 1e-4


def answered(asked: RunModel, data: PreparedData, prompts: int) -> tuple[list[Any], list[Answer]]:
    """Next-token logits and short greedy answers to the first held-out rows, in the prompt that was trained."""
    from qlora_helpers.data.prompts import prompt_tokens
    from qlora_helpers.data.templates import template_of
    from qlora_helpers.evaluation import generate

    config = asked.run.config()
    template, room = template_of(config.data, asked.tokenizer), config.data.seq_len_tokens
    questions = [
        prompt_tokens(item, template, max_tokens=room, long_rows=config.data.long_rows).ids
        for item in data.test[:prompts]
    ]
    most = min(20, config.evaluation.max_new_tokens)
    short = dataclasses.replace(config.evaluation, do_sample=False, max_new_tokens=most)
    logits = next_token_logits(asked.model, questions)
    return logits, generate.generate(asked.model, asked.tokenizer, questions, short)


def compared(first: tuple[list[Any], list[Answer]], second: tuple[list[Any], list[Answer]]) -> dict[str, Any]:
    """How far the answers of two models agree, as `answered` returns them: `prompts`, `largest_difference`, `same_answers`."""
    differences = [float((one - other).abs().max()) for one, other in zip(first[0], second[0], strict=True)]
    same = sum(one == other for one, other in zip(first[1], second[1], strict=True))
    worst = max(differences, key=lambda value: (value != value, value))  # not a number counts as the worst
    return {"prompts": len(differences), "largest_difference": worst, "same_answers": same}


@dataclass(frozen=True)
class ReloadCheck:
    """Whether the saved adapter on a freshly loaded base model is the model that was trained.

    Attributes:
        largest_difference: between next-token logits of the two on `prompts` held-out prompts.
        same_answers: answers that are equal to the letter.
    """

    prompts: int
    largest_difference: float
    same_answers: int

    @property
    def passed(self) -> bool:
        """Whether all answers are equal, and no logit differs by more than `RELOAD_TOLERANCE`."""
        return self.same_answers == self.prompts and self.largest_difference <= RELOAD_TOLERANCE

    def __repr__(self) -> str:
        verdict = "the reloaded model is the trained one" if self.passed else "the reloaded model DIFFERS"
        return f"{verdict}: {self.same_answers} of {self.prompts} answers equal, logits within {self.largest_difference:.1e}"


def same_answers(
    live: torch.nn.Module, reloaded: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]
) -> float:
    """The largest difference between two models' next-token logits on the same prompts; 0.0 for the same model."""
    pairs = zip(next_token_logits(live, prompts), next_token_logits(reloaded, prompts), strict=True)
    return max((float((one - other).abs().max()) for one, other in pairs), default=0.0)


def next_token_logits(model: torch.nn.Module, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    """`(vocabulary,)` after each prompt, in float32 on the CPU."""
    import torch

    from qlora_helpers.model.wiring import in_eval_mode

    device = model.get_input_embeddings().weight.device
    with torch.no_grad(), in_eval_mode(model):
        tensors = [torch.tensor([prompt], device=device) for prompt in prompts]
        return [model(input_ids=ids).logits[0, -1].float().cpu() for ids in tensors]
