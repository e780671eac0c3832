"""The line before training starts: what it says, and that it counts as the trainer does."""

from __future__ import annotations

import math

import pytest

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.machine.hardware import parse_gpus
from qlora_helpers.model.shapes.catalog import SHAPES, known_shape
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.planning import run_plan
from qlora_helpers.planning.cost import training_cost
from qlora_helpers.planning.cpu_speed import OPERATIONS_PER_CORE, cpu_seconds, cpu_threads
from qlora_helpers.planning.layout import Layout
from qlora_helpers.planning.run_plan import plan_run
from qlora_helpers.planning.running import running

SMALL, LLAMA = known_shape("random:falcon-tiny"), known_shape("random:llama-3-8b")
DATA = {"rows": 940, "tokens": 100_000, "sequences": 200, "trained_share": 0.2}


def cost(*settings: str, shape=SMALL, gpus=None, **changes):
    config = RunConfig().with_settings(["train.micro_batch_size=2", "train.activation_checkpointing=false", *settings])
    hardware = parse_gpus(gpus) if gpus else None
    return training_cost(config, shape, **DATA | {"hardware": hardware, "cores": 2} | changes)


def test_steps_are_counted_as_the_trainer_counts_them():
    assert cost().steps == 100
    assert cost("train.epochs=2").steps == 200
    assert cost("train.gradient_accumulation_steps=3").steps == 34
    assert cost(layout=Layout(copies=2)).steps == 50
    found = cost("train.max_steps=25")
    assert (found.steps, found.epochs, found.tokens) == (25, 0.25, 25_000)


def test_the_line_says_rows_tokens_epochs_steps_time_price_and_how_to_take_fewer():
    assert str(cost("train.epochs=2", usd_per_hour=3.6)).startswith(
        "Training: 940 rows, 200,000 tokens, 2 epochs, 200 steps: about "
    )
    line = str(cost(usd_per_hour=3.6))
    seconds = cpu_seconds(model_sizes(SMALL), 100_000, 0.2, 2)
    assert "on this CPU (2 cores)" in line and f"${3.6 * seconds / 3600:,.2f}" in line
    assert "1 epoch, 100 steps" in line
    assert "price not known (train.usd_per_hour)" in str(cost())
    for setting in ("data.train_rows=N", "train.epochs=N", "train.max_steps=N"):
        assert setting in line


def test_processes_share_the_work_of_a_cpu():
    alone, two = cost(), cost(layout=Layout(shards=2), cores=1)
    assert two.seconds == pytest.approx(alone.seconds) and two.machine == alone.machine == "this CPU (2 cores)"


def test_a_training_in_shards_costs_what_the_plan_says_of_them():
    """Falcon-40B on ml.g5.12xlarge, as each of four processes has its settings: no copy would fit, and layers are gathered."""
    tokens = 1_000_000
    for gpus, layout in (("ml.g5.12xlarge", Layout(shards=4)), ("2xml.g5.12xlarge", Layout(copies=2, shards=4))):
        config = profile_config("falcon-40b").with_settings([f"train.share={layout.share}"])
        choice = plan_run(config, gpus=gpus, tokens=tokens).choice
        found = training_cost(
            config.with_settings([each for each in choice.settings if "share" not in each]),
            SHAPES["falcon-40b"],
            rows=1000,
            tokens=tokens,
            sequences=tokens // 2048,
            trained_share=0.2,
            hardware=parse_gpus(gpus),
            cores=2,
            usd_per_hour=7.0,
            layout=layout,
        )
        assert found.steps == math.ceil(tokens // 2048 / 8)
        assert found.seconds == pytest.approx(choice.seconds, rel=1e-6)
        assert found.dollars == pytest.approx(7.0 * choice.seconds / 3600)


def test_a_run_of_several_processes_is_counted_in_their_layout(monkeypatch, tmp_path):
    monkeypatch.setattr(run_plan, "this_machine", lambda price=None: parse_gpus("8xA10G"))
    for name, value in {"WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    for share, layout in (
        ("auto", Layout(copies=8)),
        ("copies", Layout(copies=8)),
        ("shards", Layout(shards=8)),
        ("copies of shards", Layout(copies=2, shards=4)),
    ):
        here = running(share)
        assert here.layout == layout and (here.hardware().gpus, here.hardware().machines) == (8, 2)
        assert here.all_gpus().gpus == 16
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert running("auto").layout == running("spread").layout == Layout(spread=8)
    assert running("one").layout == running("auto", holding=1).layout == Layout()


def test_hours_on_a_cpu_are_said_first_and_on_a_gpu_not():
    line = str(cost(shape=LLAMA))
    assert line.startswith("This takes hours on a CPU, about ")
    assert str(cost(shape=LLAMA, gpus="L4")).startswith("Training: ")
    assert "on L4" in str(cost(shape=LLAMA, gpus="L4"))
    assert str(cost()).startswith("Training: ")


def test_what_is_done_takes_no_time_again():
    whole, half = cost(), cost(done=50)
    assert half.seconds == pytest.approx(whole.seconds / 2)
    assert "100 steps (50 done)" in str(half)
    assert cost(done=100).seconds == 0


def test_padded_rows_take_at_most_their_full_length():
    found = cost(packed=False)
    assert "at most" in str(found) and found.tokens == 100_000
    assert found.seconds == pytest.approx(cost().seconds * 200 * 1024 / 100_000)


def test_a_cpu_s_time_is_that_of_the_measured_demo():
    """32,266 tokens of SmolLM2-135M took 141.9 s on two cores (benchmarks/demo_two_cores.json)."""
    sizes = model_sizes(known_shape("HuggingFaceTB/SmolLM2-135M-Instruct"))
    assert cpu_seconds(sizes, 32_266, 0.21, 2) == pytest.approx(141.9, rel=0.05)
    assert cpu_seconds(sizes, 1000, 0.2, 4) == pytest.approx(cpu_seconds(sizes, 1000, 0.2, 1) / 4)
    by_hand = 1000 * (4 * 30 * 3_538_944 + 4 * 0.2 * 49_152 * 576) / OPERATIONS_PER_CORE
    assert cpu_seconds(sizes, 1000, 0.2, 1) == pytest.approx(by_hand)


def test_threads_are_no_more_than_the_environment_allows(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cpu_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert cpu_threads() >= 1
