"""Adapters go by path to the text part's linear layers that a gradient reaches; peft changes no names, reloading misses none."""

from __future__ import annotations

import json

import pytest
from mixtures import save, tiny_gemma3, tiny_mixture
from tiny import tiny_llama

from qlora_helpers.base.config import AdapterConfig, ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.model import targets
from qlora_helpers.model.adapter_loading import load_adapter
from qlora_helpers.model.audit import routers
from qlora_helpers.model.blueprint import model_class
from qlora_helpers.model.lora import add_adapters
from qlora_helpers.model.wiring import decoder_layers, text_decoder

pytestmark = pytest.mark.usefixtures("torch")


def adapted_paths(model) -> set[str]:
    """Paths of the layers that have an adapter, as in the model without peft's wrappers."""
    names = (name for name, weight in model.named_parameters() if weight.requires_grad and "lora_A" in name)
    return {name.removeprefix("base_model.model.").split(".lora_A")[0] for name in names}


def built(family: str, **sizes: object):
    """A model of a family with random weights, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=256, **sizes)).eval()


def quiet(text: str) -> None:
    """Receives what `add_adapters` says."""


# the text part alone


def test_a_vision_part_gets_no_adapters_although_its_layers_have_the_same_names(torch):
    model = tiny_gemma3()
    assert any(path.startswith("model.vision_tower") and path.endswith("q_proj") for path, _ in model.named_modules())
    found = adapted_paths(add_adapters(model, AdapterConfig(r=2), seed=0, say=quiet))
    assert len(found) == 2 * 7
    assert all(path.startswith("model.language_model.layers.") for path in found)


def test_a_name_that_the_user_gives_means_the_text_part(torch):
    model = add_adapters(tiny_gemma3(), AdapterConfig(r=2, target_modules=("q_proj",)), seed=0, say=quiet)
    assert adapted_paths(model) == {f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}


def test_a_path_that_the_user_gives_is_taken_literally(torch):
    config = AdapterConfig(r=2, target_modules=("layers.1.self_attn.q_proj", "down_proj"))
    found = adapted_paths(add_adapters(tiny_llama(), config, seed=0, say=quiet))
    assert found == {"model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}


def test_names_are_short_where_they_say_the_same(torch):
    """An adapter's settings then read as those that anybody writes, and other programs understand them."""
    llama, gemma = tiny_llama(), tiny_gemma3()
    assert targets.shortened(llama, targets.target_paths(llama, AdapterConfig())) == (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    names = targets.shortened(gemma, targets.target_paths(gemma, AdapterConfig()))
    assert {"gate_proj", "o_proj", "model.language_model.layers.0.self_attn.q_proj"} <= set(names)
    assert "q_proj" not in names  # the vision tower has layers of that name


def test_a_member_of_a_list_is_never_named_by_its_number(torch):
    """peft would take "0" for every module that a list holds first, decoder layers too."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.SiLU())
    found = adapted_paths(add_adapters(model, AdapterConfig(r=2), seed=0, say=quiet))
    assert {path for path in found if "act_fn" in path} == {f"model.layers.{layer}.mlp.act_fn.0" for layer in (0, 1)}
    assert len(found) == 2 * 8


# routers and experts


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text", "deepseek_v3", "gpt_oss"])
def test_routers_are_found_and_stay_frozen(torch, family):
    model = tiny_mixture(family)
    found = routers(model)
    names = {path.rpartition(".")[2] for path, module in model.named_modules() if id(module) in found}
    assert names in ({"gate"}, {"router"})
    tuned = add_adapters(model, AdapterConfig(r=2), seed=0, say=quiet)
    assert not any(path.rpartition(".")[2] in names for path in adapted_paths(tuned))
    assert not any(weight.requires_grad for name, weight in tuned.named_parameters() if "lora" not in name)


@pytest.mark.parametrize("more", [{"lora_dropout": 0.05}, {"lora_dropout": 0.0, "use_dora": True}])
def test_what_adapters_on_experts_can_not_have_is_refused_in_one_sentence(torch, more):
    with pytest.raises(ModelError, match=r"experts have neither dropout nor DoRA; .* got adapter\.(lora_d|use_d)\w+="):
        add_adapters(
            tiny_mixture("qwen3_moe"), AdapterConfig(target_modules=("q_proj", "experts"), **more), seed=0, say=quiet
        )


@pytest.mark.parametrize(
    ("family", "name", "stacks", "linears"),
    [
        ("qwen3_moe", "experts", {"gate_up_proj", "down_proj"}, set()),
        ("qwen3_moe", "gate_up_proj", {"gate_up_proj"}, set()),
        ("qwen3_moe", "mlp.experts.down_proj", {"down_proj"}, set()),
        ("qwen2_moe", "down_proj", set(), {"down_proj"}),  # of the shared experts, which are linear layers
        ("qwen2_moe", "experts.down_proj", {"down_proj"}, set()),
        ("jetmoe", "experts", {"weight"}, set()),  # whatever their family calls them
        ("qwen2_moe", None, set(), {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_experts_get_adapters_where_they_are_named(torch, family, name, stacks, linears):
    model, config = tiny_mixture(family), AdapterConfig(target_modules=name and (name,))
    assert set(targets.last_names(targets.stack_paths(model, config))) == stacks
    assert set(targets.last_names(targets.target_paths(model, config))) == linears


def test_an_unknown_name_on_a_mixture_is_refused_with_the_names_that_it_has(torch):
    with pytest.raises(ModelError, match=r"expected some of k_proj, o_proj, q_proj, v_proj, experts; got expert\."):
        targets.target_paths(tiny_mixture("qwen3_moe"), AdapterConfig(target_modules=("q_proj", "expert")))


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_peft_rewrites_no_targets(torch, family, dropout):
    """It would move shared and dense layers' adapters to the experts, and raise at any dropout."""
    tuned = add_adapters(tiny_mixture(family), AdapterConfig(r=2, lora_dropout=dropout), seed=0, say=quiet)
    assert not tuned.active_peft_config.target_parameters
    assert not tuned.active_peft_config.rank_pattern
    found = adapted_paths(tuned)
    expected = {
        "qwen2_moe": "model.layers.1.mlp.shared_expert.gate_proj",
        "mixtral": "model.layers.1.self_attn.q_proj",
        "deepseek_v3": "model.layers.0.mlp.gate_proj",
    }
    assert expected[family] in found
    assert not any(".experts" in path for path in found)


def test_peft_still_rewrites_for_others(torch):
    """Once this fails, `peft_names` is not needed; and a model that is not ours is left to peft."""
    from peft import LoraConfig, get_peft_model

    add_adapters(tiny_mixture("deepseek_v3"), AdapterConfig(r=2), seed=0, say=quiet)  # wraps peft's functions
    settings = LoraConfig(r=2, target_modules=["o_proj", "gate_proj", "up_proj", "down_proj"])
    tuned = get_peft_model(tiny_mixture("deepseek_v3"), settings)
    assert tuned.active_peft_config.target_parameters


# what a gradient reaches


def test_layers_that_no_gradient_reaches_get_no_adapter_and_are_named(torch):
    model, said = tiny_llama(), []
    for layer in model.model.layers:
        layer.mlp.spare = torch.nn.Linear(64, 64)  # never called
    first = model.model.layers[0].self_attn
    first.k_proj.forward = lambda x, own=first.k_proj.forward: own(x).detach()
    found = adapted_paths(add_adapters(model, AdapterConfig(r=2), seed=0, say=said.append))
    assert len(found) == 2 * 7 - 1
    assert "model.layers.0.self_attn.k_proj" not in found and "model.layers.1.self_attn.k_proj" in found
    assert len(said) == 1 and said[0].startswith(
        "3 layers get no adapter, because no gradient reaches them: model.layers.0"
    )


def test_every_adapter_of_a_mixture_with_a_list_of_experts_stays(torch):
    """A few tokens do not reach every expert of a list."""

    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(3)])

        def forward(self, x):
            return self.experts[1](x)

    model = tiny_llama()
    model.model.layers[0].mlp = Mixture()
    paths = [f"model.layers.0.mlp.experts.{number}" for number in range(3)]
    assert targets.without_gradient(model.requires_grad_(False), paths) == []


def test_the_look_at_gradients_leaves_the_model_as_it_was(torch):
    one, other = tiny_llama(), tiny_llama()
    before = torch.get_rng_state()
    targets.without_gradient(one.requires_grad_(False), targets.target_paths(one, AdapterConfig()))
    assert torch.equal(torch.get_rng_state(), before)
    assert not one.training and not any(weight.grad is not None for weight in one.parameters())
    assert not any(module._forward_hooks for module in one.modules())
    ids = torch.arange(2, 20)[None]
    assert torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)


def test_a_model_that_fails_in_its_backward_pass_is_refused_before_training(torch):
    model = tiny_llama()
    model.model.layers[1].mlp.forward = lambda x: (_ for _ in ()).throw(RuntimeError("no such kernel"))
    with pytest.raises(ModelError, match=r"can't be trained: a forward and backward pass .* fails \(no such kernel\)"):
        add_adapters(model, AdapterConfig(), seed=0, say=quiet)


# what continues no text


@pytest.mark.parametrize("family", ["bert", "xlnet"])
def test_a_model_whose_tokens_see_later_ones_is_refused(torch, family):
    """Its losses would fall to nothing while it learns to copy."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    if family == "xlnet":
        sizes = {"d_model": 64, "n_layer": 2, "n_head": 2, "d_inner": 128}
    with pytest.raises(ModelError, match="its tokens see those after them"):
        add_adapters(built(family, **sizes), AdapterConfig(r=2), seed=0, say=quiet)


def test_the_same_model_as_a_decoder_is_tuned(torch):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    assert adapted_paths(add_adapters(built("bert", is_decoder=True, **sizes), AdapterConfig(r=2), seed=0, say=quiet))


def test_an_encoder_decoder_is_refused_before_anything_is_built(torch):
    from transformers import AutoConfig

    with pytest.raises(ModelError, match="bart is an encoder-decoder"):
        model_class(AutoConfig.for_model("bart"))


# reloading


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_that_lacks_tensors_is_refused(torch, tmp_path):
    """peft only warns, and answers with layers that were never trained."""
    from safetensors.torch import load_file, save_file

    tuned = add_adapters(tiny_llama(), AdapterConfig(r=2), seed=0, say=quiet)
    tuned.save_pretrained(tmp_path, save_embedding_layers=False)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    first = min(whole)
    save_file({name: value for name, value in whole.items() if name != first}, path)
    with pytest.raises(ModelError, match=f"lacks 1 tensor of the model, {first} first"):
        load_adapter(tiny_llama(), tmp_path)
    save_file(whole | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(2, 64)}, path)
    with pytest.raises(ModelError, match="has 1 tensor beyond those of the model"):
        load_adapter(tiny_llama(), tmp_path)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_an_adapter_of_a_mixture_is_read_as_it_was_saved(torch, tmp_path, family):
    """peft would rename its weights by the rules for the model's own checkpoints."""
    tuned = add_adapters(tiny_mixture(family), AdapterConfig(r=2), seed=0, say=quiet)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    tuned.save_pretrained(tmp_path, save_embedding_layers=False)
    again = load_adapter(tiny_mixture(family), tmp_path)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert torch.equal(tuned.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits)


# how a model is put together


def test_decoder_layers_of_two_classes_are_all_found(torch):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_experts": 2}
    more = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    mamba = {"use_mamba_kernels": False, "mamba_dt_rank": 8, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("jamba", **sizes, **more, **mamba))
    found = decoder_layers(model)
    assert found == list(model.model.layers)
    assert len({type(layer) for layer in found}) == 2


def test_a_decoder_that_is_an_output_layer_is_none(torch):
    """ModernBERT calls its output layer `decoder`, which transformers' `get_decoder` returns."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    model = built("modernbert-decoder", **sizes, **ends)
    assert isinstance(model.get_decoder(), torch.nn.Linear)
    assert len(decoder_layers(model)) == 2 and targets.target_paths(model, AdapterConfig())


def test_decoder_layers_are_the_text_parts(torch):
    model = tiny_gemma3()
    assert decoder_layers(model) == list(model.model.language_model.layers)
    assert text_decoder(model) is model.model.language_model


# a checkpoint with a vision part, from loading to the merged files


def test_a_checkpoint_with_a_vision_part_is_tuned_as_text_and_merged_under_its_own_names(torch, tmp_path):
    from transformers import AutoModelForImageTextToText

    from qlora_helpers.export.merge import merge
    from qlora_helpers.model.loading import load_model
    from qlora_helpers.model.stored_tensors import stored_tensors

    base = save(tiny_gemma3(), tmp_path / "base")
    loaded = load_model(ModelConfig(name=str(base), quantization="none"), say=quiet)
    tuned = add_adapters(loaded.model, AdapterConfig(r=2), seed=0, say=quiet)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    (tmp_path / "merged").mkdir()
    assert merge(base, tmp_path / "adapter", tmp_path / "merged").merged == 14
    assert list(stored_tensors(base)) == list(stored_tensors(tmp_path / "merged"))
    again, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = tuned.merge_and_unload().state_dict()
    for name, value in again.state_dict().items():
        assert torch.allclose(value, expected[name].bfloat16().float(), rtol=2**-7, atol=1e-6), name
    assert "vision_config" in json.loads((tmp_path / "merged/config.json").read_text())
