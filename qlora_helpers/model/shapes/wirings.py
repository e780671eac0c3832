"""How each model family is wired: from its `config.json` to the linear layers, norms and embeddings of its decoder.

Each wiring is tested against the model that transformers builds. Knows nothing of bytes, devices or training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlora_helpers.model.shapes.decoder import LinearLayer, ModelSizes
from qlora_helpers.model.shapes.values import Shape, flag, head_width, optional_size, size, softcap

# What transformers' classes assume where a published config.json leaves a size out
DEFAULTS: dict[str, Shape] = {
    "mistral": {"num_key_value_heads": 8},
    "mixtral": {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
    },
    "gemma": {"num_key_value_heads": 16, "head_dim": 256},
    "gemma2": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208},
    "opt": {"max_position_embeddings": 2048},
}


TIED = frozenset({"falcon", "bloom", "opt", "gemma", "gemma2", "gemma3_text"})


def _sizes(
    family: str,
    config: Shape,
    linears: tuple[LinearLayer, ...],
    *,
    intermediate: int,
    kv_heads: int,
    head_dim: int,
    norm: str = "rms",
    norms: int = 2,
    layer_extra: int = 0,
    embeddings: int | None = None,
    final_norm: bool = True,
    head_bias: bool = False,
    **flags: Any,
) -> ModelSizes:
    """Adds up a model; `layer_extra` is what a decoder layer holds besides linear layers, biases and norms of width `hidden`."""
    hidden, vocab = size(config, "hidden_size", "n_embed"), size(config, "vocab_size")
    tied = flag(config, "tie_word_embeddings", family in TIED)
    embedding = vocab * optional_size(config, "word_embed_proj_dim", hidden)
    norm_size = hidden * (2 if norm == "layer" else 1)
    biases = sum(layer.per_layer * layer.out_features for layer in linears if layer.bias)
    return ModelSizes(
        family=family,
        hidden=hidden,
        layers=size(config, "num_hidden_layers", "n_layer"),
        heads=size(config, "num_attention_heads", "n_head"),
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=vocab,
        tied=tied,
        linears=linears,
        other_parameters_per_layer=norms * norm_size + biases + layer_extra,
        other_parameters=(embedding if embeddings is None else embeddings) + final_norm * norm_size,
        head_parameters=(0 if tied else embedding) + head_bias * vocab,
        norm=norm,
        norms_per_layer=norms,
        **flags,
    )


def _attention(
    config: Shape, *, bias: bool, out: str = "o_proj", out_bias: bool
) -> tuple[int, int, tuple[LinearLayer, ...]]:
    """Returns key-value heads, head size, and the four separate projections."""
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    kv_heads = optional_size(config, "num_key_value_heads", heads)
    head_dim = size(config, "head_dim") if config.get("head_dim") is not None else head_width(config, hidden, heads)
    return (
        kv_heads,
        head_dim,
        (
            LinearLayer("q_proj", hidden, heads * head_dim, bias=bias),
            LinearLayer("k_proj", hidden, kv_heads * head_dim, bias=bias),
            LinearLayer("v_proj", hidden, kv_heads * head_dim, bias=bias),
            LinearLayer(out, heads * head_dim, hidden, bias=out_bias),
        ),
    )


def like_llama(family: str, config: Shape) -> ModelSizes:
    """Returns the sizes of a Llama or of a listed family that differs from it in little."""
    hidden, inner = size(config, "hidden_size"), size(config, "intermediate_size")
    out_bias = family not in ("mistral", "qwen2") and flag(config, "attention_bias", False)
    kv_heads, head_dim, attention = _attention(config, bias=out_bias or family == "qwen2", out_bias=out_bias)
    mlp_bias = family == "llama" and flag(config, "mlp_bias", False)
    mlp = (
        LinearLayer("gate_proj", hidden, inner, bias=mlp_bias),
        LinearLayer("up_proj", hidden, inner, bias=mlp_bias),
        LinearLayer("down_proj", inner, hidden, bias=mlp_bias),
    )
    qk_norm = family in ("qwen3", "gemma3_text")
    return _sizes(
        family,
        config,
        attention + mlp,
        intermediate=inner,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norms=4 if family in ("gemma2", "gemma3_text") else 2,
        layer_extra=2 * head_dim * qk_norm,
        gated_mlp=True,
        qk_norm=qk_norm,
        logit_softcap=softcap(config),
        attention_softcap=softcap(config, "attn_logit_softcapping") if family == "gemma2" else None,
    )


def _mixture_of_experts(
    family: str,
    config: Shape,
    attention: tuple[int, int, tuple[LinearLayer, ...]],
    *,
    inner: int,
    experts: int,
    qk_norm: bool = False,
) -> ModelSizes:
    """A mixture of gated experts and their router in every decoder layer; its attention is in linear layers."""
    hidden, (kv_heads, head_dim, projections) = size(config, "hidden_size"), attention
    expert_parameters = experts * 3 * hidden * inner
    return _sizes(
        family,
        config,
        projections,
        intermediate=inner,
        kv_heads=kv_heads,
        head_dim=head_dim,
        layer_extra=experts * hidden + 2 * head_dim * qk_norm,
        qk_norm=qk_norm,
        gated_mlp=True,
        experts=experts,
        experts_per_token=size(config, "num_experts_per_tok"),
        expert_parameters_per_layer=expert_parameters,
        expert_stacks=(
            LinearLayer("experts.gate_up_proj", hidden, 2 * inner, per_layer=experts),
            LinearLayer("experts.down_proj", inner, hidden, per_layer=experts),
        ),
    )


def _mixtral(family: str, config: Shape) -> ModelSizes:
    return _mixture_of_experts(
        family,
        config,
        _attention(config, bias=False, out_bias=False),
        inner=size(config, "intermediate_size"),
        experts=size(config, "num_local_experts"),
    )


def _qwen3_moe(family: str, config: Shape) -> ModelSizes:
    """Like Mixtral, with smaller experts, and queries and keys normalised; every decoder layer has experts."""
    bias = flag(config, "attention_bias", False)
    return _mixture_of_experts(
        family,
        config,
        _attention(config, bias=bias, out_bias=bias),
        qk_norm=True,
        inner=size(config, "moe_intermediate_size"),
        experts=size(config, "num_experts", "num_local_experts"),
    )


def _phi3(family: str, config: Shape) -> ModelSizes:
    hidden, inner = size(config, "hidden_size"), size(config, "intermediate_size")
    kv_heads, head_dim, (query, key, value, out) = _attention(config, bias=False, out_bias=False)
    linears = (
        LinearLayer("qkv_proj", hidden, query.out_features + key.out_features + value.out_features),
        out,
        LinearLayer("gate_up_proj", hidden, 2 * inner),
        LinearLayer("down_proj", inner, hidden),
    )
    return _sizes(family, config, linears, intermediate=inner, kv_heads=kv_heads, head_dim=head_dim, gated_mlp=True)


def _phi(family: str, config: Shape) -> ModelSizes:
    hidden, inner = size(config, "hidden_size"), size(config, "intermediate_size")
    kv_heads, head_dim, attention = _attention(config, bias=True, out="dense", out_bias=True)
    mlp = (LinearLayer("fc1", hidden, inner, bias=True), LinearLayer("fc2", inner, hidden, bias=True))
    qk_norm = flag(config, "qk_layernorm", False)
    return _sizes(
        family,
        config,
        attention + mlp,
        intermediate=inner,
        kv_heads=kv_heads,
        head_dim=head_dim,
        gated_mlp=False,
        norm="layer",
        norms=1,
        layer_extra=4 * head_width(config, hidden, size(config, "num_attention_heads")) * qk_norm,
        head_bias=True,
        qk_norm=qk_norm,
        parallel_attention=True,
    )


def _opt(family: str, config: Shape) -> ModelSizes:
    hidden, inner, heads = size(config, "hidden_size"), size(config, "ffn_dim"), size(config, "num_attention_heads")
    bias, affine = flag(config, "enable_bias", True), flag(config, "layer_norm_elementwise_affine", True)
    kv_heads, head_dim, attention = _attention(
        {"model_type": family, "hidden_size": hidden, "num_attention_heads": heads},
        bias=bias,
        out="out_proj",
        out_bias=bias,
    )
    mlp = (LinearLayer("fc1", hidden, inner, bias=bias), LinearLayer("fc2", inner, hidden, bias=bias))
    width = optional_size(config, "word_embed_proj_dim", hidden)
    positions = (size(config, "max_position_embeddings") + 2) * hidden  # the table has two rows more than positions
    projections = 2 * width * hidden if width != hidden else 0
    final = flag(config, "do_layer_norm_before", True) and not flag(config, "_remove_final_layer_norm", False)
    return _sizes(
        family,
        config,
        attention + mlp,
        intermediate=inner,
        kv_heads=kv_heads,
        head_dim=head_dim,
        gated_mlp=False,
        norm="layer",
        layer_extra=0 if affine else -4 * hidden,
        final_norm=final and affine,
        embeddings=size(config, "vocab_size") * width + positions + projections,
        other_quantized=projections,
    )


def _fused_qkv(
    family: str, config: Shape, *, qkv: int, kv_heads: int, inner: int, bias: bool, mlp_bias: bool, **more: Any
) -> ModelSizes:
    """Falcon, GPT-NeoX, BLOOM: one projection for queries, keys and values, and a plain MLP."""
    hidden = size(config, "hidden_size", "n_embed")
    linears = (
        LinearLayer("query_key_value", hidden, qkv, bias=bias),
        LinearLayer("dense", hidden, hidden, bias=bias),
        LinearLayer("dense_h_to_4h", hidden, inner, bias=mlp_bias),
        LinearLayer("dense_4h_to_h", inner, hidden, bias=mlp_bias),
    )
    head_dim = head_width(config, hidden, size(config, "num_attention_heads", "n_head"))
    return _sizes(
        family,
        config,
        linears,
        intermediate=inner,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm="layer",
        gated_mlp=False,
        **more,
    )


def _falcon(family: str, config: Shape) -> ModelSizes:
    """Falcon-7B shares one key-value head whatever `num_kv_heads` says; the new decoder (40B, 180B, 11B) reads it."""
    hidden, heads = size(config, "hidden_size", "n_embed"), size(config, "num_attention_heads", "n_head")
    new, bias = flag(config, "new_decoder_architecture", False), flag(config, "bias", False)
    shared = 1 if flag(config, "multi_query", True) else heads
    kv_heads = optional_size(config, "num_kv_heads", heads) if new else shared
    parallel = flag(config, "parallel_attn", True)
    parallel_norms = optional_size(config, "num_ln_in_parallel_attn", 2 if new else 1)
    return _fused_qkv(
        family,
        config,
        qkv=(heads + 2 * kv_heads) * head_width(config, hidden, heads),
        kv_heads=kv_heads,
        bias=bias,
        mlp_bias=bias,
        inner=optional_size(config, "ffn_hidden_size", 4 * hidden),
        norms=parallel_norms if parallel else 2,
        parallel_attention=new or parallel,
    )


def _gpt_neox(family: str, config: Shape) -> ModelSizes:
    hidden = size(config, "hidden_size")
    return _fused_qkv(
        family,
        config,
        qkv=3 * hidden,
        kv_heads=size(config, "num_attention_heads"),
        mlp_bias=True,
        inner=size(config, "intermediate_size"),
        bias=flag(config, "attention_bias", True),
        parallel_attention=flag(config, "use_parallel_residual", True),
    )


def _bloom(family: str, config: Shape) -> ModelSizes:
    hidden = size(config, "hidden_size", "n_embed")
    return _fused_qkv(
        family,
        config,
        qkv=3 * hidden,
        kv_heads=size(config, "num_attention_heads", "n_head"),
        inner=4 * hidden,
        bias=True,
        mlp_bias=True,
        embeddings=size(config, "vocab_size") * hidden + 2 * hidden,
    )


_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


WIRINGS: dict[str, Callable[[str, Shape], ModelSizes]] = dict.fromkeys(_LIKE_LLAMA, like_llama) | {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "phi": _phi,
    "phi3": _phi3,
    "opt": _opt,
    "falcon": _falcon,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
}


KNOWN_FAMILIES = frozenset(WIRINGS)
