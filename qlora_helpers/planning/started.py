"""What starting a run on several GPUs sets for the way that a plan has chosen: a micro-batch, passes, and what was left open.

`choosing` sets it for a start and `forecast` for the figures before it. Imports no torch; knows nothing of runs on disk.
"""

from __future__ import annotations

from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.planning.candidate import Candidate
from qlora_helpers.planning.layout import ONE

SHARE, MICRO, PASSES = "train.share", "train.micro_batch_size", "train.gradient_accumulation_steps"
CHECKPOINTING, CHECKPOINTED = "train.activation_checkpointing", "train.checkpointed_layers"
OFFLOAD = "train.offload_embeddings"
FOR_THE_PLAN = {
    CHECKPOINTING: (True,),
    CHECKPOINTED: (None,),
    "train.compile": ("auto",),
    OFFLOAD: (False,),
}
"""Settings that the plan decides where they have one of these values, which leave it open."""


def settings_to_start(config: RunConfig, choice: Candidate, *, limited: bool = False) -> dict[str, Any]:
    """Returns what to set for a plan's choice, by full name: what a person has set beside it stays.

    Args:
        config: the settings as asked for.
        choice: the plan's.
        limited: whether it may hold less than the cards can, which a process that plans for its own card does not know.
    """
    found: dict[str, Any] = {SHARE: choice.share} if choice.processes > 1 else {}
    if choice.offloaded:  # no process moves its embedding by itself
        found[OFFLOAD] = True
    if choice.share == ONE:
        return found
    found |= {MICRO: choice.micro_batch_size, PASSES: choice.gradient_accumulation_steps}
    if choice.processes > 1 and not limited:  # each process plans the rest for its own card, with what is free there
        return found
    planned = config.with_settings(choice.settings)
    is_open = {name: setting_of(config, name) in values for name, values in FOR_THE_PLAN.items()}
    if not (is_open[CHECKPOINTING] and is_open[CHECKPOINTED]):
        is_open |= dict.fromkeys((CHECKPOINTING, CHECKPOINTED), False)
    return found | {name: setting_of(planned, name) for name, is_ours in is_open.items() if is_ours}


def refusal(config: RunConfig, taken: str) -> str:
    """Returns what to say where a start on several GPUs refuses the way that the settings name; empty where it does not.

    Args:
        config: the settings as asked for.
        taken: the way that the plan takes, and that is shown.
    """
    asked = config.train.share
    if asked in ("auto", taken):
        return ""
    return f"{SHARE}={asked} is refused at the start: these GPUs can't share the work so; shown is {taken}"


def setting_of(config: RunConfig, setting: str) -> Any:
    """Returns a setting's value by its full name, such as `train.share`."""
    section, _, name = setting.partition(".")
    return getattr(getattr(config, section), name)
