"""What is known of model families without loading anything: adapter targets, how rows are kept apart, catalogued shapes.

A model's `config.json` as a plain dict goes in, plain facts come out. Imports no torch, so a form or a plan may ask it at once.
"""

from __future__ import annotations

from typing import Any

_GATED_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FUSED_QKV = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

ADAPTER_TARGETS: dict[str, tuple[str, ...]] = {
    "falcon": _FUSED_QKV,
    "gpt_neox": _FUSED_QKV,
    "bloom": _FUSED_QKV,
    "llama": _GATED_MLP,
    "mistral": _GATED_MLP,
    "qwen2": _GATED_MLP,
    "qwen3": _GATED_MLP,
    "gemma": _GATED_MLP,
    "gemma2": _GATED_MLP,
    "gemma3_text": _GATED_MLP,
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
"""Every linear layer of a decoder block, by `model_type`. QLoRA found adapters on all of them to matter (Dettmers et al. 2023,
arXiv:2305.14314, section 4); peft's own default for Falcon is `query_key_value` alone."""


def adapter_targets(config: dict[str, Any]) -> tuple[str, ...] | None:
    """Names of the linear layers that get an adapter, or None for a family that is not listed (they are then discovered).

    Args:
        config: a model's `config.json`.
    """
    return ADAPTER_TARGETS.get(str(config.get("model_type")))


def keeps_packed_rows_apart(config: dict[str, Any], seq_len_tokens: int) -> bool:
    """Whether packed rows can be kept apart by a block-diagonal mask and restarted positions.

    False where positions are not an input: ALiBi (BLOOM, Falcon-RW) builds its bias from a two-dimensional mask, OPT
    counts its positions from a mask too; and where a sliding window is shorter than the block, since our mask would
    replace it. Such models are trained on padded rows. A True is proved on the loaded model before training
    (`training.check_rows_apart`).

    Args:
        config: a model's `config.json`.
        seq_len_tokens: length of a block.
    """
    family = config.get("model_type")
    if family not in ADAPTER_TARGETS or family in ("bloom", "opt") or config.get("alibi"):
        return False
    window = config.get("sliding_window")
    return window is None or config.get("use_sliding_window") is False or window >= seq_len_tokens


def _falcon(hidden: int, layers: int, heads: int, kv_heads: int, *, new: bool, vocab: int = 65024) -> dict[str, Any]:
    return {
        "model_type": "falcon", "architectures": ["FalconForCausalLM"], "vocab_size": vocab, "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_kv_heads": kv_heads, "bias": False, "alibi": False,
        "new_decoder_architecture": new, "multi_query": True, "parallel_attn": True, "ffn_hidden_size": 4 * hidden,
        "bos_token_id": 11, "eos_token_id": 11,
    }  # fmt: skip


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": inner, "max_position_embeddings": 8192,
    } | more  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "falcon-tiny": _falcon(256, 4, 8, 2, new=True, vocab=2048) | {"bos_token_id": 0, "eos_token_id": 0},
    "falcon-7b": _falcon(4544, 32, 71, 71, new=False),
    "falcon-40b": _falcon(8192, 60, 128, 8, new=True),
    "llama-3.1-8b": _llama(
        4096, 32, 32, 8, 14336, 128256, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    ),
    "smollm2-135m": _llama(576, 30, 9, 3, 1536, 49152, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2),
}
"""`config.json` of models that can be built with random weights (`random:NAME`). falcon-tiny has the wiring of Falcon-40B."""
