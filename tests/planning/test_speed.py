"""Parts of a step's predicted seconds, each against its definition; the sum is compared with a GPU in `test_plan`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_helpers.machine.hardware import GPUS
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.planning.speed import (
    ADDED_BYTES,
    COMPILE_S,
    DORA_BYTES,
    FITTED,
    GRADIENT_BYTES,
    LOOKUP_BYTES_S,
    compile_pays,
    step_seconds,
)
from qlora_helpers.planning.step_settings import HALF, StepSettings

H100 = GPUS["H100"]
MEMORY = H100.bandwidth_gb_s * 1e9 * FITTED.memory_share
LLAMA, SMALL = model_sizes(SHAPES["llama-3.1-8b"]), model_sizes(SHAPES["falcon3-1b"])
STEP = StepSettings(
    seq_len_tokens=1024,
    micro_batch_size=4,
    checkpointed=0,
    compiled=True,
    r=8,
    adapter_parameters=10**7,
    captured=True,
)


def seconds(sizes=LLAMA, **changes) -> float:
    return step_seconds(sizes, replace(STEP, **changes), H100)


def test_the_optimizer_reads_and_writes_28_bytes_a_weight():
    more = seconds(adapter_parameters=2 * 10**8) - seconds(adapter_parameters=10**8)
    assert more == pytest.approx(28 * 10**8 / MEMORY)


def test_adapters_on_experts_are_added_to_all_of_them_in_each_pass():
    """Of a token, where other parts are small: in the forward and the backward pass, and in checkpointed layers once more."""
    mixture = model_sizes(SHAPES["mixtral-8x7b"])
    one = {"sizes": mixture, "seq_len_tokens": 1, "micro_batch_size": 1, "skipped": False}
    weights, matrix = mixture.layers * 8 * 3 * 4096 * 14336, H100.bf16_tflops * 1e12 * FITTED.matrix_share
    added = weights * (ADDED_BYTES / MEMORY + 2 * STEP.r / matrix)
    learned = weights * (GRADIENT_BYTES / MEMORY + 4 * STEP.r / matrix)
    assert seconds(**one, on_experts=1) - seconds(**one) == pytest.approx(2 * added + learned, rel=1e-3)
    again = one | {"checkpointed": mixture.layers}
    assert seconds(**again, on_experts=1) - seconds(**again) == pytest.approx(3 * added + learned, rel=1e-3)


def test_dora_computes_norms_of_weights_in_each_forward_pass():
    """For a token, where other parts are small; in checkpointed layers twice."""
    one = {"seq_len_tokens": 1, "micro_batch_size": 1}
    norms = DORA_BYTES * 32 * LLAMA.linear_parameters_per_layer / MEMORY
    assert seconds(**one, dora=True) - seconds(**one) == pytest.approx(norms, rel=0.02)
    checkpointed = one | {"checkpointed": 32, "skipped": False}
    assert seconds(**checkpointed, dora=True) - seconds(**checkpointed) == pytest.approx(2 * norms, rel=0.02)


def test_a_step_is_never_faster_than_the_host_launches_it():
    """A captured step needs no launches."""
    launches = SMALL.layers * (FITTED.forward_host_s + FITTED.backward_host_s)
    small = {"sizes": SMALL, "seq_len_tokens": 64, "micro_batch_size": 1}
    assert seconds(**small, captured=False) == pytest.approx(launches)
    assert seconds(**small, captured=False, compiled=False) == pytest.approx(FITTED.eager_host_factor * launches)
    again = seconds(**small, captured=False, checkpointed=3)
    assert again - launches == pytest.approx(3 * FITTED.forward_host_s)
    assert seconds(**small) < launches / 2


def test_the_host_looks_up_an_offloaded_embedding_of_its_own():
    small = {"seq_len_tokens": 64, "micro_batch_size": 1, "captured": False}
    looked_up = HALF * 64 * SMALL.hidden / LOOKUP_BYTES_S
    assert not SMALL.tied
    assert seconds(SMALL, **small, offloaded=True) - seconds(SMALL, **small) == pytest.approx(looked_up)
    tied = model_sizes(SHAPES["smollm2-135m"])
    assert seconds(tied, **small, offloaded=True) == seconds(tied, **small)


def test_logits_take_time_for_trained_tokens_alone():
    fewer, more = (seconds(trained_share=share) - seconds(trained_share=0) for share in (0.2, 1.0))
    assert more == pytest.approx(5 * fewer) and fewer > 0


def test_compilation_pays_once_it_saves_more_than_it_takes():
    saved = seconds(compiled=False) - seconds(compiled=True)
    enough = int(COMPILE_S / saved) + 1
    assert compile_pays(LLAMA, STEP, H100, enough) and not compile_pays(LLAMA, STEP, H100, enough - 1)
    assert COMPILE_S == 30.0, "measured; change it with a measurement"
