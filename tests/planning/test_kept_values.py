"""A decoder layer keeps what `step_settings` counts for its backward pass: compared with the tensors that autograd saves."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from qlora_helpers.base.config import AdapterConfig, ModelConfig
from qlora_helpers.model.lora import add_adapters
from qlora_helpers.model.nf4 import keep_gradients_exact_on_cpu
from qlora_helpers.model.random_weights import build_random_model
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.model.wiring import decoder_layers
from qlora_helpers.planning import step_settings
from qlora_helpers.planning.step_settings import StepSettings, kept_bytes, kept_values
from qlora_helpers.training.fast_step import block_diagonal
from qlora_helpers.training.fast_step.adapters import weights_cast_in_place_of_activations
from qlora_helpers.training.fast_step.layers import layers_changed

TOKENS, R = 256, 4
_COMMON = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0}
_GROUPED = _COMMON | {"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 448}
_EXPERTS = {"num_experts_per_tok": 2}
FAMILIES = {
    "falcon-40b": _COMMON
    | {"model_type": "falcon", "num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 512},
    "falcon-7b": _COMMON | {"model_type": "falcon", "new_decoder_architecture": False, "multi_query": True},
    "llama": _GROUPED | {"model_type": "llama"},
    "qwen2": _GROUPED | {"model_type": "qwen2"},
    "qwen3": _GROUPED | {"model_type": "qwen3"},
    "gemma3": _GROUPED | {"model_type": "gemma3_text"},
    "mixtral": _GROUPED | {"model_type": "mixtral", "intermediate_size": 96} | _EXPERTS | {"num_local_experts": 8},
    "qwen3_moe": _GROUPED | {"model_type": "qwen3_moe", "moe_intermediate_size": 96, "num_experts": 8} | _EXPERTS,
}


def attended_at_once(query, key, value, starts, scale):
    """Replaces the GPU's kernel, which keeps the same values: queries, keys, values, output and the softmax's sums."""
    query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key.contiguous(), value.contiguous(), is_causal=True, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def kept_by_a_layer(
    shape, monkeypatch, *, compiled=True, fast=True, dtype=torch.bfloat16, attention="sdpa", **adapter
) -> float:
    """Counts bytes a token of the tensors that a layer saves, each storage once."""
    monkeypatch.setattr(block_diagonal, "_row_by_row", attended_at_once)
    torch._dynamo.reset()
    config = AutoConfig.for_model(**shape)
    model = build_random_model(config.to_dict(), ModelConfig(device_map="cpu"), dtype=dtype, attention=attention)
    keep_gradients_exact_on_cpu(model)
    model = add_adapters(model, AdapterConfig(**{"r": R, "lora_dropout": 0.0} | adapter), seed=0).train()
    model.enable_input_require_grads()  # as a layer before this one would
    inner = model.get_base_model()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def look(tensor):
        storage = tensor.untyped_storage().data_ptr()
        rows = TOKENS, TOKENS * shape.get("num_experts_per_tok", 1)
        chunked = shape["model_type"] == "qwen3_5_text" and tensor.numel() >= TOKENS
        if (chunked or any(each in tensor.shape for each in rows)) and storage not in own:
            kept[storage] = tensor.untyped_storage().nbytes()
        return tensor

    with ExitStack() as parts:
        real, patched = torch.compile, parts.enter_context(monkeypatch.context())
        patched.setattr(torch, "compile", lambda f, **options: real(f, backend=PARTITIONED, **options))
        if fast:
            parts.enter_context(weights_cast_in_place_of_activations(model))
            parts.enter_context(block_diagonal.block_diagonal_attention(inner, longest=TOKENS))
            parts.enter_context(layers_changed(inner, compiled=compiled, checkpointed=0, keep_random_state=False))
        elif dtype == torch.bfloat16:  # as Trainer does it
            parts.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        (layer,) = decoder_layers(inner)
        forward = layer.forward

        def watched(*args, **kwargs):
            with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
                return forward(*args, **kwargs)

        layer.forward = watched
        tokens = torch.arange(TOKENS).unsqueeze(0)
        starts = torch.tensor([0, TOKENS], dtype=torch.int32)
        alone = {"row_starts": starts} if fast and attention == "sdpa" else {}
        model(input_ids=tokens, position_ids=tokens, use_cache=False, **alone)
        layer.forward = forward
    return sum(kept.values()) / TOKENS


PARTITIONED = "aot_eager_decomp_partition"  # splits the graph as inductor does, without compiling kernels


@pytest.mark.parametrize("name", FAMILIES)
def test_a_compiled_layer_keeps_what_was_counted(name, monkeypatch):
    shape = FAMILIES[name]
    sizes = model_sizes(AutoConfig.for_model(**shape).to_dict())
    counted = 2 * kept_values(sizes, compiled=True, r=R)
    shared = 2 * 2 * sizes.head_dim  # the rotation's cosine and sine, one pair for all layers
    statistics = 2 * 2 * (2 * sizes.norms_per_layer + sizes.heads + sizes.kv_heads)  # of norms, in float32
    assert counted <= kept_by_a_layer(shape, monkeypatch) <= counted + shared + statistics


@pytest.mark.parametrize("named", [(), ("q_proj", "k_proj", "v_proj", "o_proj", "experts")])
def test_a_mixture_with_adapters_on_its_experts_keeps_what_their_gradients_need(named, monkeypatch):
    shape = FAMILIES["qwen3_moe"]
    sizes = model_sizes(AutoConfig.for_model(**shape).to_dict())
    step = StepSettings(TOKENS, 1, 0, True, R, 0, on_experts=len(named))
    kept = kept_by_a_layer(shape, monkeypatch, target_modules=named or None)
    assert 0.9 * kept <= kept_bytes(sizes, step) <= kept


@pytest.mark.parametrize("compiled", [True, False])
def test_capped_attention_keeps_its_scores(compiled, monkeypatch):
    """Where such a model attends under a mask; here with as many heads as make the scores most of it."""
    shape = _GROUPED | {"model_type": "gemma2", "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 8}
    monkeypatch.setattr(block_diagonal, "block_diagonal_attention", lambda model, longest: nullcontext())
    sizes = model_sizes(AutoConfig.for_model(**shape).to_dict())
    assert sizes.attention_softcap == 50.0
    step = StepSettings(TOKENS, 1, 0, compiled, R, 0, within_rows=False)
    kept = kept_by_a_layer(shape, monkeypatch, compiled=compiled, attention="eager")
    assert 0.85 * kept <= kept_bytes(sizes, step) <= 1.1 * kept
    assert kept_bytes(sizes, replace(step, within_rows=True)) < kept / 2


def test_linear_attention_without_its_kernel_keeps_what_was_counted(monkeypatch):
    """By PyTorch's own operations, in chunks of tokens and in float32: several times what the kernel keeps."""
    heads = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    }
    shape = _GROUPED | heads | {"model_type": "qwen3_5_text", "layer_types": ["linear_attention"]}
    sizes = model_sizes(AutoConfig.for_model(**shape).to_dict())
    assert sizes.mixer_packages == ("fla",)
    step = StepSettings(TOKENS, 1, 0, False, R, 0, within_rows=False)
    kept = kept_by_a_layer(shape, monkeypatch, compiled=False, attention="eager")
    assert 0.9 * kept <= kept_bytes(sizes, step) <= 1.1 * kept
    monkeypatch.setattr(step_settings, "has_kernels", lambda sizes: True)
    assert kept_bytes(sizes, step) < kept / 2


FEW = ("q_proj", "v_proj")
WAYS = {
    "dropout, compiled": {"lora_dropout": 0.05},
    "dropout": {"lora_dropout": 0.05, "compiled": False},
    "dropout, few layers": {"lora_dropout": 0.05, "compiled": False, "target_modules": FEW},
    "DoRA": {"use_dora": True, "compiled": False},
    "DoRA with dropout": {"use_dora": True, "lora_dropout": 0.05, "compiled": False},
    "DoRA, few layers": {"use_dora": True, "compiled": False, "target_modules": FEW},
    "DoRA in float32": {"use_dora": True, "compiled": False, "dtype": torch.float32},
    "plain": {"fast": False, "compiled": False},
    "plain with dropout": {"fast": False, "lora_dropout": 0.05, "compiled": False},
    "plain in float32": {"fast": False, "compiled": False, "dtype": torch.float32},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["falcon-40b", "llama"])
def test_other_adapters_and_dropout_keep_what_was_counted(name, way, monkeypatch):
    asked = WAYS[way]
    if name == "falcon-40b" and "target_modules" in asked:
        asked = asked | {"target_modules": ("query_key_value",)}
    sizes = model_sizes(AutoConfig.for_model(**FAMILIES[name]).to_dict())
    step = StepSettings(
        seq_len_tokens=TOKENS,
        micro_batch_size=1,
        checkpointed=0,
        compiled=asked.get("compiled", True),
        r=R,
        adapter_parameters=0,
        dropout="lora_dropout" in asked,
        dora="use_dora" in asked,
        fast_adapters=asked.get("fast", True),
        value_bytes=asked.get("dtype", torch.bfloat16).itemsize,
        adapted=frozenset(asked.get("target_modules", ())) or None,
    )
    kept = kept_by_a_layer(FAMILIES[name], monkeypatch, **asked)
    above = 1.5 if step.adapted else 1.25  # inputs of layers without an adapter are counted, though some are not kept
    assert 0.9 * kept <= kept_bytes(sizes, step) <= above * kept
