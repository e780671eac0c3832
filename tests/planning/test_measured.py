"""What a run on a GPU measured is written beside the prediction for the step that it really took."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny import tiny_llama

from qlora_helpers.base.config import AdapterConfig
from qlora_helpers.base.files import read_json
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.machine.hardware import parse_gpus
from qlora_helpers.model.lora import add_adapters
from qlora_helpers.model.parameter_counts import count_parameters
from qlora_helpers.planning import run_plan
from qlora_helpers.planning.layout import Layout
from qlora_helpers.planning.measured import write_measured
from qlora_helpers.runs.folder import Run
from qlora_helpers.training.result import TrainResult
from qlora_helpers.views.monitor import plan_table

RESULT = TrainResult(
    steps=5,
    new_steps=5,
    loss=1.0,
    eval_loss=None,
    seconds=10.0,
    tokens_per_s=2000.0,
    peak_gib={"cuda:0": 60.0},
    stopped=False,
    machine="1 x NVIDIA H100 80GB HBM3",
    reserved_gib={"cuda:0": 61.0},
    compiled=True,
    checkpointed=6,
    fast_step="on",
)


def written(folder, monkeypatch, settings=(), **changes) -> tuple[dict, Run]:
    run = Run(folder)
    run.save_config(
        profile_config("falcon-40b")
        .with_settings({"train.micro_batch_size": 2, "data.seq_len_tokens": 512})
        .with_settings(list(settings))
    )
    monkeypatch.setattr(run_plan, "this_machine", lambda price=None: parse_gpus("2xH100"))
    loaded = SimpleNamespace(audit=SimpleNamespace(gib_by_device={"cuda:0": 20.8}))
    report = SimpleNamespace(trained_tokens=150, tokens=1000)
    data = SimpleNamespace(report=report, train=[0], seq_len_tokens=2000, packed=True)
    model = add_adapters(tiny_llama(), AdapterConfig(), seed=0)
    write_measured(run, count_parameters(model), loaded, RESULT.__class__(**vars(RESULT) | changes), data)
    return read_json(run.plan_path), run


def test_the_prediction_is_stored_beside_the_measurement(tmp_path, monkeypatch):
    plan, run = written(tmp_path / "mine", monkeypatch, captured=True)
    assert plan["measured"]["reserved_gib"] == {"cuda:0": 61.0}
    expected = run_plan.predicted_step(
        run.config(),
        hardware=parse_gpus("H100"),
        compiled=True,
        checkpointed=6,
        trained_share=0.15,
        captured=True,
        fill=0.5,
    )
    assert plan["predicted"] == expected  # of the one GPU that held the model, though the machine has two
    assert [row[0] for row in plan_table(run).rows][-1] == "tokens/s"


def test_shards_are_predicted_as_shards_for_every_gpu(tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    held = {"cuda:0": 41.0, "cuda:1": 41.5}
    plan, run = written(tmp_path / "mine", monkeypatch, ["train.share=shards"], reserved_gib=held)
    expected = run_plan.predicted_step(
        run.config(),
        hardware=parse_gpus("2xH100"),
        compiled=True,
        checkpointed=6,
        trained_share=0.15,
        fill=0.5,
        layout=Layout(shards=2),
    )
    (each,) = expected["reserved_gib"].values()
    assert plan["predicted"]["reserved_gib"] == {"cuda:0": each, "cuda:1": each}
    assert plan["predicted"]["tokens_per_s"] == expected["tokens_per_s"]
    copies, _ = written(tmp_path / "copies", monkeypatch, ["train.share=copies"], reserved_gib=held)
    assert (
        copies["predicted"]["reserved_gib"]["cuda:1"] - each > 7
    )  # half of the 4-bit layers is 9.8 GiB, three are gathered
    table = {row[0]: row[1:] for row in plan_table(run).rows}
    assert len([name for name in table if "cuda:1" in name]) >= 1


def test_the_prediction_is_for_the_step_that_was_taken(tmp_path, monkeypatch):
    replayed, launched = (
        written(tmp_path / str(captured), monkeypatch, captured=captured)[0]["predicted"] for captured in (True, False)
    )
    assert replayed["tokens_per_s"] != launched["tokens_per_s"]
    assert replayed["allocated_gib"] == launched["allocated_gib"]


@pytest.mark.parametrize("changes", [{"machine": "CPU"}, {"fast_step": ""}])
def test_a_cpu_and_the_plain_step_have_no_prediction(tmp_path, monkeypatch, changes):
    plan, _ = written(tmp_path / "mine", monkeypatch, **changes)
    assert "measured" in plan and "predicted" not in plan
