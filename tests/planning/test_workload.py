"""What a run's settings allow on some hardware, and how much work its data are."""

from __future__ import annotations

import pytest

from qlora_helpers.base.profiles import profile_config
from qlora_helpers.data.known import DataSize
from qlora_helpers.machine.hardware import parse_gpus
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.planning.forecast import steps_and_tokens
from qlora_helpers.planning.layout import copies_sharing
from qlora_helpers.planning.step_settings import HALF, SINGLE
from qlora_helpers.planning.workload import Workload

PLAIN = ("adapter.lora_dropout=0", "train.cuda_graph=true", "data.packing=true", "data.seq_len_tokens=1024")


def workload(*settings: str, model: str = "llama-3.1-8b", gpus: str = "H100", **changes) -> Workload:
    config = profile_config("falcon-40b").with_settings([*PLAIN, *settings])
    return Workload(config, SHAPES[model] | changes, parse_gpus(gpus), tokens=10**6)


@pytest.mark.parametrize(
    ("may", "asked"),
    [
        (True, workload()),
        (True, workload("model.compute_dtype=float32")),
        (True, workload(gpus="24GiB")),
        (False, workload("model.compute_dtype=float16")),
        (False, workload(gpus="T4")),
        (False, workload("adapter.lora_dropout=0.01")),
        (False, workload(attention_dropout=0.1)),
        (True, workload(attention_dropout=0.0)),
        (False, workload("data.packing=false")),
        (False, workload("train.cuda_graph=false")),
        (False, workload("train.fast_step=false")),
        (True, workload(model="gemma-2-9b")),
        (True, workload(model="gemma-3-1b", sliding_window=1024)),
        (True, workload(model="gemma-3-1b", sliding_window=1023)),  # windows are packed, too
        (False, workload(alibi=True)),  # not packed
    ],
)
def test_where_cuda_graphs_are_possible(may, asked):
    assert asked.may_capture is may


def test_where_layers_may_be_compiled_and_the_embedding_offloaded():
    assert workload().may_compile and workload().embedding_places == (False, True)
    assert not workload("data.packing=false").may_compile
    assert not workload("train.fast_step=false").may_compile
    assert workload("train.fast_step=false").embedding_places == (False,)
    assert workload(model="smollm2-135m").embedding_places == (False,)  # tied to the output layer


def test_a_step_is_the_settings_with_changes():
    asked = workload("train.micro_batch_size=3", "train.gradient_accumulation_steps=5", "train.optim=adamw_8bit")
    step = asked.step(checkpointed=7)
    assert (step.micro_batch_size, step.checkpointed, step.compiled, step.captured) == (3, 7, True, False)
    assert (step.optim, step.tokens, asked.sequences_per_step) == ("adamw_8bit", 3 * 1024, 15)
    kinds = [workload(f"model.compute_dtype={kind}").step() for kind in ("bfloat16", "float16", "float32")]
    assert [(each.value_bytes, each.skipped) for each in kinds] == [(HALF, True), (HALF, False), (SINGLE, True)]


def test_how_copies_are_spread():
    assert [copies_sharing(8, gpus) for gpus in (1, 2, 3, 4, 7, 8, 16)] == [1, 2, 2, 4, 4, 8, 8]
    assert [each.share for each in workload(gpus="4xL4").layouts] == ["one", "copies", "shards", "spread"]
    assert [each.share for each in workload(gpus="L4").layouts] == ["one"]
    several = workload(gpus="2xml.g5.12xlarge").layouts
    assert [each.share for each in several] == ["one", "copies", "shards", "copies of shards"]
    assert all(each.gpus == each.processes == 8 for each in several[1:])
    asked = workload("train.share=shards", gpus="4xL4").layouts
    assert [(each.share, each.processes) for each in asked] == [("shards", 4)]
    one = Workload(workload().config, SHAPES["llama-3.1-8b"], parse_gpus("4xL4"), tokens=1, one_process=True)
    assert [(each.share, each.spread) for each in one.layouts] == [("spread", 4)]


@pytest.mark.parametrize(
    ("settings", "packed", "steps", "tokens"),
    [
        ([], True, 2, 5_000),  # 4.9 sequences of 1,024 tokens make 5, and 4 an optimizer step
        (["train.epochs=3"], True, 6, 15_000),
        ([], False, 25, 100 * 1024),
        (["data.train_rows=10"], True, 1, 500),
        (["data.train_rows=1000"], True, 2, 5_000),
        (["train.max_steps=7"], True, 7, 7 * 4 * 1024),
    ],
)
def test_steps_and_tokens_of_a_training(settings, packed, steps, tokens):
    batches = ["train.micro_batch_size=2", "train.gradient_accumulation_steps=2", "train.epochs=1"]
    config = workload(*batches, *settings).config
    assert steps_and_tokens(config, DataSize(100, 50.0), packed=packed) == (steps, tokens)
