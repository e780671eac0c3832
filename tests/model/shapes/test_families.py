"""Plain facts about model families, checked against transformers' own models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny import FAMILIES, tiny_model

from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.shapes.families import ADAPTER_TARGETS, adapter_targets, has_dropout, supports_packing


def test_every_listed_family_is_tried_here():
    assert set(FAMILIES) == set(ADAPTER_TARGETS)
    assert len(FAMILIES) >= 12


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_all_linear_layers_of_a_decoder_layer(torch, family):
    """No more and no fewer: QLoRA found adapters on all of them to matter."""
    model = tiny_model(family)
    head = model.get_output_embeddings()
    found = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    assert set(adapter_targets(model.config.to_dict())) == found


def test_an_unlisted_family_has_no_targets_here():
    assert adapter_targets({"model_type": "stablelm"}) is None
    assert adapter_targets({}) is None


@pytest.mark.parametrize(
    ("config", "packs"),
    [
        ({"model_type": "falcon"}, True),
        ({"model_type": "falcon", "alibi": True}, False),  # Falcon-RW
        ({"model_type": "bloom"}, False),
        ({"model_type": "opt"}, False),
        ({"model_type": "llama"}, True),
        ({"model_type": "mamba"}, False),
        ({"model_type": "mistral", "sliding_window": 512}, True),
        ({"model_type": "mistral", "sliding_window": 511}, False),
        ({"model_type": "mistral", "sliding_window": None}, True),
        ({"model_type": "mistral", "sliding_window": "wide"}, False),
        ({"model_type": ["mistral"]}, False),
        ({"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": False}, True),
        ({"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": True}, False),
        ({}, False),
    ],
)
def test_which_models_support_packing(config, packs):
    assert supports_packing(config, 512) is packs


@pytest.mark.parametrize(
    ("config", "drops"),
    [({}, False), ({"dropout": 0.1}, True), ({"attention_dropout": 0.0}, False), ({"dropout": "much"}, False)],
)
def test_which_models_have_dropout_of_their_own(config, drops):
    assert has_dropout(config) is drops


@pytest.mark.parametrize("family", [family for family in FAMILIES if supports_packing({"model_type": family}, 64)])
def test_models_that_support_packing_isolate_rows(torch, family):
    """Proved on a model of each family, with weights large enough for a leak to show."""
    changed, difference = block_diagonal(tiny_model(family, initializer_range=0.5))
    assert changed == 0
    assert difference < 1e-4


def test_a_model_that_leaks_between_rows_is_found(torch):
    with pytest.raises((ModelError, ValueError, RuntimeError)):
        block_diagonal(tiny_model("bloom", initializer_range=0.5))


def block_diagonal(model) -> tuple[float, float]:
    from qlora_helpers.training.probes import check_block_diagonal
    from qlora_helpers.training.step import make_collator

    model.config.use_cache = False
    collator = make_collator(model, SimpleNamespace(pad_token_id=0), SimpleNamespace(packed=True, seq_len_tokens=32))
    return check_block_diagonal(model, collator)
