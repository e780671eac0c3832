"""What a start makes of settings on several GPUs, and what the page on several GPUs says is whole on each."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_helpers.base.profiles import profile_config
from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import parse_gpus
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.planning.as_given import as_started, settings_as_given
from qlora_helpers.planning.candidates import candidate
from qlora_helpers.planning.exchange import exchange
from qlora_helpers.planning.planned_start import plan_start
from qlora_helpers.planning.speed import step_time
from qlora_helpers.planning.started import OFFLOAD
from qlora_helpers.planning.workload import TrainingTokens, Workload

PAGE = Path(__file__).parents[2] / "docs" / "several_gpus.md"


def workload(model: str, gpus: str, *settings: str) -> Workload:
    config = profile_config("falcon-40b").with_settings([f"model.name={model}", *settings])
    return Workload(config, SHAPES[model], parse_gpus(gpus), 10**6)


@pytest.mark.parametrize(("gpus", "sequences", "share"), [("2x7.25GiB", 1, "one"), ("2x7GiB", 8, "copies")])
def test_an_embedding_that_must_be_on_the_host_is_put_there_by_the_start(gpus, sequences, share):
    """No process moves it by itself: without that the start would run out of memory, or be slower than its plan."""
    sizes = "data.seq_len_tokens=512", f"train.micro_batch_size={sequences}", "train.gradient_accumulation_steps=1"
    asked = workload("llama-3.1-8b", gpus, *sizes)
    found, usable = plan_start(asked), asked.hardware.usable_gib
    assert found.layout.share == share and found.config.train.offload_embeddings
    steps = asked.tokens // (512 * sequences)
    step, _ = as_started(asked, steps)
    assert step.peak_gib <= usable and step.seconds <= 1.05 * found.plan.choice.seconds
    without = replace(asked, config=found.config.with_settings({OFFLOAD: False}))
    other = settings_as_given(without, steps, found.layout)
    assert other.peak_gib > usable if share == "copies" else other.seconds > 1.1 * step.seconds


def test_tokens_of_a_training_are_those_of_its_epochs_or_of_its_steps():
    data, config = TrainingTokens(1000, 0.2), profile_config("falcon-40b").with_settings(["train.epochs=1.5"])
    assert data.in_all(config) == 1500
    assert data.in_all(config.with_settings(["train.max_steps=2"])) == 2 * 8 * config.data.seq_len_tokens


def test_what_the_page_says_is_whole_on_every_gpu_is_what_the_plan_counts():
    text = PAGE.read_text(encoding="utf-8")
    said = text[text.index("**What is whole on every GPU.**") : text.index("**Out of memory.**")]
    figures = [float(each) for each in re.findall(r"\b0\.\d\d\b", said)]
    asked = workload("falcon-40b", "ml.g5.12xlarge", "adapter.r=8")
    step, sizes = asked.step(shards=4), asked.sizes
    (held,) = candidate(asked, step, gpus=1, gradient_accumulation_steps=2).memory
    embedding = gib(2 * sizes.vocab * sizes.hidden)
    sent = exchange(sizes, step, asked.hardware, step_time(sizes, step, asked.gpu))
    trained = [gib(each) for each in (held.adapters, held.gradients, held.optimizer)]
    expected = [*trained, embedding, 0.75 * sum(trained), 0.75 * embedding, 0.75 * embedding, gib(sent.gathered_bytes)]
    assert figures == [pytest.approx(each, abs=0.006) for each in expected]
    (alone,) = candidate(asked, replace(step, shards=1), gpus=1, gradient_accumulation_steps=2).memory
    whole = ("adapters", "optimizer", "weights_other")
    assert [getattr(held, name) for name in whole] == [getattr(alone, name) for name in whole]
    assert held.weights_quantized == pytest.approx(alone.weights_quantized / 4)
