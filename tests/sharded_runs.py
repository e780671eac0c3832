"""Trainings in several real processes on the CPU, forked from one that has imported everything (`forked_ranks`)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from forked_ranks import Ranks

SETTINGS: dict[str, Any] = {
    "adapter.lora_dropout": 0.0,
    "train.max_steps": 4,
    "train.lr_scheduler_type": "constant",
    "train.learning_rate": 0.02,
    "train.logging_steps": 1,
    "train.eval_steps": 4,
    "train.save_steps": 2,
    "train.tensorboard": "off",
    "train.micro_batch_size": 1,
    "train.activation_checkpointing": True,
    "train.checkpointed_layers": 3,
    "data.train_rows": 40,
    "data.eval_rows": 5,
    "data.test_rows": 3,
    "data.seq_len_tokens": 192,
    "evaluation.max_new_tokens": 8,
    "evaluation.few_shot": 0,
}


def import_all() -> None:
    """Imports what the processes of a training need, once, before they are forked, and makes the tiny Falcon."""
    import torch.distributed.fsdp

    from qlora_helpers import workflow
    from qlora_helpers.data import prepare
    from qlora_helpers.evaluation import evaluate
    from qlora_helpers.model import checkpoints, lora, quantizer
    from qlora_helpers.training import tensorboard_events, train

    assert all((prepare, evaluate, lora, quantizer, tensorboard_events, train, workflow, torch.distributed.fsdp))
    from qlora_helpers.base.config import ModelConfig

    checkpoints.find_checkpoint(ModelConfig(name="random:falcon-tiny"), say=lambda text: None)  # made once, not by each


def train(root: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What each process of a training does; returns what it saw."""
    from qlora_helpers import workflow
    from qlora_helpers.model.sharding import is_sharded

    run = workflow.open_run(name, profile="tiny", settings=SETTINGS | settings, root=root)
    loaded = workflow.load(run, say=lambda text: None)
    result = workflow.train(run, loaded=loaded, show_progress=False)
    return {
        "sharded": is_sharded(loaded.model),
        "audit": repr(loaded.audit),
        "held_gib": loaded.audit.gib_by_process,
        "fast": result.fast_step,
        "peaks": result.peak_gib,
        "steps": result.steps,
        "stopped": result.stop_reason,
    }


def losses(root: Path, name: str) -> list[tuple[int, float]]:
    lines = map(json.loads, (root / name / "progress.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def difference(root: Path, first: str, second: str) -> float:
    from qlora_helpers.model.lora import adapter_difference

    return adapter_difference(root / first / "adapter", root / second / "adapter")


LONG = {"train.share": "shards", "train.max_steps": 200, "train.eval_steps": 200, "train.save_steps": 200}


def wait_for_steps(root: Path, name: str, steps: int, ranks: Ranks, limit_s: float = 120.0) -> None:
    until = time.monotonic() + limit_s
    while not ((root / name / "progress.jsonl").exists() and len(losses(root, name)) >= steps):
        if ranks.ended() and set(ranks.wait()) == {0}:  # all steps are done
            return
        if time.monotonic() > until or ranks.ended():
            ranks.kill()
            raise AssertionError(ranks.said())
        time.sleep(0.05)


def status(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / name / "status.json").read_text())
