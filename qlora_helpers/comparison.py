"""Whether two models are the same, by what they answer to held-out prompts: next-token logits and short greedy answers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.run import Run

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_helpers.blocks import PreparedData
    from qlora_helpers.evaluation import Answer
    from qlora_helpers.models import LoadedModel

RELOAD_TOLERANCE = 1e-4


def answered(
    run: Run, model: PeftModel, loaded: LoadedModel, data: PreparedData, prompts: int
) -> tuple[list[Any], list[Answer]]:
    """Next-token logits and short greedy answers to the first held-out prompts, in the prompt that was trained."""
    from qlora_helpers import evaluation
    from qlora_helpers.prompts import prompt_tokens

    config = run.config()
    questions = []
    for item in data.test[:prompts]:
        tokens = prompt_tokens(item.dialogue, config.data.template, loaded.tokenizer)
        questions.append(tokens.trimmed(max(0, len(tokens) - config.data.seq_len_tokens)).ids)
    most = min(20, config.evaluation.max_new_tokens)
    short = dataclasses.replace(config.evaluation, do_sample=False, max_new_tokens=most)
    logits = evaluation.next_token_logits(model, questions)
    return logits, evaluation.generate(model, loaded.tokenizer, questions, short)


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
