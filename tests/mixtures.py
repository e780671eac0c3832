"""Tiny mixtures of experts and models with several parts, with random weights and the corpus tokenizer's 2,048 tokens."""

from __future__ import annotations

from typing import Any

_SMALL = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "num_experts_per_tok": 2,
}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
_ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": _SMALL | {"num_experts": 4, "moe_intermediate_size": 64},
    "qwen2_moe": _SMALL
    | {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96, "num_key_value_heads": 2},
    "mixtral": _SMALL | {"num_local_experts": 4},
    "gpt_oss": _SMALL | {"num_local_experts": 4, "sliding_window": 128},
    "olmoe": _SMALL | {"num_experts": 4, "num_key_value_heads": 2},
    "deepseek_v3": _SMALL | _LATENT | _ROUTED | {"moe_intermediate_size": 64, "num_key_value_heads": 2},
    "granitemoe": _SMALL | {"num_local_experts": 4},
    "llama4_text": _SMALL
    | {"num_local_experts": 4, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
    "jetmoe": _SMALL | {"num_local_experts": 4, "kv_channels": 32},
}


def tiny_mixture(family: str, *, experts: str | None = None, **more: Any) -> Any:
    """A mixture of experts with random weights in float32, by one of transformers' implementations of its experts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **MIXTURES[family] | more)
    settings = {} if experts is None else {"experts_implementation": experts}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **settings).eval()


def tiny_gemma3() -> Any:
    """A Gemma 3 with its vision part: one layer for pictures, two for text."""
    import torch
    from transformers import AutoModelForImageTextToText, Gemma3Config

    text = {key: value for key, value in _SMALL.items() if key != "num_experts_per_tok"}
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Gemma3Config(text_config=text, vision_config=vision)
        return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def save(model: Any, folder: Any) -> Any:
    """Saves a model in bfloat16 with the corpus tokenizer; returns the folder."""
    import torch

    from qlora_helpers.model.checkpoints import corpus_tokenizer

    model.to(torch.bfloat16).save_pretrained(folder)
    corpus_tokenizer().save_pretrained(folder)
    return folder
