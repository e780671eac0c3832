"""Every weight of a loaded model is in 4 bits or has a reason that its module shows; anything else is refused."""

from __future__ import annotations

import pytest
from mixtures import MIXTURES, save, tiny_gemma3, tiny_mixture
from tiny import tiny_llama

from qlora_helpers.base.config import ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.audit import audit
from qlora_helpers.model.loading import load_model
from qlora_helpers.model.nf4 import holds_nf4, unpacked_numel
from qlora_helpers.model.quantizer import left_as_they_are

pytestmark = pytest.mark.usefixtures("torch")


def load(folder, **settings):
    return load_model(ModelConfig(name=str(folder), **settings), say=lambda text: None)


@pytest.mark.parametrize("family", sorted(set(MIXTURES) - {"jetmoe"}))
def test_every_weight_of_a_mixture_is_accounted_for(torch, tmp_path, family):
    found = load(save(tiny_mixture(family), tmp_path / family)).audit
    reasons = {each.reason: each.values for each in found.unquantised}
    four = found.parameters - sum(reasons.values())
    assert found.parameters == sum(parameter.numel() for parameter in tiny_mixture(family).parameters())
    assert found.quantized == found.expected > 0
    assert reasons["embedding"] == 2048 * 64
    routed = 1 if family == "deepseek_v3" else 1 if family == "llama4_text" else 2
    assert reasons["routers"] >= routed * 4 * 64
    assert set(reasons) <= {
        "embedding",
        "output head",
        "routers",
        "norms, biases and other vectors",
        "biases of experts",
    }
    assert f"{four / found.parameters:.2%} of the parameters in 4 bits; not: " in repr(found)
    assert f"{found.stacks} stacks of experts in nf4" in repr(found)


def test_experts_in_16_bits_are_refused_with_their_bytes(torch, tmp_path, monkeypatch):
    """As `load_in_4bit` alone leaves them; the audit of linear layers once called that a success."""
    monkeypatch.setattr("qlora_helpers.model.quantizer.stacks_of", lambda model, left_alone=None: [])
    folder = save(tiny_mixture("mixtral"), tmp_path / "m")
    expected = sum(p.numel() * 4 for name, p in tiny_mixture("mixtral").named_parameters() if ".experts." in name)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert f"got {expected:,} bytes that are not, in model.layers.0.mlp.experts.gate_up_proj and 3 more" in str(
        caught.value
    )


def test_the_parts_around_the_text_are_counted_apart(torch, tmp_path):
    found = load(save(tiny_gemma3(), tmp_path / "m")).audit
    reasons = {each.reason: each.values for each in found.unquantised}
    assert reasons["outside the language model"] == 64 * 64  # the projection of pictures, a parameter of its own
    assert reasons["convolutions"] == 64 * 3 * 14 * 14
    assert sum(each.gib for each in found.unquantised) < sum(found.gib_by_device.values())


def test_a_matrix_without_a_reason_is_refused(torch, tmp_path):
    loaded = load(save(tiny_llama(), tmp_path / "m"))
    loaded.model.model.layers[0].extra = torch.nn.Parameter(torch.zeros(64, 128))
    with pytest.raises(ModelError, match=r"got 32,768 bytes that are not, in model\.layers\.0\.extra\."):
        audit(loaded.model, ModelConfig())
    loaded.model.model.layers[0].extra = torch.nn.Parameter(torch.zeros(8, 4096))
    reasons = {each.reason: each.values for each in audit(loaded.model, ModelConfig()).unquantised}
    assert reasons["matrices of a few rows or columns"] == 8 * 4096


def test_what_transformers_keeps_in_float32_has_a_reason(torch, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["o_proj.weight"])
    loaded = load(save(tiny_llama(), tmp_path / "m"))
    reasons = {each.reason: each.values for each in loaded.audit.unquantised}
    assert reasons["kept in float32 by transformers"] == 2 * 64 * 64
    assert loaded.audit.quantized == loaded.audit.expected == 2 * 6
    assert not holds_nf4(loaded.model.model.layers[0].self_attn.o_proj.weight)


def test_linear_routers_and_gates_of_one_row_stay_as_they_are(torch):
    model = tiny_mixture("llama4_text")
    assert [name for name in left_as_they_are(model) if "router" in name] == [
        r"model\.layers\.1\.feed_forward\.router$"
    ]
    gates = left_as_they_are(tiny_mixture("qwen2_moe"))
    assert sum("shared_expert_gate" in name for name in gates) == 2 == len(gates)


def test_a_layer_whose_weight_the_models_code_multiplies_by_stays_as_it_is(torch, tmp_path):
    """Mamba's would otherwise multiply by the packed bytes, and fail."""
    from transformers import MambaConfig, MambaForCausalLM

    from qlora_helpers.base.config import AdapterConfig
    from qlora_helpers.model.lora import add_adapters

    sizes = {"vocab_size": 2048, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "time_step_rank": 64}
    loaded = load(save(MambaForCausalLM(MambaConfig(**sizes, pad_token_id=1)), tmp_path / "m"))
    reasons = {each.reason: each.values for each in loaded.audit.unquantised}
    assert reasons["read directly by the model's code"] == 2 * 128 * 64
    said = []
    tuned = add_adapters(loaded.model, AdapterConfig(r=2), seed=0, say=said.append)
    assert tuned.active_peft_config.target_modules == {"in_proj", "x_proj"}
    assert len(said) == 1 and "dt_proj" in said[0]


def test_without_quantisation_nothing_is_demanded(torch, tmp_path):
    found = load(save(tiny_mixture("mixtral"), tmp_path / "m"), quantization="none").audit
    assert (found.stacks, found.double_quantization, found.storage) == (0, None, "none")
    assert found.parameters == sum(unpacked_numel(parameter) for parameter in tiny_mixture("mixtral").parameters())
    assert "in 4 bits" not in repr(found)


def test_layers_that_share_their_weights_are_refused_with_the_reason(torch, tmp_path):
    """Zamba's attention blocks are one block in several layers; transformers converts no weights that are tied."""
    from transformers import AutoModelForCausalLM, Zamba2Config

    config = Zamba2Config(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        num_attention_heads=2,
        num_key_value_heads=2,
        mamba_headdim=32,
        n_mamba_heads=4,
        mamba_ngroups=1,
        mamba_d_state=16,
        adapter_rank=8,
        num_mem_blocks=1,
        max_position_embeddings=256,
    )
    with pytest.raises(ModelError, match=r"share one block of weights.* in 2 layers.*can't be merged"):
        load(save(AutoModelForCausalLM.from_config(config), tmp_path / "m"))
