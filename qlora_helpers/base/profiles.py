"""The three profiles that a run can start from: `tiny`, `demo` and `falcon-40b`."""

from __future__ import annotations

from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import ConfigError

PROFILES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "A small Falcon with the 40B's architecture and random weights: a notebook takes seconds, for tests and rehearsals.",
        {
            "model.name": "random:falcon-tiny",
            "data.seq_len_tokens": 512,
            "data.embedded_train_rows": 24,
            "data.embedded_eval_rows": 4,
            "data.embedded_test_rows": 4,
            "data.long_rows": "trim_end",
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
        "SmolLM2-135M-Instruct, which learns to summarise in minutes on two CPU cores.",
        {
            "model.name": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "data.seq_len_tokens": 512,
            "data.embedded_train_rows": 144,  # two CPU cores train one epoch in two and a half minutes
            "data.embedded_eval_rows": 20,
            "adapter.lora_dropout": 0.0,  # one epoch does not overfit, and dropout masks cost 15 % of a CPU step
            "train.micro_batch_size": 2,
            "train.learning_rate": 2e-3,  # a small model and few steps allow more than the recipe's
            "train.activation_checkpointing": False,
            "train.eval_steps": 20,
            "train.save_steps": 20,
            "evaluation.batch_size": 30,
        },
    ),
    "falcon-40b": (
        "Falcon-40B by the 2023 recipe without its dropout, on one machine with several large GPUs.",
        {
            "model.name": "tiiuae/falcon-40b",
            "data.source": "knkarthick/samsum",
            "data.template": "recipe",
            "data.seq_len_tokens": 2048,
            "adapter.lora_dropout": 0.0,  # dropout masks would add half of what a compiled layer keeps otherwise
        },
    ),
}


def profile_config(name: str) -> RunConfig:
    """Returns the settings of a profile: `tiny`, `demo` or `falcon-40b`.

    Raises:
        ConfigError: there is no such profile.
    """
    if name not in PROFILES:
        raise ConfigError([f"profile: expected one of {', '.join(PROFILES)}, got {name!r}"])
    return RunConfig(profile=name).with_settings(PROFILES[name][1])
