"""Weights are counted before they are loaded, and a 4-bit layer is compared with its original."""

from __future__ import annotations

import dataclasses
import math

import pytest
from tiny import tiny_llama, tiny_model

from qlora_helpers.base.config import ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.checkpoints import Checkpoint, find_checkpoint
from qlora_helpers.model.inspection import WeightCounts, compare_layer, count_weights, read_shape
from qlora_helpers.model.shapes.catalog import SHAPES


def test_falcon_40b_is_counted_from_its_shape(torch):
    counts = count_weights(SHAPES["falcon-40b"])
    assert counts == WeightCounts(linear=40_768_634_880, other=534_659_072)
    assert round(counts.gib(linear_bits=16, other_bits=16), 2) == 76.93
    assert round(counts.gib(linear_bits=4 + 8 / 64 + 32 / (64 * 256), other_bits=16), 2) == 20.58
    for figure in ("40,768,634,880", "98.7%", "534,659,072", "41,303,293,952"):
        assert figure in repr(counts)


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_head_is_not_counted_among_the_linear_layers(torch, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    counts = count_weights(model.config.to_dict())
    in_blocks = sum(part.weight.numel() for part in model.model.layers.modules() if isinstance(part, torch.nn.Linear))
    assert counts == WeightCounts(in_blocks, sum(part.numel() for part in model.parameters()) - in_blocks)


def test_the_shape_is_read_from_the_checkpoint(torch, falcon):
    assert read_shape(falcon.checkpoint)["hidden_size"] == 256
    large = find_checkpoint(ModelConfig(name="random:falcon-7b"), say=lambda text: None)
    assert (read_shape(large)["hidden_size"], read_shape(large)["model_type"]) == (4544, "falcon")


def test_predicted_and_measured_sizes_agree(torch, falcon):
    dtype = torch.float32 if falcon.audit.compute_dtype == "float32" else torch.bfloat16
    predicted = count_weights(read_shape(falcon.checkpoint)).gib(linear_bits=4.127, other_bits=8 * dtype.itemsize)
    assert math.isclose(predicted, sum(falcon.audit.gib_by_device.values()), rel_tol=0.01)


def test_a_layer_is_compared_with_its_original(torch, falcon):
    layer = compare_layer(falcon.model, falcon.checkpoint)
    assert layer.name == "transformer.h.0.self_attention.query_key_value.weight"
    assert layer.original.shape == layer.restored.shape == (384, 256)
    assert 0.08 < layer.relative_error < 0.10  # normally distributed weights lose 9.2 %
    assert 4.127 < layer.bits < 4.25
    assert "384 x 256" in repr(layer)
    exact = dataclasses.replace(layer, restored=layer.original)
    assert exact.relative_error == 0


def test_a_missing_4_bit_layer_or_original_is_reported(torch, falcon, tmp_path):
    with pytest.raises(ModelError, match="no layer in 4 bits"):
        compare_layer(tiny_model("llama"), falcon.checkpoint)
    with pytest.raises(ModelError, match="no file with the weight transformer"):
        compare_layer(falcon.model, Checkpoint("random:falcon-7b", tmp_path, "random"))


def test_a_mixtures_experts_count_as_stored_in_4_bits(torch):
    """By arithmetic for a listed family, and on the meta device for others: in both, what loading packs."""
    from mixtures import MIXTURES, tiny_mixture

    from qlora_helpers.model.quantizer import stacks_of

    for family in ("mixtral", "olmoe"):
        counts = count_weights({"model_type": family, **MIXTURES[family]})
        model = tiny_mixture(family)
        stacks = sum(module._parameters[name].numel() for module, names in stacks_of(model) for name in names)
        attention = sum(layer.self_attn.q_proj.weight.numel() * 2 for layer in model.model.layers)
        assert stacks + attention <= counts.linear <= stacks + 2 * attention
        assert counts.linear + counts.other == sum(parameter.numel() for parameter in model.parameters())
