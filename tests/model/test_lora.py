"""Adapters are added to the right layers, counted as unpacked, and have no effect until they are trained."""

from __future__ import annotations

import copy
import math

import pytest
from tiny import tiny_llama, tiny_model

from qlora_helpers.base.config import AdapterConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.adapter_loading import load_adapter
from qlora_helpers.model.lora import add_adapters, linear_layer_names, target_modules
from qlora_helpers.model.parameter_counts import ParameterCount, adapter_sizes, count_from_shape, count_parameters
from qlora_helpers.model.shapes.catalog import SHAPES

LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_falcon_40b_is_counted_in_both_ways(torch):
    """The recipe's published figures count two 4-bit weights as one; the true total is twice as large."""
    count = count_from_shape(SHAPES["falcon-40b"], AdapterConfig())
    assert count == ParameterCount(trainable=55_541_760, total=41_358_835_712, published_total=20_974_518_272)
    assert round(count.percent, 4) == 0.1343
    assert round(count.published_percent, 4) == 0.2648
    for figure in ("55,541,760", "41,358,835,712", "0.1343 %", "20,974,518,272", "0.2648 %"):
        assert figure in repr(count)


def test_published_sizes_of_other_models_are_met(torch):
    assert count_from_shape(SHAPES["smollm2-135m"], AdapterConfig()).total == 134_515_008 + 2_442_240
    assert round(count_from_shape(SHAPES["llama-3.1-8b"], AdapterConfig()).total / 1e9, 2) == 8.05


def test_a_4_bit_model_is_counted_as_if_unpacked(torch, own_falcon):
    """The count equals that of the same shape on the meta device and of an unquantised copy."""
    expected = count_from_shape(SHAPES["falcon-tiny"], AdapterConfig(r=4))
    count = count_parameters(add_adapters(own_falcon.model, AdapterConfig(r=4), seed=0))
    assert count == expected
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES["falcon-tiny"]))
    assert count.total - count.trainable == sum(parameter.numel() for parameter in plain.parameters())
    layers, hidden = 4, 256
    heads, keys = 256, 2 * 2 * 32
    inputs_and_outputs = (hidden + heads + keys) + (hidden + hidden) + 2 * (hidden + 4 * hidden)
    assert count.trainable == layers * 4 * inputs_and_outputs
    packed = layers * (hidden * (heads + keys) + hidden * hidden + 2 * 4 * hidden * hidden) // 2
    assert count.published_total == count.total - packed


def test_tied_weights_are_counted_once(torch):
    apart, tied = (count_parameters(tiny_llama(tie_word_embeddings=tied)).total for tied in (False, True))
    assert apart - tied == 2048 * 64


# which layers


def test_the_architectures_layers_are_the_default(llama, falcon):
    assert target_modules(llama, AdapterConfig()) == LLAMA_TARGETS
    assert target_modules(falcon.model, AdapterConfig()) == (
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    )


def test_4_bit_layers_are_found(falcon):
    assert linear_layer_names(falcon.model) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


@pytest.mark.parametrize(
    ("family", "expected"),
    [("stablelm", set(LLAMA_TARGETS)), ("mpt", {"Wqkv", "out_proj", "up_proj", "down_proj"})],
)
def test_layers_of_an_unlisted_family_are_discovered(torch, family, expected):
    model = tiny_model(family)
    assert set(target_modules(model, AdapterConfig())) == expected
    adapted = add_adapters(model, AdapterConfig(r=2), seed=0)
    assert {name.split(".")[-4] for name, weight in adapted.named_parameters() if weight.requires_grad} == expected


def test_a_model_without_linear_layers_is_refused(torch):
    with pytest.raises(ModelError, match="no linear layers in its decoder layers"):
        add_adapters(tiny_llama(num_hidden_layers=0), AdapterConfig(), seed=0)


def test_gpt2s_transposed_layers_get_adapters(torch):
    """Its layers are of a kind of its own (Conv1D), which keeps `(in, out)`."""
    adapted = add_adapters(tiny_model("gpt2"), AdapterConfig(r=2), seed=0)
    settings = adapted.active_peft_config
    assert (set(settings.target_modules), settings.fan_in_fan_out) == ({"c_attn", "c_proj", "c_fc"}, True)
    shapes = {name.split(".")[-4]: tuple(w.shape) for name, w in adapted.named_parameters() if "lora_B" in name}
    assert shapes["c_attn"] == (192, 2)


def test_the_users_own_layers_are_taken(llama):
    config = AdapterConfig(r=2, target_modules=("v_proj", "q_proj"))
    assert target_modules(llama, config) == ("v_proj", "q_proj")
    adapted = add_adapters(llama, config, seed=0)
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * 2  # layers, targets, A and B
    assert all("q_proj" in name or "v_proj" in name for name in trained)


@pytest.mark.parametrize(
    "name", ["query_key_value", "lm_head", "embed_tokens", "norm", "proj", "layers.2.self_attn.q_proj"]
)
def test_layers_that_the_model_does_not_have_are_refused(llama, name):
    with pytest.raises(
        ModelError, match=rf"expected some of down_proj, .*; got {name}\. Set adapter.target_modules=none"
    ):
        add_adapters(llama, AdapterConfig(target_modules=("q_proj", name)), seed=0)


# what they do


@pytest.fixture
def ids(torch):
    return torch.randint(2, 2048, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_new_adapters_change_no_answer(torch, own_falcon, ids, settings):
    """B starts at zero, on 4-bit layers and with every option."""
    with torch.no_grad():
        before = own_falcon.model(input_ids=ids).logits
        adapted = add_adapters(own_falcon.model, AdapterConfig(r=4, **settings), seed=0).eval()
        after = adapted(input_ids=ids).logits
        # DoRA divides by a norm that it computes from the weights: equal but for rounding
        assert torch.allclose(before, after, atol=1e-4 if settings.get("use_dora") else 0, rtol=0)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.01)
        assert (adapted(input_ids=ids).logits - before).abs().max() > 1e-2


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 16), (True, 32 / math.sqrt(16))])
def test_the_adapter_is_scaled_by_alpha_over_r(torch, llama, ids, rslora, scale):
    """W x + scale * B A x, to the digit, on one layer."""
    config = AdapterConfig(r=16, lora_alpha=32, lora_dropout=0, use_rslora=rslora, target_modules=("q_proj",))
    plain = copy.deepcopy(llama.model.layers[0].self_attn.q_proj)
    layer = add_adapters(llama, config, seed=0).base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        b.normal_(generator=torch.Generator().manual_seed(2))
        assert torch.allclose(layer(x), plain(x) + scale * x @ a.T @ b.T, atol=1e-4)


def test_dora_also_trains_magnitudes(torch, llama):
    trained = {
        name
        for name, weight in add_adapters(llama, AdapterConfig(use_dora=True), seed=0).named_parameters()
        if weight.requires_grad
    }
    assert sum("lora_magnitude_vector" in name for name in trained) == 2 * len(LLAMA_TARGETS)


def test_only_the_adapters_are_trained_and_they_are_float32(torch, own_falcon):
    adapted = add_adapters(own_falcon.model, AdapterConfig(), seed=0)
    for name, weight in adapted.named_parameters():
        assert weight.requires_grad is ("lora_" in name)
        assert weight.dtype == torch.float32 or not weight.requires_grad


def test_adapters_on_a_bfloat16_model_are_float32(torch, llama):
    adapted = add_adapters(llama.to(torch.bfloat16), AdapterConfig(), seed=0)
    assert {weight.dtype for weight in adapted.parameters() if weight.requires_grad} == {torch.float32}


def test_the_seed_determines_the_adapters(torch):
    def first(seed):
        adapted = add_adapters(tiny_llama(), AdapterConfig(), seed=seed)
        return next(weight for name, weight in adapted.named_parameters() if "lora_A" in name)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_a_second_set_of_adapters_is_refused(llama):
    adapted = add_adapters(llama, AdapterConfig(), seed=0)
    for model in (adapted, llama):
        with pytest.raises(ModelError, match="has adapters already"):
            add_adapters(model, AdapterConfig(), seed=0)


def test_a_saved_adapter_answers_like_the_one_in_memory(torch, llama, ids, tmp_path):
    adapted = add_adapters(llama, AdapterConfig(), seed=0).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
        expected = adapted(input_ids=ids).logits
        adapted.save_pretrained(tmp_path)
        loaded = load_adapter(tiny_llama(), tmp_path).eval()
        assert not any(weight.requires_grad for name, weight in loaded.named_parameters() if "lora_" in name)
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-3)


def test_a_further_adapter_answers_under_its_name_and_a_wrong_one_leaves_the_first_as_it_was(torch, ids, tmp_path):
    answers = {}
    for name, seed in (("one", 1), ("two", 2)):
        model = add_adapters(tiny_llama(), AdapterConfig(r=4), seed=0).eval()
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter, weight in model.named_parameters():
                if "lora_B" in parameter:
                    weight.normal_(std=0.1, generator=draw)
            answers[name] = model(ids).logits
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    other = add_adapters(tiny_llama(hidden_size=32), AdapterConfig(r=4), seed=0)
    other.save_pretrained(tmp_path / "other", save_embedding_layers=False)
    loaded = load_adapter(tiny_llama(), tmp_path / "one")
    assert load_adapter(loaded, tmp_path / "two", name="further") is loaded
    with pytest.raises(ModelError, match="the saved adapter could not be loaded"):
        load_adapter(loaded, tmp_path / "other", name="wrong")
    with torch.no_grad():
        for name, expected in (("default", "one"), ("further", "two"), ("default", "one")):
            loaded.set_adapter(name)
            assert torch.equal(loaded.eval()(ids).logits, answers[expected])
    assert set(loaded.peft_config) == {"default", "further"}


@pytest.mark.parametrize("settings", [{}, {"r": 4}, {"use_dora": True}, {"target_modules": ("dense",)}])
def test_computed_sizes_are_those_that_are_added(torch, own_falcon, settings):
    config = AdapterConfig(**settings)
    sizes = adapter_sizes(own_falcon.model, config)
    assert [size.layers for size in sizes] == [4] * len(target_modules(own_falcon.model, config))
    model = add_adapters(own_falcon.model, config, seed=0)
    assert sum(size.parameters for size in sizes) == count_parameters(model).trainable
