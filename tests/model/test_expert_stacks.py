"""Stacks of experts in NF4 compute what the same values in full do, forward and backward, and none of them stays in full."""

from __future__ import annotations

import copy

import pytest
from mixtures import MIXTURES, save, tiny_mixture

from qlora_helpers.base.config import AdapterConfig, ModelConfig
from qlora_helpers.model import expert_stacks
from qlora_helpers.model.audit import audit
from qlora_helpers.model.loading import load_model
from qlora_helpers.model.nf4 import holds_nf4, stored_bytes, unpacked_numel
from qlora_helpers.model.quantizer import stacks_of

pytestmark = pytest.mark.usefixtures("torch")
IMPLEMENTATIONS = ("eager", "grouped_mm")


def load(folder, **settings):
    return load_model(ModelConfig(name=str(folder), **settings), say=lambda text: None)


def packed_and_plain(torch, family, *, double=True, **more):
    """A mixture whose stacks are packed, and one whose stacks hold the dequantised values in float32."""
    plain = tiny_mixture(family, **more).requires_grad_(False)
    packed = copy.deepcopy(plain)
    for (module, names), (own, _) in zip(stacks_of(packed), stacks_of(plain), strict=True):
        values = {name: module._parameters[name].data for name in names}
        expert_stacks.prepare_stacks(module, names, double_quantization=double, dtype=torch.float32)
        for name in names:
            expert_stacks.pack_stack(module, name, values[name])
            own._parameters[name].data.copy_(getattr(module, name))
    return packed, plain


def answer(torch, model):
    """Logits and the gradient of the loss with respect to the embedded tokens."""
    ids = torch.arange(2, 50)[None] * 7 % 2048
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    found = model(inputs_embeds=inputs, labels=ids)
    found.loss.backward()
    return found.logits.detach(), inputs.grad


@pytest.mark.parametrize("family", MIXTURES)
def test_outputs_and_gradients_are_those_of_the_same_values(torch, family):
    packed, plain = packed_and_plain(torch, family)
    names = [name for name, parameter in packed.named_parameters() if holds_nf4(parameter)]
    assert names and all(dict(plain.named_parameters())[name].dim() == 3 for name in names)
    for one, other in zip(answer(torch, packed), answer(torch, plain), strict=True):
        assert torch.equal(one, other)
        assert one.abs().max() > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("double", [True, False])
def test_every_implementation_of_the_experts_reads_the_packed_stacks(torch, implementation, double):
    packed, plain = packed_and_plain(torch, "qwen3_moe", experts=implementation, double=double)
    assert packed.config._experts_implementation == implementation
    for one, other in zip(answer(torch, packed), answer(torch, plain), strict=True):
        assert torch.equal(one, other)


def test_gradients_are_the_same_under_activation_checkpointing_and_after_an_evaluation(torch):
    packed, plain = packed_and_plain(torch, "mixtral")
    _, expected = answer(torch, plain)
    with torch.no_grad():
        packed(input_ids=torch.arange(2, 20)[None])
    packed.train()
    packed.config.router_jitter_noise = 0.0
    enable = getattr(packed, "activation_checkpointing_enable", None) or packed.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    _, found = answer(torch, packed)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_of_a_stack_in_full_is_kept_for_the_backward_pass(torch, monkeypatch, implementation):
    """Without activation checkpointing autograd would keep every layer's stacks in 16 bits, which is the whole model."""
    import weakref

    packed, _ = packed_and_plain(torch, "qwen3_moe", experts=implementation)
    made, original = [], expert_stacks.unpacked

    def watched(parameter, *args):
        found = original(parameter, *args)
        made.append((weakref.ref(found.untyped_storage()), unpacked_numel(parameter) == found.numel()))
        return found

    monkeypatch.setattr(expert_stacks, "unpacked", watched)
    ids = torch.arange(2, 50)[None]
    inputs = packed.get_input_embeddings()(ids).detach().requires_grad_()
    loss = packed(inputs_embeds=inputs, labels=ids).loss
    assert [whole for _, whole in made] == [True] * 4  # once for each stack, however many experts were asked
    assert not any(reference() for reference, _ in made)
    loss.backward()
    assert len(made) > 4
    assert not any(reference() for reference, _ in made)
    if implementation == "eager":  # which multiplies by one expert after another, so only that one is made again
        assert not any(whole for _, whole in made[4:])


def test_a_stack_that_is_too_large_for_one_call_is_packed_in_several(torch, monkeypatch):
    value = torch.randn(6, 32, 64)
    whole = {double: expert_stacks.packed(value, double) for double in (True, False)}
    expected = {double: expert_stacks.unpacked(found, torch.float32) for double, found in whole.items()}
    monkeypatch.setattr(expert_stacks, "LARGEST_CALL", 2 * 32 * 64 + 1)
    for double, one in whole.items():
        several = expert_stacks.packed(value, double)
        assert torch.equal(several.data.flatten(), one.data.flatten())
        assert several.quant_state.nested is double
        assert torch.equal(expert_stacks.unpacked(several, torch.float32), expected[double])
        assert torch.equal(expert_stacks.unpacked(several, torch.float32, 1, 4), expected[double][1:4])
        assert stored_bytes(several) == stored_bytes(one)


def test_experts_whose_blocks_share_bytes_are_unpacked_together(torch):
    """Rows of odd length have no kernel on a CPU; bitsandbytes would compile what it runs in its place, for half a minute."""
    with torch.compiler.set_stance("force_eager"):
        unpacked_together(torch)


def unpacked_together(torch):
    for shape in ((3, 33, 35), (4, 64, 32)):  # no multiple of 64, in an expert or in a row
        value = torch.randn(shape)
        found = expert_stacks.packed(value, True)
        whole = expert_stacks.unpacked(found, torch.float32)
        assert torch.equal(expert_stacks.unpacked(found, torch.float32, 1, 2), whole[1:2])
        assert (whole - value).norm() / value.norm() < 0.12


def test_the_packed_state_is_saved_with_everything_that_unpacks_it(torch):
    from bitsandbytes.functional import QuantState, dequantize_4bit

    packed, plain = packed_and_plain(torch, "qwen3_moe")
    state, name = packed.state_dict(), "model.layers.0.mlp.experts.down_proj"
    parts = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    again = dequantize_4bit(state[name], QuantState.from_dict(parts, device=torch.device("cpu")))
    assert torch.equal(again, plain.state_dict()[name])


# loading


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe", "llama4_text"])
def test_a_mixture_is_loaded_with_its_experts_in_4_bits(torch, tmp_path, monkeypatch, family):
    """The values are those of the checkpoint up to NF4, and each stack is packed as it arrives, before the next is read."""
    original = tiny_mixture(family)
    arrived, own = [], expert_stacks.packed
    monkeypatch.setattr("qlora_helpers.model.quantizer.packed", lambda *args: arrived.append(1) or own(*args))
    loaded = load(save(copy.deepcopy(original), tmp_path / family))
    held = stacks_of(loaded.model)
    assert loaded.audit.stacks == sum(len(names) for _, names in held) == len(arrived) > 0
    stacks = dict(original.named_parameters())
    for path, module in loaded.model.named_modules():
        for name in expert_stacks.stack_names(module):
            expected = stacks[f"{path}.{name}"]
            assert (getattr(module, name) - expected).norm() / expected.norm() < 0.12
    assert sum(each.values for each in loaded.audit.unquantised) + sum(
        unpacked_numel(parameter) for parameter in loaded.model.parameters() if holds_nf4(parameter)
    ) == sum(parameter.numel() for parameter in original.parameters())


def test_a_mixture_without_quantisation_is_the_checkpoint(torch, tmp_path):
    original = tiny_mixture("qwen3_moe").to(torch.bfloat16)
    loaded = load(save(original, tmp_path / "m"), quantization="none")
    assert loaded.audit.stacks == 0
    for name, value in original.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), value.float()), name


def test_experts_in_16_bits_beside_4_bit_layers_are_packed_after_loading(torch, tmp_path):
    """So bitsandbytes' checkpoints of mixtures are saved: `load_in_4bit` alone leaves the experts."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = save(tiny_mixture("qwen3_moe"), tmp_path / "plain")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map={"": "cpu"}).save_pretrained(
        tmp_path / "nf4"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "nf4" / name).write_bytes((folder / name).read_bytes())
    direct, again = load(folder), load(tmp_path / "nf4")
    assert again.audit.stacks == direct.audit.stacks == 4
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        assert torch.allclose(direct.model(input_ids=ids).logits, again.model(input_ids=ids).logits, atol=5e-3)


def test_random_mixtures_are_drawn_packed(torch):
    from qlora_helpers.model.random_weights import STANDARD_DEVIATION, build_random_model

    shape = {"model_type": "qwen3_moe", **MIXTURES["qwen3_moe"]}
    config = ModelConfig(name="random:x")
    model, again = (build_random_model(shape, config, dtype=torch.float32, attention=None) for _ in range(2))
    found = audit(model, config)
    assert found.stacks == 4
    assert not any(parameter.is_meta for parameter in model.parameters())
    experts = model.model.layers[0].mlp.experts
    assert experts.down_proj.std() == pytest.approx(STANDARD_DEVIATION, rel=0.05)
    assert torch.equal(experts.down_proj, again.model.layers[0].mlp.experts.down_proj)


def test_layers_with_packed_experts_are_compiled_once_for_all(torch):
    """A guard on something that differs by layer would compile each anew, and give up after eight."""
    from qlora_helpers.model.random_weights import build_random_model

    shape = {"model_type": "qwen3_moe", **MIXTURES["qwen3_moe"], "num_hidden_layers": 4}
    model = build_random_model(shape, ModelConfig(name="random:x"), dtype=torch.float32, attention=None)
    ids, layers = torch.arange(2, 34)[None], model.model.layers
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        torch._dynamo.reset()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for layer in layers:
                layer.forward = torch.compile(layer.forward, dynamic=False, backend="eager")
            found = model(input_ids=ids, use_cache=False).logits
    torch._dynamo.reset()
    assert torch.allclose(found, expected, atol=1e-5)
    assert len({type(layer.mlp.experts) for layer in layers}) == 1


def test_adapters_around_packed_experts_have_the_gradients_of_the_same_values(torch):
    from qlora_helpers.model.lora import add_adapters

    gradients = []
    for model in packed_and_plain(torch, "qwen2_moe"):
        tuned = add_adapters(model, AdapterConfig(r=4, lora_dropout=0.0), seed=0).train()
        with torch.no_grad():
            for name, weight in tuned.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        ids = torch.arange(2, 50)[None]
        tuned(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: weight.grad for name, weight in tuned.named_parameters() if weight.requires_grad})
    packed, plain = gradients
    assert packed.keys() == plain.keys()
    assert all(torch.equal(packed[name], plain[name]) and packed[name].abs().max() > 0 for name in packed)
