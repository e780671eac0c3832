"""The `config.json` of models of 2025 and 2026 that are much tuned: hybrids, mixtures of experts, windows, multimodal ones' text.

Plain data, as in `catalog`, which puts both together. Values are those of the published files, checked in public repositories that
keep them (`SOURCES`) and against the totals that publishers state; a model whose values could not be checked is left out. Of
multimodal models the text part is given. What sets no size (tokens, scaling of positions) is left to the family's defaults.
"""

from __future__ import annotations

from typing import Any

Shape = dict[str, Any]


def _shape(model_type: str, architecture: str, **sizes: Any) -> Shape:
    return {"model_type": model_type, "architectures": [architecture], **sizes}


def _decoder(*sizes: int) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return dict(zip((*names, "vocab_size"), sizes, strict=True))


def _qwen35(
    hidden: int, layers: int, heads: int, kv_heads: int, inner: int, *, values: int, tied: bool = False
) -> Shape:
    return _shape(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        **_decoder(hidden, layers, heads, kv_heads, inner, 248320),
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=values,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        max_position_embeddings=262144,
        tie_word_embeddings=tied,
    )


def _qwen35_moe(hidden: int, layers: int, heads: int, inner: int, *, values: int, experts: int, chosen: int) -> Shape:
    return _shape(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        vocab_size=248320,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=values,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        moe_intermediate_size=inner,
        shared_expert_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=chosen,
        max_position_embeddings=262144,
        tie_word_embeddings=False,
    )


def _gemma4(*sizes: int, window: int, every: int, positions: int, **more: Any) -> Shape:
    """Each `every`-th layer attends to all tokens, with heads twice as wide."""
    layers = sizes[1]
    return _shape(
        "gemma4_text",
        "Gemma4ForCausalLM",
        **_decoder(*sizes, 262144),
        head_dim=256,
        global_head_dim=512,
        sliding_window=window,
        layer_types=["full_attention" if n % every == 0 else "sliding_attention" for n in range(1, layers + 1)],
        max_position_embeddings=positions,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        **more,
    )


def _gpt_oss(layers: int, experts: int) -> Shape:
    return _shape(
        "gpt_oss",
        "GptOssForCausalLM",
        **_decoder(2880, layers, 64, 8, 2880, 201088),
        head_dim=64,
        num_local_experts=experts,
        num_experts_per_tok=4,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        max_position_embeddings=131072,
        attention_bias=True,
        tie_word_embeddings=False,
    )


def _llama4(experts: int, *, every: int) -> Shape:
    """Each `every`-th layer has experts, the others an MLP of 16,384."""
    return _shape(
        "llama4_text",
        "Llama4ForCausalLM",
        **_decoder(5120, 48, 40, 8, 8192, 202048),
        head_dim=128,
        intermediate_size_mlp=16384,
        num_local_experts=experts,
        num_experts_per_tok=1,
        interleave_moe_layer_step=every,
        tie_word_embeddings=False,
    )


def _granite_hybrid(*sizes: int, shared: int, mamba_heads: int, experts: int, chosen: int) -> Shape:
    """Four of forty layers attend; the others are Mamba-2."""
    mamba = ["mamba"] * 5 + ["attention", *["mamba"] * 9] * 3 + ["attention"] + ["mamba"] * 4
    return _shape(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        **_decoder(*sizes, 100352),
        shared_intermediate_size=shared,
        num_local_experts=experts,
        num_experts_per_tok=chosen,
        layer_types=mamba,
        mamba_n_heads=mamba_heads,
        mamba_d_head=64,
        mamba_d_state=128,
        mamba_n_groups=1,
        mamba_d_conv=4,
        mamba_expand=2,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )


def _falcon_h1(*sizes: int, mamba: int, heads: int, head_dim: int, groups: int = 1) -> Shape:
    """Attention and Mamba-2 side by side in each layer."""
    return _shape(
        "falcon_h1",
        "FalconH1ForCausalLM",
        **_decoder(*sizes),
        head_dim=128,
        mamba_d_ssm=mamba,
        mamba_n_heads=heads,
        mamba_d_head=head_dim,
        mamba_d_state=256,
        mamba_n_groups=groups,
        mamba_d_conv=4,
        tie_word_embeddings=False,
    )


def _lfm2(*sizes: int, attention: tuple[int, ...]) -> Shape:
    """Attention in the layers named, short convolutions in the others; two thirds of the written inner width are used."""
    layers = sizes[1]
    return _shape(
        "lfm2",
        "Lfm2ForCausalLM",
        **_decoder(*sizes, 65536),
        block_auto_adjust_ff_dim=True,
        conv_L_cache=3,
        layer_types=["full_attention" if n in attention else "conv" for n in range(layers)],
        tie_word_embeddings=True,
    )


def _qwen3_moe(*sizes: int, inner: int, positions: int) -> Shape:
    return _shape(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        **_decoder(*sizes, 151936),
        head_dim=128,
        num_local_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=inner,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=positions,
        tie_word_embeddings=False,
    )


def _mistral(*sizes: int, model_type: str = "mistral", tied: bool = False) -> Shape:
    architecture = "MistralForCausalLM" if model_type == "mistral" else "Ministral3ForCausalLM"
    return _shape(
        model_type,
        architecture,
        **_decoder(*sizes, 131072),
        head_dim=128,
        sliding_window=None,
        tie_word_embeddings=tied,
    )


def _olmo3(*sizes: int) -> Shape:
    return _shape(
        "olmo3", "Olmo3ForCausalLM", **_decoder(*sizes, 100278), sliding_window=4096, tie_word_embeddings=False
    )


RECENT: dict[str, Shape] = {
    "qwen3-30b-a3b-2507": _qwen3_moe(2048, 48, 32, 4, 6144, inner=768, positions=262144),
    "qwen3-235b-a22b": _qwen3_moe(4096, 94, 64, 4, 12288, inner=1536, positions=40960),
    "qwen3.5-0.8b": _qwen35(1024, 24, 8, 2, 3584, values=16, tied=True),
    "qwen3.5-2b": _qwen35(2048, 24, 8, 2, 6144, values=16, tied=True),
    "qwen3.5-4b": _qwen35(2560, 32, 16, 4, 9216, values=32, tied=True),
    "qwen3.5-9b": _qwen35(4096, 32, 16, 4, 12288, values=32),
    "qwen3.5-27b": _qwen35(5120, 64, 24, 4, 17408, values=48),
    "qwen3.5-35b-a3b": _qwen35_moe(2048, 40, 16, 512, values=32, experts=256, chosen=8),
    "qwen3.5-122b-a10b": _qwen35_moe(3072, 48, 32, 1024, values=64, experts=256, chosen=8),
    "gemma-4-e2b": _gemma4(
        *(1536, 35, 8, 1, 6144),
        window=512,
        every=5,
        positions=131072,
        hidden_size_per_layer_input=256,
        vocab_size_per_layer_input=262144,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
    ),
    "gemma-4-e4b": _gemma4(
        *(2560, 42, 8, 2, 10240),
        window=512,
        every=6,
        positions=131072,
        hidden_size_per_layer_input=256,
        vocab_size_per_layer_input=262144,
        num_kv_shared_layers=18,
        use_double_wide_mlp=False,
    ),
    "gemma-4-31b": _gemma4(
        *(5376, 60, 32, 16, 21504),
        window=1024,
        every=6,
        positions=262144,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        num_global_key_value_heads=4,
        attention_k_eq_v=True,
    ),
    "gemma-4-26b-a4b": _gemma4(
        *(2816, 30, 16, 8, 2112),
        window=1024,
        every=6,
        positions=262144,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "llama-4-scout": _llama4(16, every=1),
    "llama-4-maverick": _llama4(128, every=2),
    "mistral-small-24b": _mistral(5120, 40, 32, 8, 32768),
    "ministral-8b": _mistral(4096, 36, 32, 8, 12288),
    "ministral-3-3b": _mistral(3072, 26, 32, 8, 9216, model_type="ministral3", tied=True),
    "smollm3-3b": _shape(
        "smollm3", "SmolLM3ForCausalLM", **_decoder(2048, 36, 16, 4, 11008, 128256), tie_word_embeddings=True
    ),
    "granite-4.0-h-tiny": _granite_hybrid(1536, 40, 12, 4, 512, shared=1024, mamba_heads=48, experts=64, chosen=6),
    "granite-4.0-h-small": _granite_hybrid(4096, 40, 32, 8, 768, shared=1536, mamba_heads=128, experts=72, chosen=10),
    "olmo-3-7b": _olmo3(4096, 32, 32, 32, 11008),
    "olmo-3-32b": _olmo3(5120, 64, 40, 8, 27648),
    "glm-4-9b-0414": _shape(
        "glm4",
        "Glm4ForCausalLM",
        **_decoder(4096, 40, 32, 2, 13696, 151552),
        head_dim=128,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "glm-4.5-air": _shape(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        **_decoder(4096, 46, 96, 8, 10944, 151552),
        head_dim=128,
        attention_bias=True,
        use_qk_norm=False,
        first_k_dense_replace=1,
        moe_intermediate_size=1408,
        n_routed_experts=128,
        n_shared_experts=1,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    ),
    "falcon-h1-7b": _falcon_h1(3072, 44, 12, 2, 12288, 130048, mamba=3072, heads=24, head_dim=128),
    "lfm2-1.2b": _lfm2(2048, 16, 32, 8, 12288, attention=(2, 5, 8, 10, 12, 14)),
    "deepseek-v3": _shape(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        **_decoder(7168, 61, 128, 128, 18432, 129280),
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        first_k_dense_replace=3,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    ),
    "deepseek-r1-distill-qwen-1.5b": _shape(
        "qwen2",
        "Qwen2ForCausalLM",
        **_decoder(1536, 28, 12, 2, 8960, 151936),
        use_sliding_window=False,
        tie_word_embeddings=False,
    ),
}
"""Key -> `config.json`."""


def _both(owner: str, key: str, *names: str) -> dict[str, str]:
    return {f"{owner}/{name}": key for name in names}


RECENT_HUB_NAMES: dict[str, str] = {
    **_both("Qwen", "qwen3-30b-a3b-2507", "Qwen3-30B-A3B-Instruct-2507", "Qwen3-30B-A3B-Thinking-2507"),
    **_both("Qwen", "qwen3-30b-a3b-2507", "Qwen3-Coder-30B-A3B-Instruct"),
    **_both("Qwen", "qwen3-235b-a22b", "Qwen3-235B-A22B"),
    **{
        f"Qwen/Qwen3.5-{size}{kind}": f"qwen3.5-{size.lower()}"
        for size in ("0.8B", "2B", "4B", "9B", "35B-A3B")
        for kind in ("", "-Base")
    },
    **_both("Qwen", "qwen3.5-27b", "Qwen3.5-27B", "Qwen3.6-27B"),
    **_both("Qwen", "qwen3.5-35b-a3b", "Qwen3.6-35B-A3B"),
    **_both("Qwen", "qwen3.5-122b-a10b", "Qwen3.5-122B-A10B"),
    **{
        f"google/gemma-4-{size}{kind}": f"gemma-4-{size.lower()}"
        for size in ("E2B", "E4B", "31B", "26B-A4B")
        for kind in ("", "-it")
    },
    **_both("openai", "gpt-oss-20b", "gpt-oss-20b"),
    **_both("openai", "gpt-oss-120b", "gpt-oss-120b"),
    **_both("meta-llama", "llama-4-scout", "Llama-4-Scout-17B-16E", "Llama-4-Scout-17B-16E-Instruct"),
    **_both("meta-llama", "llama-4-maverick", "Llama-4-Maverick-17B-128E", "Llama-4-Maverick-17B-128E-Instruct"),
    **_both("mistralai", "mistral-small-24b", "Mistral-Small-24B-Base-2501", "Mistral-Small-24B-Instruct-2501"),
    **_both("mistralai", "mistral-small-24b", "Mistral-Small-3.1-24B-Instruct-2503"),
    **_both("mistralai", "mistral-small-24b", "Mistral-Small-3.2-24B-Instruct-2506"),
    **_both("mistralai", "ministral-8b", "Ministral-8B-Instruct-2410"),
    **_both("mistralai", "ministral-3-3b", "Ministral-3-3B-Base-2512", "Ministral-3-3B-Instruct-2512"),
    **_both("HuggingFaceTB", "smollm3-3b", "SmolLM3-3B", "SmolLM3-3B-Base"),
    **_both("ibm-granite", "granite-4.0-h-tiny", "granite-4.0-h-tiny", "granite-4.0-h-tiny-base"),
    **_both("ibm-granite", "granite-4.0-h-small", "granite-4.0-h-small", "granite-4.0-h-small-base"),
    **_both("allenai", "olmo-3-7b", "Olmo-3-1025-7B", "Olmo-3-7B-Instruct", "Olmo-3-7B-Think"),
    **_both("allenai", "olmo-3-32b", "Olmo-3-1125-32B", "Olmo-3-32B-Think", "Olmo-3.1-32B-Instruct"),
    **_both("zai-org", "glm-4-9b-0414", "GLM-4-9B-0414"),
    **_both("zai-org", "glm-4.5-air", "GLM-4.5-Air", "GLM-4.5-Air-Base"),
    **_both("tiiuae", "falcon-h1-7b", "Falcon-H1-7B-Base", "Falcon-H1-7B-Instruct"),
    **_both("LiquidAI", "lfm2-1.2b", "LFM2-1.2B", "LFM2.5-1.2B-Instruct"),
    **_both("deepseek-ai", "deepseek-v3", "DeepSeek-V3", "DeepSeek-V3-Base", "DeepSeek-V3-0324", "DeepSeek-R1"),
    **_both("deepseek-ai", "deepseek-r1-distill-qwen-1.5b", "DeepSeek-R1-Distill-Qwen-1.5B"),
    **_both("deepseek-ai", "qwen2.5-7b", "DeepSeek-R1-Distill-Qwen-7B"),
    **_both("deepseek-ai", "qwen2.5-14b", "DeepSeek-R1-Distill-Qwen-14B"),
    **_both("deepseek-ai", "qwen2.5-32b", "DeepSeek-R1-Distill-Qwen-32B"),
    **_both("deepseek-ai", "llama-3.1-8b", "DeepSeek-R1-Distill-Llama-8B"),
    **_both("deepseek-ai", "llama-3.1-70b", "DeepSeek-R1-Distill-Llama-70B"),
    **_both("deepseek-ai", "qwen3-8b", "DeepSeek-R1-0528-Qwen3-8B"),
}
"""Hub id -> key in `RECENT` or in `catalog.SHAPES`; a distilled DeepSeek has the shape of the model that it was made from."""

_TOTAL = "the total of its safetensors files"
SOURCES: dict[str, str] = {
    "qwen3-": f"citsjtu2020/LLM-Prof, sglang/Model_Config.md (30B-A3B); {_TOTAL} (235B-A22B)",
    "qwen3.5-": "THUDM/slime, scripts/models (27B, 35B-A3B); a registry of all sizes in a public JAX trainer",
    "gemma-4-": "a printed Gemma4Config of gemma-4-31B-it with its layers; tests with the published text_config of the others",
    "gpt-oss-": f"EchoCog/gpt-oss-20b, config.json; {_TOTAL}",
    "llama-4-": "the published text_config in tests of public serving engines (Scout and Maverick)",
    "mistral-": f"a public census of published configurations; {_TOTAL}",
    "ministral-": f"{_TOTAL} (8B); a public table of configurations (3-3B)",
    "smollm3-": f"a public table of published configurations; {_TOTAL}",
    "granite-4.0-": "a public table of published configurations, with layers (H-Tiny) and without (H-Small)",
    "olmo-3-": f"public contracts of both sizes; {_TOTAL}",
    "glm-": f"a log of ms-swift with the Glm4MoeConfig of GLM-4.5-Air; {_TOTAL} (9B)",
    "falcon-h1-": "a public table of published configurations; transformers' documentation of Falcon-H1",
    "lfm2-": "the published total (1.17B) and kinds of layers; public readers of its config.json",
    "deepseek-": f"transformers' defaults, which are DeepSeek-V3's; {_TOTAL}",
}
"""Start of a key -> where its values were checked."""
