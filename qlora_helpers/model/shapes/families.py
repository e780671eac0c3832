"""What is known of model families without loading anything: adapter targets, packing, and layers that end in the residual.

Takes a model's `config.json` as a plain dict. Imports no torch, so a form or a plan gets its answer at once.
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
"""Every linear layer of a decoder layer, by `model_type`. QLoRA found adapters on all of them to matter (Dettmers et al. 2023,
arXiv:2305.14314, section 4); peft's own default for Falcon is `query_key_value` alone."""


def adapter_targets(config: dict[str, Any]) -> tuple[str, ...] | None:
    """Returns names of the linear layers that get an adapter, or None for a family that is not listed (they are then discovered).

    Args:
        config: a model's `config.json`.
    """
    return ADAPTER_TARGETS.get(str(config.get("model_type")))


def supports_packing(config: dict[str, Any], seq_len_tokens: int) -> bool:
    """Whether packed rows can be isolated by block-diagonal attention and restarted positions.

    False where positions are not an input: ALiBi (BLOOM, Falcon-RW) builds its bias from a two-dimensional mask, and OPT counts its
    positions from a mask. False also where a sliding window is shorter than the packed sequence, since our mask would replace it.
    Such models are trained on padded rows. A True is proved on the loaded model before training (`probes.check_block_diagonal`).

    Args:
        config: a model's `config.json`.
        seq_len_tokens: length of a packed sequence.
    """
    family = str(config.get("model_type"))
    if family not in ADAPTER_TARGETS or family in ("bloom", "opt") or config.get("alibi"):
        return False
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return True
    return isinstance(window, int | float) and window >= seq_len_tokens


_ADDED_LAST = {
    "llama": ("down_proj",),
    "mistral": ("down_proj",),
    "qwen2": ("down_proj",),
    "qwen3": ("down_proj",),
    "phi3": ("down_proj",),
    "falcon": ("dense_4h_to_h",),
}


def added_to_residual(config: dict[str, Any]) -> tuple[str, ...]:
    """Returns the linear layers whose output is added to the residual and read by nothing else in their decoder layer.

    Empty for families that are not listed, such as Gemma, which normalises the output of its MLP.

    Args:
        config: a model's `config.json`.
    """
    family = str(config.get("model_type"))
    parallel = config.get("new_decoder_architecture") or config.get("parallel_attn", True)
    return _ADDED_LAST.get(family, ()) + (("dense",) if family == "falcon" and parallel else ())


def has_dropout(config: dict[str, Any]) -> bool:
    """Whether a model's own `config.json` asks for dropout in training, as OPT's does.

    Args:
        config: a model's `config.json`.
    """
    return any("drop" in name and isinstance(share, float) and share > 0 for name, share in config.items())
