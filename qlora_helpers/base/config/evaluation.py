"""Settings of the evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_helpers.base.config.option import option


@dataclass(frozen=True)
class EvaluationConfig:
    """How the base and the tuned model answer the held-out rows."""

    batch_size: int = option(16, "Rows that are answered at once.", low=1)
    max_new_tokens: int = option(80, "Longest answer, tokens.", low=1)
    do_sample: bool = option(False, "Sample the answers instead of taking the most likely token (greedy decoding).")
    temperature: float = option(0.7, "Sampling temperature, if do_sample is on.", low=0.01, high=10)
    top_p: float = option(
        0.9, "Sample from the most likely tokens whose probabilities add up to this share.", low=0.01, high=1
    )
    chat_baseline: bool = option(True, "Also ask the untuned model with its own chat template, if it has one.")
    few_shot: int = option(
        3,
        "Also ask the untuned model with so many training examples in the prompt, as far as they fit; 0 does not.",
        low=0,
        high=8,
    )
    metric: str = option(
        "auto",
        "How answers are scored: auto chooses by the training answers; text is ROUGE and chrF, labels accuracy and macro-F1, "
        "json the F1 of fields, exact the share of equal answers, numbers the share of right ones.",
        choices=("auto", "text", "labels", "json", "exact", "numbers"),
    )
    tolerance: float = option(
        0.0, "For numbers: by which share of the reference a right answer may be off.", low=0, high=1
    )
    json_schema: str | None = option(
        None, "For JSON: a file with a JSON schema that answers are checked against; none checks against no schema."
    )
