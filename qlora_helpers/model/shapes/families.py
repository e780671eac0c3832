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


_RECURRENT = (
    "mamba_d_state",
    "ssm_state_size",
    "state_size",
    "lru_width",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "conv_L_cache",
    "linear_attn_config",
)
_RECURRENT_KINDS = ("linear", "mamba", "conv", "recurrent", "hybrid")
ALIBI = "its positions are biases of the attention scores (ALiBi), which can't restart with each row"


def is_recurrent(config: dict[str, Any]) -> bool:
    """Whether some layers carry a state from token to token: state-space layers, linear attention, short convolutions.

    Args:
        config: a model's `config.json`.
    """
    lists = (config.get(name) for name in ("layer_types", "layers_block_type", "block_types"))
    kinds = next((kinds for kinds in lists if isinstance(kinds, list | tuple) and kinds), None)
    if kinds is not None:
        return any(part in str(kind) for kind in kinds for part in _RECURRENT_KINDS)
    return any(config.get(name) is not None for name in _RECURRENT)


def _only_convolutions(config: dict[str, Any]) -> bool:
    """Whether short convolutions are all that carries a state (LFM2): their rows are kept apart without a package."""
    kinds = {
        str(kind) for kind in config.get("layer_types") or () if any(part in str(kind) for part in _RECURRENT_KINDS)
    }
    return bool(kinds) and all("conv" in kind for kind in kinds)


def uses_alibi(config: dict[str, Any]) -> bool:
    """Whether positions are biases of the attention scores (Press et al. 2021, arXiv:2108.12409): BLOOM, MPT, Falcon-RW.

    Args:
        config: a model's `config.json`.
    """
    nested = config.get("attn_config")
    if config.get("model_type") == "mpt":
        return bool(nested.get("alibi", True)) if isinstance(nested, dict) else True
    return config.get("model_type") == "bloom" or bool(config.get("alibi"))


def fixed_positions(config: dict[str, Any]) -> tuple[str, float]:
    """Returns a name for a model's rotary positions, and how long a row may be without changing those of the rows beside it.

    LongRoPE (Ding et al. 2024, arXiv:2402.13753; Phi-3.5) and dynamic NTK scaling choose the frequencies of a whole forward pass
    by its longest row. The length is infinite for all others.

    Args:
        config: a model's `config.json`.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = found if isinstance(found, dict) else {}
    limits: list[tuple[float, str]] = []
    for rope in (found, *(each for each in found.values() if isinstance(each, dict))):
        kind = str(rope.get("rope_type") or rope.get("type") or "")
        if kind == "longrope" or "dynamic" in kind:
            lengths = (
                rope.get("original_max_position_embeddings"),
                config.get("original_max_position_embeddings"),
                config.get("max_position_embeddings"),
            )
            limits.append((min((each for each in lengths if isinstance(each, int)), default=0), kind))
    longest, kind = min(limits, default=(float("inf"), ""))
    return kind, longest


def packing_refusal(config: dict[str, Any], longest: int = 0) -> str | None:
    """Says why a model's rows will probably be padded instead of packed, as far as `config.json` tells, or None.

    A forecast for plans and forms: once a model is loaded, a proof on it decides (`training.row_isolation`).

    Args:
        config: a model's `config.json`.
        longest: an upper bound on a row's tokens.
    """
    if not isinstance(config.get("model_type"), str):
        return "its config.json names no model type"
    if uses_alibi(config):
        return ALIBI
    if is_recurrent(config) and not _only_convolutions(config):
        return "its recurrent layers carry their state from row to row"
    return positions_refusal(config, longest)


def positions_refusal(config: dict[str, Any], longest: int) -> str | None:
    """Says that a row can be so long that it changes the positions of all rows in its forward pass, or None.

    Args:
        config: a model's `config.json`.
        longest: an upper bound on a row's tokens.
    """
    kind, fixed = fixed_positions(config)
    if longest <= fixed:
        return None
    return (
        f"a row of more than {fixed:,} tokens changes the positions of all rows in its pass (rope_type {kind}), so packed rows "
        f"need data.seq_len_tokens of at most {fixed:,}"
    )


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
