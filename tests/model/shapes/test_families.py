"""Plain facts about model families, checked against transformers' own models."""

from __future__ import annotations

import pytest
from tiny import FAMILIES, tiny_model

from qlora_helpers.model.shapes.families import ADAPTER_TARGETS, adapter_targets, has_dropout, packing_refusal


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
    ("config", "reason"),
    [
        ({"model_type": "falcon"}, None),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),  # Falcon-RW
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "mpt"}, "ALiBi"),
        ({"model_type": "mpt", "attn_config": {"alibi": False}}, None),
        ({"model_type": "opt"}, None),
        ({"model_type": "stablelm"}, None),
        ({"model_type": "mamba", "state_size": 16}, "recurrent"),
        ({"model_type": "jamba", "mamba_d_state": 16}, "recurrent"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, None),
        ({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}, "recurrent"),
        ({"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}, None),
        ({"model_type": "granitemoehybrid", "mamba_d_state": 16, "layer_types": ["attention", "attention"]}, None),
        ({"model_type": "recurrent_gemma", "block_types": ["recurrent", "attention"]}, "recurrent"),
        ({"model_type": "mistral", "sliding_window": 511}, None),
        ({"model_type": "mistral", "sliding_window": "wide"}, None),
        ({"model_type": ["mistral"]}, "no model type"),
        ({}, "no model type"),
    ],
)
def test_which_models_will_probably_be_packed(config, reason):
    found = packing_refusal(config)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4096}},
        {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096},
        {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}, "max_position_embeddings": 4096},
    ],
)
def test_positions_that_follow_the_longest_row_are_a_reason_beyond_their_length_alone(config):
    config = config | {"model_type": "phi3"}
    assert packing_refusal(config, 4096) is None
    assert "data.seq_len_tokens of at most 4,096" in packing_refusal(config, 4097)
    assert packing_refusal({"model_type": "llama", "rope_parameters": {"rope_type": "yarn"}}, 10**6) is None


@pytest.mark.parametrize(
    ("config", "drops"),
    [({}, False), ({"dropout": 0.1}, True), ({"attention_dropout": 0.0}, False), ({"dropout": "much"}, False)],
)
def test_which_models_have_dropout_of_their_own(config, drops):
    assert has_dropout(config) is drops
