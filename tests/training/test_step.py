"""The plan chooses what settings leave open about a step; what they set, they decide."""

from __future__ import annotations

import pytest

from qlora_helpers.base.config import TrainConfig
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import GPUS
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.planning.memory import predict
from qlora_helpers.planning.step_settings import step_settings
from qlora_helpers.training.step import compiled_and_checkpointed

SIZES = model_sizes(SHAPES["falcon-40b"])
STEP = step_settings(profile_config("falcon-40b"), SHAPES["falcon-40b"], micro_batch_size=2, trained_share=0.2)


def chosen(usable_gib: float, *, passes: int = 10_000, packed: bool = True, **settings):
    return compiled_and_checkpointed(
        TrainConfig(**settings), SIZES, STEP, GPUS["H100"], usable_gib, passes=passes, packed=packed
    )


def total_gib(checkpointed: int) -> float:
    step = STEP.__class__(**vars(STEP) | {"checkpointed": checkpointed})
    return gib(predict(SIZES, step)[1][0].total)


@pytest.mark.parametrize("usable_gib", [30, 45, 60, 77])
def test_as_few_layers_are_checkpointed_as_fit(usable_gib):
    _, checkpointed = chosen(usable_gib)
    assert total_gib(checkpointed) <= usable_gib
    assert checkpointed == 0 or total_gib(checkpointed - 1) > usable_gib


def test_where_nothing_fits_all_are_checkpointed():
    assert chosen(20) == (True, 60)


def test_the_settings_have_the_last_word():
    assert chosen(30, activation_checkpointing=False)[1] == 0
    assert chosen(30, checkpointed_layers=7)[1] == 7
    assert chosen(77, compile="off")[0] is False
    assert chosen(77, compile="on", passes=1)[0] is True


def test_compilation_must_pay_and_needs_packed_sequences():
    assert chosen(77)[0] is True
    assert chosen(77, passes=5)[0] is False
    assert chosen(77, packed=False)[0] is False


def test_random_rows_have_a_logit_for_each_token(torch):
    """Moshi's embedding has a row more than its output layer, whose loss then has no such target."""
    from tiny import tiny_llama

    from qlora_helpers.training.proving import random_rows

    model = tiny_llama(vocab_size=300)
    model.lm_head = torch.nn.Linear(64, 40, bias=False)
    assert max(max(row) for row in random_rows(model, 200, 100)) < 40
