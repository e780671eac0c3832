"""Merging finds each weight where transformers would read it: renamed, fused, cut, or transposed."""

from __future__ import annotations

import importlib

import pytest
from mixtures import tiny_mixture
from tiny import tiny_llama, tiny_model

from qlora_helpers.base.config import AdapterConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.export.live_names import Places
from qlora_helpers.export.merge import merge
from qlora_helpers.model.lora import add_adapters
from qlora_helpers.model.stored_tensors import stored_tensors

pytestmark = pytest.mark.usefixtures("cache", "torch")


def merged(torch, model, folder, **settings):
    """The model's state after a merge of its files, and what peft merges in memory."""
    from transformers import AutoModelForCausalLM

    model = model.to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    tuned = add_adapters(model, AdapterConfig(**{"r": 4} | settings), seed=0, say=lambda text: None)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    tuned.save_pretrained(folder / "adapter", save_embedding_layers=False)
    (folder / "merged").mkdir()
    report = merge(folder / "base", folder / "adapter", folder / "merged", working_gib=1e-5)
    again = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    assert report.merged == sum("lora_A" in name for name, _ in tuned.named_parameters())
    return again.state_dict(), tuned.float().merge_and_unload().state_dict()


MODELS = {
    "GPT-2 keeps (in, out)": lambda: tiny_model("gpt2"),
    "Mixtral's files have other names": lambda: tiny_mixture("mixtral"),
    "the experts of DeepSeek's files are single matrices": lambda: tiny_mixture("deepseek_v3"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_merged_files_are_base_plus_adapter(torch, tmp_path, kind):
    found, expected = merged(torch, MODELS[kind](), tmp_path)
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight.bfloat16().float(), rtol=2**-7, atol=1e-6), name


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("mixtral", ("q_proj", "experts")),  # a file's tensor for each expert's w1, w2 and w3
        ("qwen3_moe", ("experts.down_proj",)),
        ("deepseek_v3", ("q_b_proj", "experts")),
        ("gpt_oss", ("q_proj", "experts")),  # a tensor for all experts, of (in, out)
        ("granitemoe", ("experts.gate_up_proj",)),
        ("jetmoe", ("experts",)),
    ],
)
def test_adapters_on_experts_are_merged_into_each_expert_s_tensor(torch, tmp_path, family, names):
    found, expected = merged(torch, tiny_mixture(family), tmp_path, target_modules=names, lora_dropout=0.0)
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight.bfloat16().float(), rtol=2**-7, atol=1e-6), name


def test_an_adapter_on_another_mixture_s_experts_is_refused(torch, tmp_path):
    settings = {"target_modules": ("experts",), "lora_dropout": 0.0}
    merged(torch, tiny_mixture("qwen3_moe", num_experts=8), tmp_path, **settings)
    tiny_mixture("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="does not belong to this checkpoint"):
        merge(tmp_path / "other", tmp_path / "adapter", tmp_path / "merged")


def test_square_layers_of_gpt2_are_transposed_too(torch, tmp_path):
    """Their shape does not tell."""
    found, expected = merged(torch, tiny_model("gpt2"), tmp_path, target_modules=("attn.c_proj",))
    name = "transformer.h.0.attn.c_proj.weight"
    assert torch.allclose(found[name], expected[name].bfloat16().float(), rtol=2**-7, atol=1e-6)


def rules(monkeypatch, *found):
    """Gives transformers these rules for reading a checkpoint."""
    module = importlib.import_module("transformers.conversion_mapping")
    monkeypatch.setattr(module, "get_model_conversion_mapping", lambda model, **more: list(found))


def places(torch, tmp_path, shapes):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    return Places(tmp_path, shapes)


MLP = "model.layers.0.mlp"


def test_a_weight_that_is_cut_from_a_stored_one_is_merged_into_its_rows(torch, tmp_path, monkeypatch):
    from transformers.core_model_loading import Chunk, WeightConverter

    targets = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    rules(monkeypatch, WeightConverter("mlp.both.weight", targets, [Chunk(dim=0)]))
    found = places(torch, tmp_path, {f"{MLP}.both.weight": (256, 64)})
    gate, up = (found.of(f"{MLP}.{name}") for name in ("gate_proj", "up_proj"))
    assert [(place.stored, place.first, place.first_live, place.rows) for place in (*gate, *up)] == [
        (f"{MLP}.both.weight", 0, 0, 128),
        (f"{MLP}.both.weight", 128, 0, 128),
    ]


def test_a_weight_that_is_put_together_is_merged_into_each_part(torch, tmp_path, monkeypatch):
    from transformers.core_model_loading import Concatenate, WeightConverter

    sources = ["mlp.first.weight", "mlp.second.weight"]
    rules(monkeypatch, WeightConverter(sources, "mlp.gate_proj.weight", [Concatenate(dim=0)]))
    found = places(torch, tmp_path, {f"{MLP}.second.weight": (28, 64), f"{MLP}.first.weight": (100, 64)})
    assert [(place.stored, place.first, place.first_live, place.rows) for place in found.of(f"{MLP}.gate_proj")] == [
        (f"{MLP}.first.weight", 0, 0, 100),
        (f"{MLP}.second.weight", 0, 100, 28),
    ]


def test_weights_in_another_order_are_refused(torch, tmp_path, monkeypatch):
    from transformers.core_model_loading import Transpose, WeightConverter

    rules(monkeypatch, WeightConverter("mlp.turned.weight", "mlp.gate_proj.weight", [Transpose(0, 1)]))
    found = places(torch, tmp_path, {f"{MLP}.turned.weight": (64, 128)})
    with pytest.raises(ModelError, match=r"can't be merged into this checkpoint's files; .* converts by Transpose"):
        found.of(f"{MLP}.gate_proj")
    assert found.of(f"{MLP}.up_proj") == []


def test_what_was_kept_in_float32_stays_in_float32(torch, tmp_path):
    """DeepSeek's routers are corrected by small numbers, which bfloat16 would round away."""
    from safetensors.torch import load_file, save_file

    model = tiny_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    exact = torch.full((64,), 1.0001)
    save_file(load_file(path) | {"model.norm.weight": exact}, path, metadata={"format": "pt"})
    tuned = add_adapters(model, AdapterConfig(r=2), seed=0, say=lambda text: None)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    (tmp_path / "merged").mkdir()
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    found = stored_tensors(tmp_path / "merged")
    assert torch.equal(found["model.norm.weight"].read(), exact)
    assert {tensor.dtype for name, tensor in found.items() if name != "model.norm.weight"} == {"BF16"}
