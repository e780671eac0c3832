"""Candidates and fixes one at a time: what is tried, and how a candidate's time and price follow from its step."""

from __future__ import annotations

import dataclasses

import pytest

from qlora_helpers.base.profiles import profile_config
from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import parse_gpus
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.planning.candidates import (
    all_candidates,
    candidate,
    copies_speedup,
    fitting_candidates,
    micro_batch_sizes,
)
from qlora_helpers.planning.fixes import _changes, can_fit
from qlora_helpers.planning.memory import loss_bytes, loss_chunk, memory_details, predict, usable_with_margin
from qlora_helpers.planning.speed import COMPILE_S, step_seconds
from qlora_helpers.planning.workload import Workload

RECIPE = profile_config("falcon-40b").with_settings(["adapter.lora_dropout=0", "data.seq_len_tokens=1024"])


def workload(*settings: str, model: str = "llama-3.1-8b", gpus: str = "H100", price: float | None = None) -> Workload:
    return Workload(RECIPE.with_settings(settings), SHAPES[model], parse_gpus(gpus, price), tokens=10**6)


def test_micro_batch_sizes_divide_the_sequences_up_to_256():
    assert micro_batch_sizes(12) == [1, 2, 3, 4, 6, 12]
    assert micro_batch_sizes(512) == [1, 2, 4, 8, 16, 32, 64, 128, 256]


@pytest.mark.parametrize(("copies", "times"), [(1, 1.0), (2, 1.9), (8, 7.6)])
def test_copies_lose_a_twentieth_to_each_other(copies, times):
    assert copies_speedup(copies) == pytest.approx(times)


@pytest.mark.parametrize("compiled", [True, False])
def test_time_and_price_of_a_candidate_follow_from_its_step(compiled):
    asked = workload(gpus="4xH100", price=2.5)
    step = asked.step(micro_batch_size=2, compiled=compiled, copies=4)
    found = candidate(asked, step, gpus=1, gradient_accumulation_steps=3)
    averaged = 2 * 3 / 4 * 4 * step.adapter_parameters / (450e9 * 0.75)  # once in three passes, over NVLink 4
    rate = 4 * 0.95 * 2 * 1024 / (step_seconds(asked.sizes, step, asked.gpu) + averaged / 3)
    assert found.tokens_per_s == pytest.approx(rate)
    assert found.seconds == pytest.approx(10**6 / rate + (COMPILE_S if compiled else 0))
    assert found.dollars == pytest.approx(2.5 * found.seconds / 3600)
    assert found.optimizer_step_s == pytest.approx(4 * 3 * 2 * 1024 / rate)


def test_the_ways_in_which_gpus_can_share_the_sequences_are_candidates():
    """Where no two GPUs can share the sequences, one GPU works, or one copy is spread over all."""
    one = ["train.micro_batch_size=1", "train.gradient_accumulation_steps=1"]
    found = all_candidates(workload(*one, gpus="2xH100"))
    assert {each.share for each in found} == {"one", "spread"}
    found = all_candidates(workload(gpus="2xH100"))
    assert {each.share for each in found} == {"one", "copies", "shards", "spread"}
    assert {each.layout.gpus for each in found} == {1, 2}


def test_the_candidate_that_ends_first_comes_first():
    """In a short run an uncompiled step is done first though its tokens a second are fewer."""
    found = fitting_candidates(all_candidates(dataclasses.replace(workload(), tokens=20_000)), 80)
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)
    assert found[0].tokens_per_s < max(each.tokens_per_s for each in found)


def test_the_mildest_changes_are_those_that_change_something():
    def changes(*settings: str) -> list[str]:
        return _changes(RECIPE.with_settings(["train.optim=adamw_torch", *settings]))

    inputs = "train.offload_checkpoints=true"
    assert changes("adapter.r=8") == [inputs, "train.optim=adamw_8bit"]
    assert changes("adapter.r=9", inputs) == ["train.optim=adamw_8bit"]  # the rank is tried after these
    assert changes("adapter.r=8", "train.fast_step=false") == ["train.optim=adamw_8bit"]
    assert changes("adapter.r=8", "train.activation_checkpointing=false") == ["train.optim=adamw_8bit"]
    assert changes("train.optim=adamw_8bit", "model.quantization=none", "adapter.r=8", inputs) == [
        "model.quantization=nf4"
    ]


def test_a_model_that_fits_with_its_embedding_offloaded_can_fit():
    least = 8.0
    while can_fit(workload(gpus=f"{least:.2f}GiB")):
        least -= 0.05
    step = workload().step(micro_batch_size=1, compiled=False, checkpointed=32)
    for offloaded, fits in ((True, True), (False, False)):
        (memory,) = predict(workload().sizes, dataclasses.replace(step, offloaded=offloaded))[1]
        assert (gib(memory.total) <= least + 0.05) is fits
    plain = workload("train.fast_step=false", gpus=f"{least + 0.05:.2f}GiB")
    assert not can_fit(plain), "without the fast step the embedding stays"


def test_a_margin_of_3_percent_stays_free():
    assert usable_with_margin(100.0) == pytest.approx(97.0)


def test_a_chunk_of_logits_is_whole_tiles_and_at_most_128_mib():
    assert [loss_chunk(vocab) for vocab in (1_000, 65_024, 128_256, 262_144, 10**7)] == [33_536, 512, 256, 128, 16]
    for vocab in (1_000, 65_024, 128_256, 262_144):
        assert loss_chunk(vocab) * vocab * 4 <= 128 * 2**20


def test_capped_logits_keep_what_is_before_the_cap():
    for name, bytes_each in (("gemma-2-9b", 16), ("gemma-3-12b", 12)):
        asked = workload(model=name)
        step = asked.step(micro_batch_size=8)
        trained = round(0.2 * step.tokens)
        expected = loss_chunk(asked.sizes.vocab) * asked.sizes.vocab * bytes_each + 2 * trained * asked.sizes.hidden * 2
        assert loss_bytes(asked.sizes, step) == expected


@pytest.mark.parametrize(("name", "gpu"), [("llama-3.1-8b", 1), ("smollm2-135m", 0)])
def test_logits_are_with_the_output_layer(name, gpu):
    asked = workload(model=name)
    details = memory_details(asked.sizes, asked.step(), (asked.sizes.layers // 2,) * 2)
    assert [each.logits > 0 for each in details] == [gpu == 0, gpu == 1]


def test_experts_of_a_token_work_at_once():
    """In a layer's backward pass, each with four values of its inner width."""
    sizes = workload(model="mixtral-8x7b").sizes
    step = workload(model="mixtral-8x7b").step(micro_batch_size=8, trained_share=0.01)
    one = dataclasses.replace(sizes, experts_per_token=1)
    working = [predict(each, step)[1][0].working for each in (sizes, one)]
    assert working[0] - working[1] == 2 * step.tokens * 4 * 14336
