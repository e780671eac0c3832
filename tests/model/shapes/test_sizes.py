"""Sizes by arithmetic, each compared with the model that transformers builds and with what bitsandbytes and peft make of it."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, UNLISTED, tiny_llama, tiny_model

from qlora_helpers.base.config import AdapterConfig
from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.machine.hardware import parse_gpus
from qlora_helpers.model.inspection import count_weights
from qlora_helpers.model.lora import add_adapters
from qlora_helpers.model.nf4 import falcon_linears_as_plain
from qlora_helpers.model.parameter_counts import count_parameters
from qlora_helpers.model.shapes import sizes as module
from qlora_helpers.model.shapes import wirings
from qlora_helpers.model.shapes.catalog import SHAPES, known_shape
from qlora_helpers.model.shapes.sizes import adapter_parameters, model_sizes
from qlora_helpers.model.shapes.wirings import KNOWN_FAMILIES
from qlora_helpers.planning.memory import StepMemory
from qlora_helpers.planning.plan import make_plan
from qlora_helpers.planning.workload import Workload

LLAMA = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_GROUPED = LLAMA | {"num_key_value_heads": 2}
_FALCON = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_OPT = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128}
_BLOOM = {"vocab_size": 256, "hidden_size": 64, "n_layer": 2, "n_head": 4}

# Wirings that no catalogued shape has
WIRINGS = {
    "llama with biases": ("llama", _GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama, head size of its own": ("llama", _GROUPED | {"head_dim": 32}),
    "llama without grouping": ("llama", LLAMA),
    "mistral, default key-value heads": ("mistral", LLAMA | {"num_attention_heads": 8}),
    "mistral, which has no biases": ("mistral", _GROUPED | {"attention_bias": True}),
    "qwen2, tied": ("qwen2", _GROUPED | {"tie_word_embeddings": True}),
    "qwen3 with biases": ("qwen3", _GROUPED | {"attention_bias": True}),
    "gemma": ("gemma", _GROUPED),
    "gemma, untied": ("gemma", _GROUPED | {"tie_word_embeddings": False, "attention_bias": True}),
    "gemma2, default head size": ("gemma2", LLAMA),
    "gemma3, default heads and vocabulary": (
        "gemma3_text",
        {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128},
    ),
    "mixtral": ("mixtral", _GROUPED | {"num_local_experts": 4}),
    "mixtral, default experts": ("mixtral", LLAMA | {"num_attention_heads": 8}),
    "qwen3 with experts, with biases": ("qwen3_moe", _GROUPED | {"num_local_experts": 4, "attention_bias": True}),
    "qwen3 with experts, defaults": ("qwen3_moe", LLAMA | {"num_attention_heads": 8}),
    "phi": ("phi", LLAMA),
    "phi, grouped, normalised": ("phi", _GROUPED | {"qk_layernorm": True}),
    "phi, tied": ("phi", LLAMA | {"tie_word_embeddings": True}),
    "phi3, tied": ("phi3", _GROUPED | {"tie_word_embeddings": True, "pad_token_id": 0}),
    "gpt_neox": ("gpt_neox", LLAMA),
    "gpt_neox in sequence, without attention biases": (
        "gpt_neox",
        LLAMA | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "opt": ("opt", _OPT | {"max_position_embeddings": 32}),
    "opt, narrow embedding, norms after (350M)": (
        "opt",
        _OPT | {"max_position_embeddings": 32, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "opt without biases and norm weights": (
        "opt",
        _OPT | {"max_position_embeddings": 32, "enable_bias": False, "layer_norm_elementwise_affine": False},
    ),
    "opt, untied": ("opt", _OPT | {"max_position_embeddings": 32, "tie_word_embeddings": False}),
    "bloom": ("bloom", _BLOOM),
    "falcon, one key-value head (7B)": ("falcon", _FALCON | {"num_kv_heads": 4}),
    "falcon, in sequence with biases (RW)": (
        "falcon",
        _FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "falcon, one norm in the new decoder (11B)": (
        "falcon",
        _FALCON
        | {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "ffn_hidden_size": 96,
            "tie_word_embeddings": False,
        },
    ),
    "falcon, default key-value heads in the new decoder": ("falcon", _FALCON | {"new_decoder_architecture": True}),
}


def on_meta(config):
    """The model that transformers builds of a configuration: no memory, no weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with falcon_linears_as_plain(), init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.tie_weights()
    return model


def layers_of(torch, model):
    """The decoder layers: the only module list of the model."""
    (layers,) = (part for part in model.base_model.modules() if isinstance(part, torch.nn.ModuleList))
    return layers


def found_sizes(torch, model):
    """Of the last decoder layer: its linear layers, all its weights, its norms; and the weights of the whole model."""
    layers = layers_of(torch, model)
    linears = Counter(
        (name.rsplit(".", 1)[-1], part.in_features, part.out_features, part.bias is not None)
        for name, part in layers[-1].named_modules()
        if isinstance(part, torch.nn.Linear)
    )
    norms = {name: part for name, part in layers[-1].named_modules() if "norm" in type(part).__name__.lower()}
    qk = [name for name in norms if name.rsplit(".", 1)[-1].startswith(("q_", "k_"))]
    weights = sum(part.numel() for part in layers[-1].parameters())
    return linears, weights, len(norms) - len(qk), bool(qk), sum(part.numel() for part in model.parameters())


def counted_sizes(sizes):
    linears = Counter(
        {(layer.name, layer.in_features, layer.out_features, layer.bias): layer.per_layer for layer in sizes.linears}
    )
    weights = sizes.quantized_parameters_per_layer + sizes.other_parameters_per_layer
    return linears, weights, sizes.norms_per_layer, sizes.qk_norm, sizes.parameters


def assert_counted_is_found(torch, config):
    sizes, model = model_sizes(config), on_meta(config)
    assert counted_sizes(sizes) == found_sizes(torch, model)
    assert sizes == model_sizes(model.config.to_dict())  # the same with its defaults filled in
    assert sizes.layers == len(layers_of(torch, model))
    assert (sizes.hidden, sizes.vocab, sizes.tied) == (
        model.config.hidden_size,
        model.config.vocab_size,
        model.config.tie_word_embeddings,
    )
    gates = {name for layer in layers_of(torch, model) for name, _ in layer.named_modules() if "gate" in name}
    assert sizes.gated_mlp == bool(gates)
    assert sizes.counted == "arithmetic"


BY_ARITHMETIC = [name for name, shape in SHAPES.items() if shape["model_type"] in KNOWN_FAMILIES]


@pytest.mark.parametrize("name", BY_ARITHMETIC)
def test_a_catalogued_shape_is_what_transformers_builds(torch, name):
    """Two layers of it: the rest are the same, and the total is compared with the published one elsewhere."""
    assert_counted_is_found(torch, known_shape(name) | {"num_hidden_layers": 2})


@pytest.mark.parametrize("wiring", WIRINGS)
def test_other_wirings_are_what_transformers_builds(torch, wiring):
    family, config = WIRINGS[wiring]
    assert_counted_is_found(torch, config | {"model_type": family})


def test_every_known_family_is_compared():
    compared = {SHAPES[name]["model_type"] for name in BY_ARITHMETIC} | {family for family, _ in WIRINGS.values()}
    assert compared == KNOWN_FAMILIES
    assert len(KNOWN_FAMILIES) >= 15


def test_the_attention_and_the_mlp_are_described(torch):
    falcon, llama, phi = (model_sizes(SHAPES[name]) for name in ("falcon-7b", "llama-3.1-8b", "phi-4"))
    assert (falcon.kv_heads, falcon.head_dim, falcon.intermediate, falcon.norm) == (1, 64, 18176, "layer")
    assert (falcon.parallel_attention, falcon.gated_mlp) == (True, False)
    assert (llama.kv_heads, llama.head_dim, llama.intermediate, llama.norm) == (8, 128, 14336, "rms")
    assert (llama.parallel_attention, llama.gated_mlp) == (False, True)
    assert (phi.heads, phi.kv_heads, phi.intermediate) == (40, 10, 17920)
    gemma = model_sizes(SHAPES["gemma-2-9b"])
    assert gemma.logit_softcap == 30.0
    assert model_sizes(SHAPES["gemma-3-4b"]).logit_softcap is None
    assert not model_sizes(_FALCON | {"model_type": "falcon", "parallel_attn": False}).parallel_attention
    assert not model_sizes(LLAMA | {"model_type": "gpt_neox", "use_parallel_residual": False}).parallel_attention


@pytest.mark.parametrize("family", sorted(wirings.DEFAULTS))
def test_defaults_are_those_of_transformers(torch, family):
    from transformers import AutoConfig

    known = AutoConfig.for_model(family).to_dict()
    assert {key: known[key] for key in wirings.DEFAULTS[family]} == wirings.DEFAULTS[family]


@pytest.mark.parametrize("family", sorted(KNOWN_FAMILIES))
def test_heads_are_tied_by_default_as_in_transformers(torch, family):
    from transformers import AutoConfig

    assert AutoConfig.for_model(family).tie_word_embeddings == (family in wirings.TIED)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) | {"mixtral", "qwen3_moe"}))
def test_the_linear_layers_are_exactly_what_bitsandbytes_quantises(torch, family):
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    config = FAMILIES.get(family, _GROUPED) | {"model_type": family}
    model, sizes = on_meta(config), model_sizes(config)
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), BitsAndBytesConfig(load_in_4bit=True))
    found = Counter(
        (name.rsplit(".", 1)[-1], part.in_features, part.out_features)
        for name, part in model.named_modules()
        if isinstance(part, Linear4bit)
    )
    assert found == Counter(
        {(layer.name, layer.in_features, layer.out_features): layer.per_layer * sizes.layers for layer in sizes.linears}
    )


def test_experts_are_counted_by_either_name():
    config = _GROUPED | {"model_type": "qwen3_moe"}
    assert model_sizes(config | {"num_experts": 4}) == model_sizes(config | {"num_local_experts": 4})
    assert model_sizes(config | {"num_experts": 4}).experts == 4


def test_the_experts_of_mixtral_are_apart_from_its_linear_layers():
    sizes = model_sizes(SHAPES["mixtral-8x7b"])
    assert {layer.name for layer in sizes.linears} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert (sizes.experts, sizes.experts_per_token) == (8, 2)
    assert sizes.expert_parameters_per_layer == 8 * 3 * 4096 * 14336
    assert 0.96 < sizes.layers * sizes.expert_parameters_per_layer / sizes.parameters < 0.97
    assert sizes.parameters_in_use == 12_879_925_248  # "12.9 B active"


# adapters


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_as_large_as_peft_makes_them(torch, family, use_dora):
    model = tiny_model(family)
    counted = adapter_parameters(model.config.to_dict(), 4, None, use_dora)
    adapted = add_adapters(model, AdapterConfig(r=4, use_dora=use_dora), seed=0)
    assert counted == count_parameters(adapted).trainable > 0


def test_adapters_on_chosen_layers(torch):
    model = tiny_llama()
    counted = adapter_parameters(model.config.to_dict(), 8, ("q_proj", "down_proj"), False)
    adapted = add_adapters(model, AdapterConfig(r=8, target_modules=("q_proj", "down_proj")), seed=0)
    assert counted == count_parameters(adapted).trainable


def test_adapters_of_mixtral_are_on_its_attention(torch):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _GROUPED | {"model_type": "mixtral"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    assert adapter_parameters(config, 4, None, False) == count_parameters(adapted).trainable


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("mixtral", ("q_proj", "experts")),
        ("mixtral", ("down_proj",)),
        ("mixtral", ("mlp.experts.gate_up_proj", "v_proj")),
        ("qwen3_moe", ("mlp.experts",)),
        ("deepseek_v3", ("down_proj", "experts.gate_up_proj")),  # the first names dense and shared layers alone
    ],
)
def test_adapters_on_experts_are_as_large_as_peft_makes_them(torch, cache, family, names):
    from mixtures import tiny_mixture

    model = tiny_mixture(family)
    adapted = add_adapters(model, AdapterConfig(r=4, lora_dropout=0.0, target_modules=names), seed=0)
    assert adapter_parameters(model.config.to_dict(), 4, names, False) == count_parameters(adapted).trainable


def test_an_unknown_name_of_a_mixture_is_refused_with_the_names_that_it_has():
    with pytest.raises(ModelError, match=r"expected some of k_proj, o_proj, q_proj, v_proj, experts; got expert\."):
        adapter_parameters(SHAPES["mixtral-8x7b"], 8, ("expert",), False)


def test_the_recipe_s_adapters_are_counted_as_published():
    assert adapter_parameters(SHAPES["falcon-40b"], 8, None, False) == 55_541_760


def test_unknown_target_layers_are_refused():
    with pytest.raises(ModelError, match="expected some of dense, dense_4h_to_h, .* got q_proj"):
        adapter_parameters(SHAPES["falcon-40b"], 8, ("q_proj", "dense"), False)


# what is not supported


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "names no family of models; expected model_type"),
        ({"model_type": "llama"}, "lacks a size; expected hidden_size"),
        ({"model_type": "gemma3_text"}, "family gemma3_text lacks a size"),
        (LLAMA | {"model_type": "llama", "intermediate_size": "large"}, "expected intermediate_size, .* got 'large'"),
        (LLAMA | {"model_type": "llama", "vocab_size": 0}, "expected vocab_size, .* got 0"),
        (LLAMA | {"model_type": "llama", "vocab_size": True}, "expected vocab_size, .* got True"),
        (
            LLAMA | {"model_type": "llama", "num_attention_heads": 65},
            "more attention heads than its width; expected 64",
        ),
        (
            LLAMA | {"model_type": "llama", "num_hidden_layers": 300_000_000},
            "size that no model has; expected num_hidden_layers or n_layer, a whole number of at most 2,000; got 300000000",
        ),
        (LLAMA | {"model_type": "llama", "hidden_size": 10**400}, r"size that no model has; .* got 10+\.\.\.0+\. Give"),
        (_GROUPED | {"model_type": "mixtral", "num_local_experts": 10**6}, "at most 100,000; got 1000000"),
        (LLAMA | {"model_type": "gemma2", "final_logit_softcapping": "30"}, "not a number; .* got '30'"),
        (LLAMA | {"model_type": ["llama"]}, "the model_type of a config.json is not a string"),
        (LLAMA | {"model_type": "qwen3_moe", "num_experts": 10**6}, "at most 100,000; got 1000000"),
    ],
)
def test_a_config_json_that_can_not_be_sized_is_refused(config, message):
    with pytest.raises(ModelError, match=message):
        model_sizes(config)


def test_the_largest_sizes_are_accepted():
    largest = LLAMA | {
        "model_type": "llama",
        "num_hidden_layers": 2_000,
        "vocab_size": 10**7,
        "num_attention_heads": 64,
    }
    assert model_sizes(largest).layers == 2_000
    assert model_sizes(largest).head_dim == 1, "as many heads as values"


def test_a_message_about_an_untrusted_file_is_short_and_printable():
    """Names, values and keys of the file never reach the terminal unescaped."""
    evil = "\x1b[2J" + "x" * 10_000
    for config in (
        {"model_type": evil},
        LLAMA | {"vocab_size": evil},
        LLAMA | {"model_type": "llama", "vocab_size": evil},
    ):
        with pytest.raises(ModelError) as caught:
            model_sizes(config)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 400


SIZES = (
    "hidden_size",
    "n_embed",
    "vocab_size",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "word_embed_proj_dim",
    "max_position_embeddings",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "num_ln_in_parallel_attn",
)
HEADS = ("num_hidden_layers", "num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads")
KEYS = (
    *SIZES,
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "bias",
    "alibi",
    "multi_query",
    "parallel_attn",
    "new_decoder_architecture",
    "qk_layernorm",
    "enable_bias",
    "layer_norm_elementwise_affine",
    "do_layer_norm_before",
    "_remove_final_layer_norm",
    "use_parallel_residual",
    "final_logit_softcapping",
    "sliding_window",
    "use_sliding_window",
    "text_config",
    "decoder_sparse_step",
    "mlp_only_layers",
)
_likely = st.sampled_from([64, 128, 2_000, 10**7])
_values = st.integers() | st.sampled_from([0, -1, 10**9, 10**400, -(10**400)]) | st.none() | st.booleans() | st.floats()
_values |= (
    st.text(max_size=5)
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.text(max_size=5), st.none(), max_size=2)
)
_families = st.sampled_from([*sorted(KNOWN_FAMILIES), "granite"])
_configs = st.builds(
    lambda sized, odd, family: sized | odd | {"model_type": family},
    st.fixed_dictionaries(
        dict.fromkeys(SIZES, _likely) | dict.fromkeys(HEADS, st.integers(1, 64)) | {"n_layer": st.just(2)}
    ),
    st.dictionaries(st.sampled_from(KEYS), _values, max_size=2),
    _families | _families | _values,
)
RECIPE = profile_config("falcon-40b")
LARGEST = dict.fromkeys(SIZES, 10**7) | {"num_hidden_layers": 2_000, "model_type": "llama"}


@settings(max_examples=200, deadline=None)
@given(_configs)
@example(LARGEST)
@example(LLAMA | {"model_type": "llama", "num_hidden_layers": 300_000_000})
@example(LLAMA | {"model_type": "llama", "sliding_window": "wide"})
def test_any_config_json_is_planned_or_refused_with_little_work(config):
    """Whatever the file holds, there is a plan with its text and JSON, or one of our messages; sizes do not make it slow."""
    counted, real = [], StepMemory.stage
    count = lambda *args, **options: counted.append(1) or real(*args, **options)  # noqa: E731
    try:
        assert model_sizes(config).parameters > 0
        with mock.patch.object(StepMemory, "stage", count):
            plan = make_plan(Workload(RECIPE, config, parse_gpus("H100", 2.0), tokens=1_000))
    except UserError:
        return
    assert repr(plan) and json.dumps(plan.to_dict())
    assert len(counted) < 20_000


def test_every_key_that_is_read_is_fuzzed():
    source = inspect.getsource(module) + inspect.getsource(wirings)
    calls = re.findall(r'\b(?:size|optional_size|flag)\(config, ((?:"\w+",? ?)+)|config\.get\("(\w+)"', source)
    read = {name for call in calls for name in re.findall(r"\w+", " ".join(call))}
    assert len(read) >= 20 and read <= set(KEYS)


@pytest.mark.parametrize("family", ["llama", "falcon", "stablelm", "gpt2"])
def test_counting_weights_needs_no_known_family(torch, family):
    model = tiny_model(family)
    counts = count_weights((FAMILIES | UNLISTED)[family] | {"model_type": family})
    assert counts.linear + counts.other == sum(part.numel() for part in model.parameters())
    head = model.get_output_embeddings()
    linears = (part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head)
    assert counts.linear == sum(part.weight.numel() for part in linears)
