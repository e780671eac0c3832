"""The three profiles that a run can start from: `tiny`, `demo` and `falcon-40b`."""

from __future__ import annotations

from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import ConfigError

PROFILES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "A Falcon with the 40B wiring and random weights: seconds a notebook, for tests and rehearsals.",
        {
            "model.name": "random:falcon-tiny",
            "data.seq_len_tokens": 512,
            "data.train_rows": 24,
            "data.eval_rows": 4,
            "data.test_rows": 4,
            "data.long_rows": "trim",
            "train.max_steps": 4,
            "train.micro_batch_size": 2,
            "train.learning_rate": 1e-3,
            "train.logging_steps": 1,
            "train.eval_steps": 2,
            "train.save_steps": 2,
            "train.activation_checkpointing": False,
            "evaluation.batch_size": 4,
            "evaluation.max_new_tokens": 12,
        },
    ),
    "demo": (
        "SmolLM2-135M-Instruct: learns to summarise in minutes on two CPU cores.",
        {
            "model.name": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "data.seq_len_tokens": 512,
            "data.train_rows": 144,  # with one pass, what two CPU cores train in two and a half minutes
            "data.eval_rows": 20,
            "adapter.lora_dropout": 0.0,  # one pass over the rows leaves nothing to overfit, and masks cost 15 % of a CPU step
            "train.micro_batch_size": 2,
            "train.learning_rate": 2e-3,  # a small model and few steps: bolder than the recipe
            "train.activation_checkpointing": False,
            "train.eval_steps": 20,
            "train.save_steps": 20,
            "evaluation.batch_size": 30,
        },
    ),
    "falcon-40b": (
        "The recipe that the series is named for, without its dropout: Falcon-40B on one machine with several large GPUs.",
        {
            "model.name": "tiiuae/falcon-40b",
            "data.source": "knkarthick/samsum",
            "data.seq_len_tokens": 2048,
            "adapter.lora_dropout": 0.0,  # its masks would take half as much again as all else that a compiled layer keeps
        },
    ),
}


def profile_config(name: str) -> RunConfig:
    """The settings of a profile: `tiny`, `demo` or `falcon-40b`.

    Raises:
        ConfigError: no such profile.
    """
    if name not in PROFILES:
        raise ConfigError([f"profile: expected one of {', '.join(PROFILES)}, got {name!r}"])
    return RunConfig(profile=name).with_settings(PROFILES[name][1])
