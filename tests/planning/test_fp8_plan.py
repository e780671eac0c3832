"""FP8 in a plan: on cards that were measured, where it is faster; its bytes and speed beside measured ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_helpers.base.profiles import profile_config
from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import GPUS, parse_gpus
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.planning.fp8 import fp8_refusal
from qlora_helpers.planning.memory import predict
from qlora_helpers.planning.plan import make_plan
from qlora_helpers.planning.speed import step_seconds
from qlora_helpers.planning.step_settings import step_settings
from qlora_helpers.planning.workload import Workload

CASES = json.loads((Path(__file__).parents[2] / "benchmarks" / "fp8_step_speed_one_gpu.json").read_text())["cases"]


def automatic():
    """The recipe's settings with the matrix multiplications' type chosen by the plan."""
    return profile_config("falcon-40b").with_settings(["train.matmul_dtype=auto"])


def plan(gpus, model="falcon-40b", **train):
    config = automatic().with_settings({f"train.{name}": value for name, value in train.items()})
    return make_plan(Workload(config, SHAPES[model], parse_gpus(gpus), tokens=10**6))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['model']}-{case['variant']}-{case['limit_gib']}")
def test_steps_and_bytes_are_near_those_measured_on_an_h200(case):
    sizes = model_sizes(SHAPES[case["model"]])
    settings = {"adapter.r": case["r"], "adapter.lora_dropout": 0.0, "train.offload_embeddings": case["offloaded"]}
    step = step_settings(
        profile_config("falcon-40b").with_settings(settings),
        SHAPES[case["model"]],
        micro_batch_size=case["blocks"],
        checkpointed=case["layers_checkpointed"],
        captured=True,
        trained_share=case["trained_share"],
    )
    step = replace(step, seq_len_tokens=2048, fp8=case["fp8"])
    _, (memory,) = predict(sizes, step)
    assert step_seconds(sizes, step, GPUS["H200"]) == pytest.approx(case["step_s"], rel=0.06)
    assert gib(memory.allocated) == pytest.approx(case["peak_allocated_gib"], rel=0.03)
    assert gib(memory.reserved) == pytest.approx(case["peak_reserved_gib"], rel=0.03)


def test_bfloat16_is_the_default():
    assert profile_config("falcon-40b").train.matmul_dtype == "bfloat16"


def test_auto_takes_fp8_on_a_card_where_it_was_measured():
    found = plan("H200")
    assert found.choice.fp8 and "in FP8" in repr(found.choice) and found.choice.to_dict()["fp8"]
    assert "as measured on H200" in " ".join(found.notes)
    wide = plan("H200", matmul_dtype="bfloat16")
    assert not wide.choice.fp8 and 1.3 < found.choice.tokens_per_s / wide.choice.tokens_per_s < 1.8


@pytest.mark.parametrize("gpus", ["H100", "L40S", "L4"])
def test_other_cards_are_probed_and_not_measured(gpus):
    assert plan(gpus).choice is None or not plan(gpus).choice.fp8
    asked = plan(gpus, matmul_dtype="fp8")
    assert (asked.choice or asked.smallest).fp8
    assert f"FP8 on {gpus}: probed before training, not measured" in " ".join(asked.notes)


def test_a_card_without_fp8_is_planned_in_bfloat16_with_a_note():
    asked = plan("A100-80GB", matmul_dtype="fp8")
    assert not asked.choice.fp8 and "A100-80GB has no FP8" in " ".join(asked.notes)


def test_layers_over_several_gpus_keep_bfloat16_unless_asked():
    config = automatic()
    workload = Workload(config, SHAPES["falcon-40b"], parse_gpus("2xH200"), tokens=10**6, one_process=True)
    assert not make_plan(workload).choice.fp8
    assert make_plan(workload.with_settings(["train.matmul_dtype=fp8"])).choice.fp8


@pytest.mark.parametrize(
    ("changes", "gpu", "words"),
    [
        ({"train.matmul_dtype": "bfloat16"}, "H200", "ask for none"),
        ({"train.fast_step": False}, "H200", "ask for none"),
        ({"model.compute_dtype": "float32"}, "H200", "bfloat16"),
        ({"model.quantization": "none"}, "H200", "4 bits"),
        ({}, "A10G", "A10G has none"),
        ({}, "H100", "was not measured"),
    ],
)
def test_the_reason_for_bfloat16_is_one_sentence(changes, gpu, words):
    config, shape = automatic().with_settings(changes), SHAPES["falcon-40b"]
    step = step_settings(config, shape, micro_batch_size=4, trained_share=0.2)
    assert words in fp8_refusal(config.train, model_sizes(shape), step, GPUS[gpu])


def test_a_small_model_gains_nothing_and_keeps_bfloat16():
    config, shape = automatic(), SHAPES["smollm2-135m"]
    step = step_settings(config, shape, micro_batch_size=1, trained_share=0.2)
    assert "of its time in bfloat16" in fp8_refusal(config.train, model_sizes(shape), step, GPUS["H200"])
