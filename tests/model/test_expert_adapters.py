"""Adapters on the experts of a mixture: peft's own result on the same values, in peft's files; no sum is kept for backward."""

from __future__ import annotations

import copy
import weakref

import pytest
from mixtures import save, tiny_mixture
from test_expert_stacks import packed_and_plain

from qlora_helpers.base.config import AdapterConfig, ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.model import expert_stacks
from qlora_helpers.model.adapter_loading import load_adapter
from qlora_helpers.model.expert_adapters import StackAdapter, weights_on_experts
from qlora_helpers.model.lora import add_adapters, remove_adapters
from qlora_helpers.model.parameter_counts import adapter_sizes, count_parameters
from qlora_helpers.model.quantizer import stacks_of

pytestmark = pytest.mark.usefixtures("torch")
EXPERTS = AdapterConfig(r=4, lora_dropout=0.0, target_modules=("q_proj", "experts"))
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")  # the last with biases, interleaved halves, and stacks of `(in, out)`


def quiet(text):
    pass


def tuned(torch, model, config=EXPERTS):
    """A model with adapters that change its answers."""
    adapted = add_adapters(model, config, seed=0, say=quiet)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05, generator=generator)
    return adapted


def by_peft(model, settings, weights):
    """peft's own adapters on a model in float32: nothing of this package's in between."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    names = {"target_modules": list(settings.target_modules), "target_parameters": settings.target_parameters}
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=32, task_type="CAUSAL_LM", **names))
    assert not set_peft_model_state_dict(adapted, weights).unexpected_keys
    return adapted


def answer(torch, model, ids):
    """Logits, and the gradients of the adapters."""
    model.zero_grad()
    found = model(input_ids=ids, labels=ids, use_cache=False)
    found.loss.backward()
    return found.logits.detach(), {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad
    }


@pytest.mark.parametrize(
    ("family", "experts"), [*((each, "grouped_mm") for each in FAMILIES), ("qwen3_moe", "eager"), ("jetmoe", None)]
)
def test_outputs_and_gradients_are_those_of_peft_on_the_same_values(torch, family, experts):
    from peft import get_peft_model_state_dict

    packed, plain = packed_and_plain(torch, family, **({} if experts is None else {"experts": experts}))
    names = ("kv_proj", "experts") if family == "jetmoe" else EXPERTS.target_modules
    ours = tuned(torch, packed, AdapterConfig(r=4, lora_dropout=0.0, target_modules=names))
    weights = {
        name: value.clone() for name, value in get_peft_model_state_dict(ours, save_embedding_layers=False).items()
    }
    theirs = by_peft(plain, ours.peft_config["default"], weights)
    assert {type(module).__name__ for module in theirs.modules()} >= {"ParamWrapper"}
    assert not any(isinstance(module, StackAdapter) for module in theirs.modules())
    ids = torch.arange(2, 50)[None] * 7 % 2048
    (logits, gradients), (expected, others) = answer(torch, ours.train(), ids), answer(torch, theirs.train(), ids)
    with ours.disable_adapter():
        assert (ours(input_ids=ids).logits - logits).abs().max() > 0.01
    assert torch.equal(logits, expected)
    assert gradients.keys() == others.keys() and sum("experts" in name for name in gradients) in (0, 8)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    assert {value.dtype for value in gradients.values()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_experts_of_a_token_get_gradients_and_no_others(torch, family):
    """Of one token, two of four experts in each layer."""
    packed, _ = packed_and_plain(torch, family)
    ours, chosen = tuned(torch, packed).train(), {}
    for path, module in ours.named_modules():
        if isinstance(module, expert_stacks.PackedStacks):
            module.register_forward_pre_hook(
                lambda module, inputs, path=path: chosen.update({path: set(inputs[1].flatten().tolist())})
            )
    ours(input_ids=torch.tensor([[7]])).logits.square().sum().backward()
    assert len(chosen) == 2 and all(len(experts) == 2 for experts in chosen.values())
    wrappers = [(path, module) for path, module in ours.named_modules() if isinstance(module, StackAdapter)]
    assert len(wrappers) == 4
    for path, module in wrappers:
        down, up = module.lora_A["default"].weight.grad, module.lora_B["default"].weight.grad
        moved = {
            "A": set(down.reshape(4, -1).any(1).nonzero().flatten().tolist()),
            "B": set(up.reshape(up.shape[0], -1, 4).any(0).any(0).nonzero().flatten().tolist()),
        }
        experts = next(found for holder, found in chosen.items() if holder.startswith(path))
        assert moved == {"A": experts, "B": experts}, path


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_no_sum_is_kept_for_the_backward_pass(torch, monkeypatch, experts):
    packed, _ = packed_and_plain(torch, "qwen3_moe", experts=experts)
    ours, made, own = tuned(torch, packed).train(), [], expert_stacks._with_products

    def watched(*args):
        found = own(*args)
        made.append(weakref.ref(found.untyped_storage()))
        return found

    monkeypatch.setattr(expert_stacks, "_with_products", watched)
    ids = torch.arange(2, 50)[None]
    loss = ours(input_ids=ids, labels=ids).loss
    assert len(made) == 4 and not any(reference() for reference in made)
    loss.backward()
    assert len(made) > 4 and not any(reference() for reference in made)


def test_gradients_are_the_same_under_activation_checkpointing(torch):
    packed, _ = packed_and_plain(torch, "gpt_oss")
    ours, ids = tuned(torch, packed).train(), torch.arange(2, 50)[None]
    _, expected = answer(torch, ours, ids)
    enable = getattr(ours, "activation_checkpointing_enable", None) or ours.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    _, found = answer(torch, ours, ids)
    assert all(torch.allclose(found[name], expected[name], atol=1e-7) for name in expected)


def test_layers_with_adapted_experts_are_compiled_once_for_all(torch):
    packed, _ = packed_and_plain(torch, "qwen3_moe", num_hidden_layers=4)
    ours, ids = tuned(torch, packed).train(), torch.arange(2, 34)[None]
    ours.enable_input_require_grads()  # else the first layer's input differs from the others' in that
    expected, gradients = answer(torch, ours, ids)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for layer in ours.get_base_model().model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False, backend="eager")
        found, others = answer(torch, ours, ids)
    torch._dynamo.reset()
    assert torch.allclose(found, expected, atol=1e-5)
    assert all(torch.allclose(gradients[name], others[name], atol=1e-6) for name in gradients)


# files


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_is_read_by_plain_peft_and_here(torch, tmp_path, family):
    from peft import PeftModel
    from peft.tuners.lora.layer import ParamWrapper

    packed, plain = packed_and_plain(torch, family)
    fresh = copy.deepcopy(packed)
    ours = tuned(torch, packed).eval()
    ours.save_pretrained(tmp_path, save_embedding_layers=False)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    again = load_adapter(fresh, tmp_path).eval()
    assert all(isinstance(each, StackAdapter) for each in again.modules() if isinstance(each, ParamWrapper))
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        expected = ours(input_ids=ids).logits
        assert torch.equal(theirs(input_ids=ids).logits, expected)
        assert torch.equal(again(input_ids=ids).logits, expected)
        with again.disable_adapter():
            base = again(input_ids=ids).logits
        assert (base - expected).abs().max() > 0.01
        load_adapter(again, tmp_path, name="second").set_adapter("second")
        assert torch.equal(again(input_ids=ids).logits, expected)


def test_adapters_are_removed_without_a_trace(torch):
    packed, _ = packed_and_plain(torch, "mixtral")
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        before = packed(input_ids=ids).logits
        ours = tuned(torch, packed)
        assert (ours(input_ids=ids).logits - before).abs().max() > 0.01
        remove_adapters(ours)
        assert torch.equal(packed(input_ids=ids).logits, before)
    assert not any("lora" in name for name, _ in packed.named_parameters())
    tuned(torch, packed)


def test_a_merge_into_4_bits_is_refused_and_one_into_whole_weights_is_exact(torch):
    packed, plain = packed_and_plain(torch, "gpt_oss")
    with pytest.raises(ModelError, match="can't be merged into experts in 4 bits"):
        tuned(torch, packed, AdapterConfig(lora_dropout=0.0, target_modules=("experts",))).merge_and_unload()
    ours, ids = tuned(torch, plain), torch.arange(2, 40)[None]
    with torch.no_grad():
        expected = ours(input_ids=ids).logits
        assert torch.allclose(ours.merge_and_unload()(input_ids=ids).logits, expected, atol=1e-5)


# counts, and a loaded checkpoint


@pytest.mark.parametrize("name", ["experts", "gate_up_proj", "q_proj"])
def test_the_adapters_are_counted_before_they_are_added(torch, name):
    model = tiny_mixture("gpt_oss", intermediate_size=96)
    config = AdapterConfig(r=4, lora_dropout=0.0, target_modules=(name,))
    sizes = adapter_sizes(model, config)
    ours = add_adapters(model, config, seed=0, say=quiet)
    assert sum(size.parameters for size in sizes) == count_parameters(ours).trainable > 0
    assert weights_on_experts(ours) == (0 if name == "q_proj" else count_parameters(ours).trainable)
    if name == "gate_up_proj":
        (size,) = sizes
        assert (size.name, size.in_features, size.out_features, size.layers) == ("experts.gate_up_proj", 64, 192, 2)


def test_a_loaded_mixture_is_adapted_without_unpacking_its_experts(torch, tmp_path, monkeypatch):
    """Outside of forward passes: peft asks for shape, type and device alone."""
    from qlora_helpers.model.loading import load_model

    folder = save(tiny_mixture("qwen3_moe"), tmp_path / "m")
    model = load_model(ModelConfig(name=str(folder)), say=quiet).model
    monkeypatch.setattr("qlora_helpers.model.targets.without_gradient", lambda model, paths: [])
    monkeypatch.setattr("qlora_helpers.model.targets.refuse_what_adapters_break", lambda model: None)
    monkeypatch.setattr(expert_stacks, "unpacked", lambda *args: pytest.fail("a stack was unpacked"))
    ours = add_adapters(model, EXPERTS, seed=0, say=quiet)
    assert sorted(ours.peft_config["default"].target_parameters) == ["experts.down_proj", "experts.gate_up_proj"]
    assert sum(isinstance(module, StackAdapter) for module in ours.modules()) == 4
    assert len(stacks_of(model)) == 2


def test_a_name_that_shared_layers_have_too_means_these_and_is_said(torch):
    said = []
    add_adapters(tiny_mixture("qwen2_moe"), AdapterConfig(target_modules=("down_proj",)), seed=0, say=said.append)
    assert said == ["down_proj means the linear layers of that name; the experts' are experts.down_proj"]
