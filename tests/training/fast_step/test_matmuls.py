"""Outputs that checkpointed layers skip: no gradient reads them, which NaN in their place would show."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from test_fast_step import (
    BLOCKS,
    PADDED,
    SHAPES,
    assert_same,
    built,
    compile_here,
    fast,
    fast_collator,
    gradients,
    plain_collator,
)
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_helpers.base.config import AdapterConfig
from qlora_helpers.model.lora import add_adapters
from qlora_helpers.model.shapes.families import ADAPTER_TARGETS, added_to_residual
from qlora_helpers.training.fast_step import matmuls

SKIPPED = {
    "falcon-40b layout": 2,
    "falcon-7b layout": 2,
    "falcon-rw layout without alibi": 2,
    "llama": 1,
    "mistral": 1,
    "mistral, window": 1,
    "olmo3, window": 0,
    "gemma2": 0,
    "gpt_oss": 0,
    "cohere2": 0,
    "granite": 0,
    "qwen2": 1,
    "qwen3": 1,
    "gemma": 0,
    "phi3": 1,
    "phi": 0,
    "gpt_neox": 0,
}


@pytest.fixture
def skipped(monkeypatch):
    """The widths of skipped outputs; NaN stands in their place."""
    widths = []

    def uninitialized(x, width):
        widths.append(width)
        return x.new_full((*x.shape[:-1], width), float("nan"))

    monkeypatch.setattr(matmuls, "_uninitialized", uninitialized)
    return widths


@pytest.fixture
def compiled_here(monkeypatch):
    compile_here(monkeypatch)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", SHAPES)
def test_no_gradient_reads_a_skipped_output(name, packed, skipped):
    model = built(SHAPES[name])
    blocks = BLOCKS if packed else PADDED
    with fast(model, packed=packed) as on:
        expected = gradients(model, fast_collator(on, packed)(blocks))
    assert not skipped
    with fast(model, packed=packed, checkpointed=2) as on:
        assert on.skipped == SKIPPED[name]
        found = gradients(model, fast_collator(on, packed)(blocks))
    assert len(skipped) == 2 * SKIPPED[name]
    assert_same(expected, found, tolerance=1e-12)


@pytest.mark.parametrize("name", ["falcon-40b layout", "falcon-7b layout", "llama", "phi3", "qwen3"])
def test_compiled_layers_learn_and_skip_the_same(name, skipped, compiled_here):
    model = built(SHAPES[name])
    expected = gradients(model, plain_collator()(BLOCKS))
    with fast(model, compiled=True, checkpointed=2) as on:
        for _ in range(2):  # the second runs what was traced
            skipped.clear()
            found = gradients(model, fast_collator(on)(BLOCKS))
            assert len(skipped) == 2 * SKIPPED[name]
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_same(expected, found, tolerance=3e-6)


def in_4_bits(model, *, double_quantization=True):
    """The decoder layers' linear layers replaced by their 4-bit ones, as bitsandbytes stores them."""
    for module in [m for m in model.modules() if not isinstance(m, bnb.nn.Linear4bit)]:
        for name, linear in module.named_children():
            if isinstance(linear, torch.nn.Linear) and name not in ("lm_head", "embed_out"):
                packed = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    linear.bias is not None,
                    compute_dtype=linear.weight.dtype,
                    compress_statistics=double_quantization,
                    quant_type="nf4",
                )
                packed.load_state_dict(linear.state_dict())
                setattr(module, name, packed)
    return model.to("cpu")


@pytest.mark.parametrize(
    ("compiled", "double_quantization"), [(False, True), (False, False), (True, True)], ids=["", "simple", "compiled"]
)
@pytest.mark.parametrize("name", ["falcon-40b layout", "llama"])
def test_4_bit_layers_skip_the_same(name, double_quantization, compiled, skipped, compiled_here):
    torch.manual_seed(0)
    shape = SHAPES[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), attn_implementation="sdpa")
    adapted = add_adapters(
        in_4_bits(model, double_quantization=double_quantization), AdapterConfig(r=4, lora_dropout=0.0), seed=0
    ).train()
    adapted.config.use_cache = False
    for path, parameter in adapted.named_parameters():
        if "lora_B" in path:
            parameter.data = torch.randn_like(parameter) * 0.1
    expected = gradients(adapted, plain_collator()(BLOCKS))
    with fast(adapted, compiled=compiled, checkpointed=3) as on:
        assert on.skipped == SKIPPED[name]
        found = gradients(adapted, fast_collator(on)(BLOCKS))
    assert len(skipped) == 3 * SKIPPED[name]
    assert_same(expected, found, tolerance=1e-5)


def test_a_skipped_output_that_is_read_would_show(skipped, monkeypatch):
    monkeypatch.setattr(matmuls, "added_to_residual", lambda config: ("o_proj",))
    model = built(SHAPES["llama"])
    with fast(model, checkpointed=2) as on:
        _, found = gradients(model, fast_collator(on)(BLOCKS))
    assert any(gradient.isnan().any() for gradient in found.values())


def test_dora_reads_the_output_so_it_is_not_skipped(skipped):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES["llama"])).double()
    assert model.config.use_cache  # which recomputed layers must not fill twice
    adapted = add_adapters(model, AdapterConfig(use_dora=True, lora_dropout=0.0), seed=0).train()
    with fast(adapted) as on:
        expected = gradients(adapted, fast_collator(on)(BLOCKS))[1]
    with fast(adapted, checkpointed=3) as on:
        assert on.skipped == 0
        found = gradients(adapted, fast_collator(on)(BLOCKS))[1]
    assert not skipped
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_evaluation_and_the_step_after_an_interrupt_skip_nothing(skipped):
    model = built(SHAPES["llama"])

    def interrupted(gradient):
        raise InterruptedError

    with fast(model, checkpointed=3) as on:
        batch = fast_collator(on)(BLOCKS)
        hook = next(p for n, p in model.named_parameters() if "layers.0" in n and "lora_B" in n).register_hook(
            interrupted
        )
        with pytest.raises(InterruptedError):
            gradients(model, batch)
        hook.remove()
        assert not matmuls._recomputing.on
        expected = model(**batch)["loss"].item()
        assert expected == pytest.approx(gradients(model, batch)[0]) and expected == expected
        skipped.clear()
        with torch.no_grad():
            assert model.eval()(**batch)["loss"].item() == pytest.approx(expected)
        assert not skipped


def test_the_families_are_known_ones_and_their_layers_adapted_ones():
    for family in matmuls.added_to_residual.__globals__["_ADDED_LAST"]:
        names = added_to_residual({"model_type": family})
        assert names and set(names) <= set(ADAPTER_TARGETS[family])
    assert added_to_residual({"model_type": "gemma3_text"}) == ()
    assert added_to_residual({"model_type": "falcon", "parallel_attn": False}) == ("dense_4h_to_h",)


def test_under_autocast_nothing_is_skipped(skipped):
    """As float16 trains: linear layers cast what they get."""
    half = built(SHAPES["llama"], dtype=torch.float16)
    with fast(half, checkpointed=3) as on:
        assert on.skipped == 0
    model = built(SHAPES["llama"], dtype=torch.float32)
    with fast(model, checkpointed=3) as on, torch.autocast("cpu", torch.bfloat16):
        assert gradients(model, fast_collator(on)(BLOCKS))[1]
    assert not skipped


@pytest.mark.parametrize("spoilt", ["a bias in 32 bits", "a lost state"])
def test_what_bitsandbytes_repairs_is_left_to_it(spoilt, skipped):
    linear = bnb.nn.Linear4bit(
        64, 32, bias=True, compute_dtype=torch.bfloat16, quant_type="nf4", quant_storage=torch.bfloat16
    )
    linear = linear.to(torch.bfloat16).to("cpu").requires_grad_(False)
    if spoilt == "a lost state":
        linear.weight.quant_state = None
    else:
        linear.bias.data = linear.bias.data.float()
    calls = []
    forward = matmuls._skippable_forward(lambda x: calls.append(x) or x)
    forward(linear, torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True))
    assert len(calls) == 1
