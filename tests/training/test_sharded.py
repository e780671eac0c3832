"""Layers that are shared out over several processes (FSDP2), and copies of a model: real processes that meet by gloo on the CPU.

They are forked from this process, which has imported everything. Each trains as the command line does, by `workflow.train`.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from forked_ranks import Ranks, in_ranks

SLOW = os.environ.get("QLORA_SLOW") == "1"
pytestmark = pytest.mark.slow
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


@pytest.fixture(scope="module", autouse=True)
def imported(torch, cache):
    """What the processes need, imported once."""
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


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(root, imported):
    """One process that adds up two passes a step: it sees the same packed sequences."""
    (found,) = in_ranks(train, root, "alone", {"train.gradient_accumulation_steps": 2}, processes=1)
    return found


@pytest.fixture(scope="module")
def shards(root, imported):
    """Two processes that share the layers, in two sessions: the second goes on from the first one's checkpoint."""
    in_ranks(train, root, "shards", {"train.share": "shards", "train.max_steps": 2})
    shutil.copytree(root / "shards", root / "halfway")
    return in_ranks(train, root, "shards", {"train.share": "shards"})


def test_shards_learn_what_one_process_learns_to_the_bit_and_resume_so(root, alone, shards):
    assert losses(root, "shards") == losses(root, "alone")
    assert difference(root, "shards", "alone") == 0.0
    assert (root / "shards/adapter/adapter_model.safetensors").read_bytes() == (
        root / "alone/adapter/adapter_model.safetensors"
    ).read_bytes()
    assert not alone["sharded"] and all(each["sharded"] for each in shards)


def test_the_fast_step_is_the_same_with_shards(alone, shards):
    assert shards[0]["fast"] == shards[1]["fast"] == alone["fast"]
    assert "3 of 4 layers with activation checkpointing, each skipping 2 unused outputs" in shards[0]["fast"]
    assert "on   block-diagonal attention" in shards[0]["fast"] and "on   loss in chunks" in shards[0]["fast"]


def test_the_certificate_of_shards_passes(root, shards):
    found = json.loads((root / "shards/adapter/certificate.json").read_text())
    assert found["passed"] and found["prompts"] == 3 and found["largest_difference"] == 0.0


def test_what_each_process_holds_is_reported(root, alone, shards):
    assert len(shards[0]["held_gib"]) == 2 and "shared out over 2 processes" in shards[0]["audit"]
    assert "16 of 16 linear layers in nf4" in shards[1]["audit"] and alone["held_gib"] == ()
    assert set(shards[0]["peaks"]) == {"cpu", "cpu of process 2"}
    assert set(json.loads((root / "shards/plan.json").read_text())["measured"]["peak_gib"]) == set(shards[0]["peaks"])


def test_one_process_goes_on_from_two_in_the_same_order_of_the_data(root, alone, shards):
    """2 -> 1 and 1 -> 2 are the same run: the steps take the same sequences, whoever takes them."""
    shutil.copytree(root / "halfway", root / "one-goes-on")
    in_ranks(train, root, "one-goes-on", {"train.share": "shards"}, processes=1)
    assert losses(root, "one-goes-on") == losses(root, "alone")
    assert difference(root, "one-goes-on", "alone") == 0.0


def test_two_processes_go_on_from_one_as_copies(root, alone):
    accumulated = {"train.gradient_accumulation_steps": 2}
    in_ranks(train, root, "copies", accumulated | {"train.max_steps": 2}, processes=1)
    found = in_ranks(train, root, "copies", accumulated | {"train.share": "copies"})
    assert not found[0]["sharded"] and losses(root, "copies") == losses(root, "alone")
    assert difference(root, "copies", "alone") == 0.0
