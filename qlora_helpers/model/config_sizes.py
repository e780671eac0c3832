"""Sizes that transformers' configurations have under several names: heads, experts, the states of recurrent layers.

Takes a configuration object as it is. Knows nothing of the layers that are built of it.
"""

from __future__ import annotations

from typing import Any

_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
    "top_k",
)


def largest(config: Any, *names: str) -> int:
    """Returns the first of some sizes that a configuration has; the largest where layers have their own; 0 where none has."""
    try:
        parts = list(config.per_layer_config) or [config]
    except AttributeError:  # of transformers before 5.20, and of parts of a configuration
        parts = [config]
    for name in names:
        held = [getattr(part, name, None) for part in parts]
        values = [each for value in held for each in (value if isinstance(value, list | tuple) else [value])]
        found = [each for each in values if isinstance(each, int)]
        if found:
            return max(found)
    return 0


def experts_of(config: Any) -> tuple[int, int]:
    """Returns how many experts a token goes through, and how many a layer has."""
    nested = getattr(config, "ffn_config", None) or config
    per_token = largest(nested, *_PER_TOKEN)
    experts = largest(nested, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return max(1, per_token) if experts else 0, experts


def state_values(config: Any) -> int:
    """Counts values a token of the states that a recurrent layer's kernel keeps: one state for each chunk of tokens."""
    width = (
        largest(config, "linear_num_value_heads")
        * largest(config, "linear_key_head_dim")
        * largest(config, "linear_value_head_dim")
    )
    inner = largest(config, "mamba_d_ssm", "mamba_intermediate", "lru_width") or 2 * (
        largest(config, "hidden_size") or 1
    )
    width = width or inner * largest(config, "mamba_d_state", "ssm_state_size", "state_size")
    return width // max(64, largest(config, "mamba_chunk_size", "chunk_size"))
