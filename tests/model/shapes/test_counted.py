"""Models that arithmetic does not know: counted on what transformers builds, in a process of its own, once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.shapes import counted as module
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.model.shapes.counted import counted_sizes, digest, from_plain
from qlora_helpers.model.shapes.sizes import adapter_parameters, model_sizes
from qlora_helpers.model.shapes.wirings import KNOWN_FAMILIES

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, dict] = {
    "qwen3_5_text": SMALL | LINEAR,
    "qwen3_5_moe_text": SMALL | LINEAR | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 64},
    "gpt_oss": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma4_text": SMALL | {"global_head_dim": 64, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
    "granitemoehybrid": SMALL
    | MAMBA
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64}
    | {"layer_types": ["mamba", "mamba", "attention", "mamba"]},
    "falcon_h1": SMALL | MAMBA | {"mamba_d_ssm": 128},
    "glm4_moe": SMALL | EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1},
    "starcoder2": SMALL,
    "smollm3": SMALL | {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
    "gpt2": {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 2},
}


@pytest.fixture
def built(torch):
    """Builds and counts in this process: the model, and its sizes."""
    from qlora_helpers.model.built_sizes import build, count

    def both(config):
        model = build(config)
        return model, count(model, config["model_type"])

    return both


def check(torch, model, sizes):
    """The total, the weights of linear layers and the stacks of experts, each added up in another way."""
    from transformers.pytorch_utils import Conv1D

    total = sum(part.numel() for part in model.parameters())
    assert sizes.parameters == total - sizes.beside_text
    if sizes.beside_text:
        return
    head = model.get_output_embeddings()
    linear = sum(
        part.weight.numel()
        for part in model.modules()
        if isinstance(part, torch.nn.Linear | Conv1D) and part is not head and min(part.weight.shape) >= 32
    )
    counted = sizes.layers * sizes.linear_parameters_per_layer
    stacks = sizes.layers * sizes.expert_parameters_per_layer
    assert counted <= linear + 1
    assert counted + stacks + sizes.other_parameters + sizes.head_parameters <= total


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_as_large_as_transformers_builds_it(torch, built, family):
    model, sizes = built({"model_type": family} | FAMILIES[family])
    check(torch, model, sizes)
    assert sizes.counted == "built"
    assert bool(sizes.experts) == ("experts" in str(FAMILIES[family]))
    assert sum(stack.parameters_per_layer for stack in sizes.expert_stacks) == sizes.expert_parameters_per_layer
    assert (sizes.recurrent_share > 0) == any(part in str(FAMILIES[family]) for part in ("linear_", "mamba"))


@pytest.mark.only_slow
def test_every_family_at_its_own_size(torch, built):
    """All keys of transformers' mapping at their default sizes, which are mostly published ones; a few can't be built so."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    refused = {}
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            model, sizes = built({"model_type": family} | AutoConfig.for_model(family).to_dict())
        except Exception as error:  # transformers' own, of any kind
            refused[family] = repr(error)
            continue
        check(torch, model, sizes)
    assert len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - len(refused) >= 150, refused


@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", "mixtral-8x7b", "qwen3-30b-a3b", "gemma-2-2b", "falcon-7b", "phi-3-mini"]
)
def test_counting_and_arithmetic_agree(torch, built, name):
    """Two ways to the same sizes, in all that memory and speed are made of."""
    model, sizes = built(SHAPES[name])
    expected = model_sizes(SHAPES[name])
    assert expected.counted == "arithmetic" and expected.family in KNOWN_FAMILIES
    assert sizes.parameters == expected.parameters
    assert sizes.parameters_in_use == expected.parameters_in_use
    assert sizes.expert_parameters_per_layer == expected.expert_parameters_per_layer
    assert set(sizes.expert_stacks) == set(expected.expert_stacks)
    assert sizes.inner == expected.inner
    assert sizes.gated_mlp == expected.gated_mlp or name == "phi-3-mini"
    assert sizes.norms_per_layer == expected.norms_per_layer
    assert sizes.linear_parameters_per_layer == expected.linear_parameters_per_layer


def test_hybrids_and_layers_of_their_own_sizes_are_means_whose_sums_are_exact():
    sizes = model_sizes(SHAPES["qwen3.5-9b"])
    shares = {layer.name: layer.per_layer for layer in sizes.linears}
    assert shares["q_proj"] == 0.25 and shares["in_proj_qkv"] == 0.75 and shares["down_proj"] == 1
    assert sizes.recurrent_share == 0.75
    wide = model_sizes(SHAPES["gemma-4-e2b"])  # the later layers' MLPs are twice as wide
    assert wide.widest_inner == 2 * 6144 and 6144 < wide.inner < 2 * 6144
    some = model_sizes(SHAPES["llama-4-maverick"])  # each second layer has experts
    assert some.widest_experts == 2 * some.expert_parameters_per_layer


def test_adapters_of_a_hybrid_are_on_the_layers_that_have_them():
    heads, width, hidden = 16, 256, 4096
    q_proj = 8 * 4 * (hidden + 2 * heads * width)  # with an output gate, in each fourth of 32 layers
    assert adapter_parameters(SHAPES["qwen3.5-9b"], 4, ("q_proj",), False) == q_proj


def test_what_is_kept_is_what_is_counted(torch, built):
    """`python tools/count_models.py` after a change; all of them in `make slow`, by the tool itself."""
    for name in ("gpt-oss-20b", "qwen3.5-4b", "gemma-4-e2b"):
        _, sizes = built(SHAPES[name])
        assert module._kept(digest(SHAPES[name])) == sizes


@pytest.mark.only_slow
def test_the_kept_file_is_up_to_date():
    tool = Path(__file__).parents[3] / "tools" / "count_models.py"
    done = subprocess.run([sys.executable, str(tool), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_catalogued_model_is_as_large_as_it_is_built(torch, built):
    """Exactly, at its true size: all of it, and what is in 4 bits."""
    for name, shape in SHAPES.items():
        model, sizes = built(shape)
        expected = model_sizes(shape)
        assert expected.parameters == sum(part.numel() for part in model.parameters()), name
        assert expected.quantized_parameters_per_layer == sizes.quantized_parameters_per_layer, name
        assert expected.other_quantized == sizes.other_quantized and sizes.beside_text == 0, name


def test_all_catalogued_models_answer_without_another_process(monkeypatch):
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **more: pytest.fail("a process was started"))
    assert all(model_sizes(shape).parameters > 0 for shape in SHAPES.values())


def test_a_model_is_counted_once(tmp_path, monkeypatch):
    """In a process of its own, and found again in the cache; a damaged entry is counted again."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    config = {"model_type": "starcoder2"} | SMALL | {"vocab_size": 300}
    run, answers = module.subprocess.run, []
    monkeypatch.setattr(
        module.subprocess, "run", lambda *args, **more: answers.append(run(*args, **more)) or answers[0]
    )
    sizes = counted_sizes(config)
    assert sizes.parameters == model_sizes(config).parameters and not sizes.gated_mlp
    (kept,) = (tmp_path / "counted").iterdir()
    assert from_plain(json.loads(kept.read_text())) == sizes
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **more: pytest.fail("it was counted again"))
    module._counted.cache_clear()
    assert counted_sizes(config | {"eos_token_id": 7, "dtype": "bfloat16"}) == sizes
    # Asked a second time, the process would answer the same
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **more: answers.append(answers[0]) or answers[0])
    module._counted.cache_clear()
    kept.write_text('{"family": 1}')
    assert counted_sizes(config) == sizes and len(answers) == 2
    assert from_plain(json.loads(kept.read_text())) == sizes


@pytest.mark.parametrize("written", [{"__float__": "Infinity"}, float("inf")])
def test_an_infinity_is_read_as_loading_reads_it(torch, built, written):
    """transformers writes it as an object; published files have JSON's `Infinity`."""
    config = {"model_type": "mamba2", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2}
    more = {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1}
    _, sizes = built(config | more)
    assert built(config | more | {"time_step_limit": [0.0, written]})[1] == sizes


def test_a_key_that_is_null_is_no_mixture(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    config = {"model_type": "gemma4_text"} | FAMILIES["gemma4_text"] | {"num_experts": None, "top_k_experts": None}
    assert counted_sizes(config).experts == 0


def test_a_vision_part_that_is_loaded_is_counted_apart(torch, built):
    vision = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 32,
    }
    text = SMALL | {"model_type": "mistral"}
    model, sizes = built(
        {"model_type": "mistral3", "text_config": text, "vision_config": vision, "tie_word_embeddings": False}
    )
    _, alone = built(text)
    assert sizes.parameters == alone.parameters
    assert sizes.beside_text == sum(part.numel() for part in model.parameters()) - alone.parameters > 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "t5", "d_model": 64}, "no causal language model of the kind t5"),
        ({"model_type": "nonsense"}, "model type `nonsense` but Transformers does not recognize"),
        ({"model_type": "gemma3", "text_config": [1]}, "gemma3 can't be planned"),
        ({"model_type": "granite"} | SMALL | {"num_attention_heads": "many"}, "num_attention_heads"),
    ],
)
def test_a_refusal_has_transformers_own_reason(tmp_path, monkeypatch, config, reason):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=reason) as caught:
        model_sizes(config)
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()
    assert not (tmp_path / "counted").exists(), "a newer library may build it"


def test_counting_ends_in_time(monkeypatch, tmp_path):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "COUNT_S", 0.05)
    with pytest.raises(ModelError, match="could not be counted; .* it was not done"):
        model_sizes({"model_type": "granite"} | SMALL)


def test_code_that_a_checkpoint_brings_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    config = {"model_type": "brought", "auto_map": {"AutoModelForCausalLM": "modeling.Brought"}} | SMALL
    with pytest.raises(ModelError, match="does not recognize"):
        model_sizes(config)
