"""Exercises of notebook 04: count steps, and make a run fit."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from qlora_helpers.teaching.exercise import Exercise, Wrong, call, distinct, number_of


def steps(sequences, micro_batch, accumulation, epochs):
    """The solution of `count_steps`."""
    import math

    passes = math.ceil(sequences / micro_batch)
    return math.ceil(passes / accumulation) * epochs


def _drawn_steps(draw: random.Random) -> tuple[tuple[int, int, int, int], dict[str, float]]:
    """A run whose last step of an epoch is smaller, and what each way of counting makes of it."""
    micro_batch, accumulation, epochs = draw.choice((2, 4, 8)), draw.choice((2, 4)), draw.randrange(2, 5)
    together = micro_batch * accumulation
    sequences = together * draw.randrange(3, 30) + draw.randrange(1, together)
    passes = math.ceil(sequences / micro_batch)
    return (sequences, micro_batch, accumulation, epochs), {
        "right": math.ceil(passes / accumulation) * epochs,
        "drops-the-last": sequences // together * epochs,
        "no-accumulation": passes * epochs,
        "one-epoch": math.ceil(passes / accumulation),
        "rows": sequences * epochs,
        "rounds-at-the-end": math.ceil(sequences * epochs / together),
        "fraction": sequences * epochs / together,
    }


def _judge_steps(function: Any) -> str:
    draw = random.Random()
    for _ in range(8):
        case, values = distinct(lambda: _drawn_steps(draw))
        got = number_of(call(function, *case), "the number of steps")
        code = next((name for name, value in values.items() if math.isclose(got, value)), "")
        if code == "right":
            continue
        if code:
            raise Wrong(code)
        sequences, micro_batch, accumulation, epochs = case
        raise Wrong(
            message=f"{sequences} sequences, {micro_batch} at once, {accumulation} passes a step, {epochs} epochs: "
            f"{values['right']} steps; got {got:g}."
        )
    return "Eight drawn runs agree with the trainer's own count."


COUNT_STEPS = Exercise(
    name="count_steps",
    title="How many steps",
    kind="predict and measure",
    minutes=5,
    question="Write steps(sequences, micro_batch, accumulation, epochs), the number of optimizer steps of a training.",
    judge=_judge_steps,
    misconceptions={
        "drops-the-last": "You dropped what is left at an epoch's end. The trainer makes a smaller step of it.",
        "no-accumulation": "You counted passes. The optimizer steps once after each `accumulation` passes.",
        "one-epoch": "That is one epoch.",
        "rows": "A step takes micro_batch · accumulation sequences at once, not one.",
        "rounds-at-the-end": "You rounded once, at the end. What is left over ends each epoch, so round in every epoch.",
        "fraction": "There are no fractions of a step: the last one of an epoch is smaller.",
    },
    hints=(
        "First the passes of one epoch, then its steps, then all epochs.",
        "Round up twice: sequences / micro_batch, and passes / accumulation.",
    ),
    solution_is=steps,
)

TOO_LARGE = {
    "data.seq_len_tokens": 1024,
    "train.micro_batch_size": 8,
    "train.gradient_accumulation_steps": 2,
    "adapter.r": 16,
}
"""Qwen3-4B's settings that the exercise starts from, for a card with 14.6 GiB; no layer is checkpointed."""
USABLE_GIB, TOKENS_A_STEP = 14.6, 16 * 1024
_SAVING = (
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.checkpointed_layers",
    "data.seq_len_tokens",
)


def predicted_gib(settings: Mapping[str, Any]) -> float:
    """Returns what the plan says that Qwen3-4B's training takes with settings on top of `TOO_LARGE`, in GiB."""
    from qlora_helpers.base.profiles import profile_config
    from qlora_helpers.machine.hardware import parse_gpus
    from qlora_helpers.planning.run_plan import predicted_step

    start = {"model.name": "Qwen/Qwen3-4B", "train.activation_checkpointing": False} | TOO_LARGE
    config = profile_config("falcon-40b").with_settings(start | dict(settings))
    checkpointed = 0
    if config.train.activation_checkpointing:
        checkpointed = 36 if config.train.checkpointed_layers is None else config.train.checkpointed_layers
    step = predicted_step(
        config, hardware=parse_gpus("1x14.6GiB"), compiled=True, checkpointed=checkpointed, trained_share=0.2
    )
    held = step["reserved_gib"]
    assert isinstance(held, dict)
    return max(held.values())


def _judge_memory(settings: Any) -> str:
    from qlora_helpers.base.errors import UserError

    if not isinstance(settings, Mapping):
        raise Wrong(message="Hand over a dictionary of the settings that you change.")
    try:
        needed, before = predicted_gib(settings), predicted_gib({})
    except UserError as error:
        raise Wrong("refused", error=str(error)) from None
    merged = TOO_LARGE | dict(settings)
    tokens = (
        merged["data.seq_len_tokens"] * merged["train.micro_batch_size"] * merged["train.gradient_accumulation_steps"]
    )
    if tokens != TOKENS_A_STEP:
        raise Wrong("other-step", tokens=tokens)
    if needed <= USABLE_GIB:
        return f"{needed:.1f} GiB fit, where {before:.1f} did not, and a step still takes {tokens:,} tokens."
    touched = {name for name, value in settings.items() if merged[name] == value and TOO_LARGE.get(name) != value}
    if touched and touched <= {"adapter.r", "adapter.target_modules", "adapter.lora_alpha"}:
        raise Wrong("rank", needed=f"{needed:.1f}", before=f"{before:.1f}")
    if not touched & set(_SAVING):
        raise Wrong("no-effect", needed=f"{needed:.1f}")
    raise Wrong("not-enough", needed=f"{needed:.1f}", usable=USABLE_GIB)


MAKE_IT_FIT = Exercise(
    name="make_it_fit",
    title="Out of memory",
    kind="break and fix",
    minutes=10,
    question="Qwen3-4B with TOO_LARGE does not fit into 14.6 GiB. Hand over settings with which it does, and with as many "
    "tokens a step.",
    judge=_judge_memory,
    misconceptions={
        "rank": "From {before} to {needed} GiB: the adapter is small, so a lower rank saves next to nothing. Activations "
        "are what is "
        "large.",
        "no-effect": "{needed} GiB: these settings hold no memory. Which ones decide how many tokens pass through the "
        "model at once, "
        "and what is kept of them?",
        "other-step": "A step now takes {tokens} tokens: it learns something else. Fewer sequences at once need more "
        "passes a step.",
        "not-enough": "{needed} GiB are still more than {usable}. You are on the right way: go further.",
        "refused": "{error}",
    },
    hints=(
        "What grows with the number of sequences at once? The activations.",
        "Halve train.micro_batch_size and double train.gradient_accumulation_steps, until it fits.",
        "Or set train.activation_checkpointing: the layers' activations are then computed again instead of kept.",
    ),
    solution_is='{"train.micro_batch_size": 2, "train.gradient_accumulation_steps": 8}, or '
    '{"train.activation_checkpointing": True}.',
    cell='{"train.micro_batch_size": 2, "train.gradient_accumulation_steps": 8}',
)
