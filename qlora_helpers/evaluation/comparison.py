"""Whether two models are the same, by what they answer to held-out prompts: next-token logits and short greedy answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.runs.folder import Run

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.evaluation.generate import Answer
    from qlora_helpers.model.loading import LoadedModel

RELOAD_TOLERANCE = 1e-4


def answered(
    run: Run, model: PeftModel, loaded: LoadedModel, data: PreparedData, prompts: int
) -> tuple[list[Any], list[Answer]]:
    """Next-token logits and short greedy answers to the first held-out prompts, in the prompt that was trained."""
    from qlora_helpers.data.prompts import prompt_tokens
    from qlora_helpers.evaluation import generate

    config = run.config()
    questions = []
    for item in data.test[:prompts]:
        tokens = prompt_tokens(item.dialogue, config.data.template, loaded.tokenizer)
        questions.append(tokens.trimmed(max(0, len(tokens) - config.data.seq_len_tokens)).ids)
    most = min(20, config.evaluation.max_new_tokens)
    short = dataclasses.replace(config.evaluation, do_sample=False, max_new_tokens=most)
    logits = next_token_logits(model, questions)
    return logits, generate.generate(model, loaded.tokenizer, questions, short)


def compared(first: tuple[list[Any], list[Answer]], second: tuple[list[Any], list[Answer]]) -> dict[str, Any]:
    """What two models' `answered` have in common."""
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
        return self.same_answers == self.prompts and self.largest_difference <= RELOAD_TOLERANCE

    def __repr__(self) -> str:
        verdict = "the reloaded model is the trained one" if self.passed else "the reloaded model DIFFERS"
        return f"{verdict}: {self.same_answers} of {self.prompts} answers equal, logits within {self.largest_difference:.1e}"


def same_answers(
    live: torch.nn.Module, reloaded: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]
) -> float:
    """Largest difference between two models' next-token logits on the same prompts; 0.0 when they are the same model."""
    pairs = zip(next_token_logits(live, prompts), next_token_logits(reloaded, prompts), strict=True)
    return max((float((one - other).abs().max()) for one, other in pairs), default=0.0)


def next_token_logits(model: torch.nn.Module, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    """`(vocabulary,)` after each prompt, in 32 bits on the CPU."""
    import torch

    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        tensors = [torch.tensor([prompt], device=device) for prompt in prompts]
        found = [model(input_ids=ids).logits[0, -1].float().cpu() for ids in tensors]
    model.train(was_training)
    return found
