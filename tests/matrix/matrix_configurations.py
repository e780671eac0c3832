"""Tiny configurations of every causal language model family of transformers, and the list of those that none is made of.

A family is a key of transformers' causal-LM mapping. A tiny model has at least two layers of each kind that the family's own
default has, a window of 32 tokens where it has windows, no dropout, and the corpus tokenizer's 2,048 tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from typing import Any

HIDDEN, WINDOW, VOCABULARY = 128, 32, 2048
DENSE = 2  # layers before the first with experts
LONGEST = 192  # tokens of a sequence: six windows

# What people tune most, one of each shape that they come in.
MOST_USED = (
    *("llama", "mistral", "mixtral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_5_text"),
    *("qwen3_next", "gemma2", "gemma3_text", "gemma4_text", "phi3", "gpt_oss", "smollm3", "granite"),
    *("granitemoehybrid", "olmo3", "deepseek_v3", "glm4", "falcon", "falcon_h1", "gpt2", "cohere2"),
)

# By the names that the families' configurations have for them; each takes those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "n_embed", "embedding_size", "lru_width"), HIDDEN),
    **dict.fromkeys(("attention_hidden_size", "embedding_dim", "input_embedding_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "feed_forward_size"), 256),
    **dict.fromkeys(("block_ff_dim", "block_dim", "intermediate_size_mlp", "decoder_ffn_dim", "dim_ff", "dff"), 256),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "attention_head_size", "kv_channels", "dim_head"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"), 1024),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("attention_chunk_size", "local_attention_window", "attention_window"), WINDOW),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "resid_pdrop"), 0.0),
    **dict.fromkeys(("embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    **dict.fromkeys(("resid_dropout", "embedding_dropout", "embd_dropout", "emb_pdrop", "residual_dropout"), 0.0),
    **dict.fromkeys(("layerdrop", "decoder_layerdrop", "router_jitter_noise", "input_jitter_noise"), 0.0),
    **{"vocab_size": VOCABULARY, "initializer_range": 0.05, "init_std": 0.05, "word_embed_proj_dim": HIDDEN},
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 128),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "moe_ffn_hidden_size", "shared_intermediate_size"), 128),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"), DENSE),
    # latent attention
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim", "index_topk", "qk_head_dim"), 64),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 32),
    **{"index_n_heads": 2},
    # recurrences
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 32),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups", "n_mamba_heads"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "mamba_dt_rank", "time_step_rank"), 64),
    **{"mamba_d_conv": 4, "mamba_expand": 2, "mamba_d_ssm": 256},
    **{"linear_num_heads": 2, "linear_head_dim": 32},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
    **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0},
}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 16},
    "cohere_compass_text": {
        **{"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4},
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dots3_note_text": {
        **{"layer_types": ["indexed_attention", "sliding_attention"] * 2, "num_hidden_layers": 4, "head_dim": 64},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 64, "swa_kv_lora_rank": 64},
        **{
            "swa_head_dim": 64,
            "swa_qk_nope_head_dim": 32,
            "swa_v_head_dim": 32,
            "moe_shared_expert_intermediate_size": 128,
        },
    },
    "falcon": {"new_decoder_architecture": True},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 64,
        "activation_sparsity_pattern": [0.95, *[0.0] * 5],
    },
    "gemma4_text": {"hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 64},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    "jamba": {
        **{"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
        **{"expert_layer_period": 2, "expert_layer_offset": 1},
    },
    "laguna": {"layer_types": ["full_attention", "sliding_attention"] * 2, "num_hidden_layers": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "llama4_text": {"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
    "longcat_flash": {"zero_expert_num": 4},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"] * 2, "num_hidden_layers": 4},
    "qwen4_exp_text": {
        **{"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 64},
        **{"indexer_compress_ratio": 4, "hc_lowrank": 16, "ngram_vocab_size_base": 512, "split_ngram_parts": 1},
        **{"ple_embed_dim": 64, "ple_layer_ids": [1, 3]},
    },
    "recurrent_gemma": {"num_hidden_layers": 6},
    "smollm3": {"no_rope_layers": [1, 1, 0, 0], "num_hidden_layers": 4},
    "zamba": {"num_hidden_layers": 4},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
ENCODER_DECODERS = (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
    *("prophetnet", "whisper"),
)
ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl"),
    *("xlnet", "xmod", "cpmant"),
)
DRAFTS = ("gemma4_assistant", "gemma4_unified_assistant")
SOUND = ("musicgen", "musicgen_melody")
NEEDS_A_PACKAGE = {"gemma3n": "timm"}
WAITING: tuple[str, ...] = ()
"""Families that were not measured yet; `make matrix` leaves them out, and the record takes them off this list."""
NOT_JUDGED: dict[str, str] = {
    **dict.fromkeys(ENCODER_DECODERS, "an encoder-decoder, refused when it is loaded"),
    **dict.fromkeys(ENCODERS, "its tokens see those after them, so it is refused before training"),
    **dict.fromkeys(DRAFTS, "drafts tokens from the states of another model, and continues no text alone"),
    **dict.fromkeys(SOUND, "continues codes of sound from a text that an encoder reads"),
    **{family: f"its vision part needs the package {name}" for family, name in NEEDS_A_PACKAGE.items()},
}
"""Families that don't go down the path, each with its reason; the tests prove each."""
REFORMER = {
    **{"is_decoder": True, "attn_layers": ["local", "lsh"] * 2, "axial_pos_embds": False, "attention_head_size": 32},
    **{"local_attention_probs_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0},
    **{"local_attn_chunk_length": 32, "lsh_attn_chunk_length": 32, "num_buckets": 4},
}
OWN["reformer"] = REFORMER
OWN["xmod"] = {"default_language": "en_XX"}
TEXT_OF = {
    **{"gemma3": "gemma3_text", "gemma3n": "gemma3n_text", "gemma4": "gemma4_text", "llama4": "llama4_text"},
    **{
        "dots3_note": "dots3_note_text",
        "qwen3_5": "qwen3_5_text",
        "qwen3_5_moe": "qwen3_5_moe_text",
        "qwen4_exp": "qwen4_exp_text",
    },
}
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "blt": {"": {"encoder_hash_byte_group_vocab": 512}},
    "emu3": {
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 2], "codebook_size": 64, "num_res_blocks": 1},
        "": {"vocabulary_map": {"<|extra_200|>": 2, "<image>": 3, "<|visual token 000000|>": 4}},
    },
    "fuyu": {},
    "gemma4_unified": {},
    "git": {},
    "got_ocr2": {},
    "mllama": {},
    "moss_transcribe_diarize": {},
    "phi4_multimodal": {},
}
"""Families whose model has several parts, with what their parts need beside the usual sizes; the key "" is the whole's."""
TOWERS: dict[str, dict[str, dict[str, Any]]] = {
    "dots3_note": {
        "vision": {"per_layer_config": {}, "adapter_in_dim": 64, "adapter_out_dim": HIDDEN},
        "audio": {
            **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"adapter_input_size": 64, "adapter_out_dim": HIDDEN, "downsample_hidden_size": 64},
        },
    },
    "gemma3": {"vision": {"vision_use_head": False}},
}
VISION = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "depth": 1},
    **{"num_key_value_heads": 2, "head_dim": 32, "num_heads": 2, "out_hidden_size": HIDDEN, "image_size": 28},
    **{"patch_size": 14},
}


def tiny_config(family: str) -> Any:
    """A family's tiny configuration.

    Raises:
        Exception: whatever the family's own code raises for it.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    if family in TEXT_OF:
        text = tiny_config(TEXT_OF[family]).to_dict()
        vision, sound = VISION | TOWERS.get(family, {}).get("vision", {}), TOWERS.get(family, {}).get("audio")
        return kind(text_config=text, vision_config=vision, audio_config=sound)
    if family in PARTS:
        return kind(**_parts(kind, family))
    if family == "dbrx":
        attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}
        experts = {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2}
        named = {key: SIZES[key] for key in ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size")}
        ends = {key: SIZES[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return kind(**named, **ends, attn_config=attention, ffn_config=experts)
    return _with_every_kind_of_layer(kind, _sizes(kind) | OWN.get(family, {}))


def _parts(kind: type, family: str) -> dict[str, Any]:
    """The configurations of a model's parts, of the kinds that its own default has; a tower takes the sizes of pictures."""
    default, parts = kind(), {}
    for name in getattr(kind, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is None:
            continue
        sizes = _sizes(type(part)) | PARTS[family].get(name, {})
        if name == "text_config":
            parts[name] = _with_every_kind_of_layer(type(part), sizes).to_dict()
        else:
            parts[name] = type(part)(**sizes | _known(VISION | PARTS[family].get(name, {}), type(part))).to_dict()
    return _sizes(kind) | parts | PARTS[family].get("", {})


def _known(values: dict[str, Any], kind: type) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in _names(kind)}


def _names(kind: type) -> set[str]:
    names = set(inspect.signature(kind.__init__).parameters)
    if dataclasses.is_dataclass(kind):
        names |= {field.name for field in dataclasses.fields(kind)}
    return names


def _sizes(kind: type) -> dict[str, Any]:
    """The sizes that a configuration class takes, under its own names."""
    renamed = getattr(kind, "attribute_map", None) or {}
    names = _names(kind) | set(renamed)
    found: dict[str, Any] = {}
    for name, value in SIZES.items():
        if name in names:
            found.setdefault(renamed.get(name, name), value)
    if found.keys() & {"first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"}:
        found["num_hidden_layers"] = 2 * DENSE
    if "kv_lora_rank" in names and "num_key_value_heads" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]  # latent attention has a key for each query head
    return found


LISTS_OF_KINDS = ("layer_types", "layers_block_type", "block_types")


def _with_every_kind_of_layer(kind: type, sizes: dict[str, Any]) -> Any:
    """Two layers of each kind that the class's default has; as the family spreads them where it takes no list."""
    lists, lengths = _kinds_of_layers(kind), [sizes.get("num_hidden_layers", 2)]
    own = any(name in sizes for name in LISTS_OF_KINDS)
    named = None if own else next((name for name in LISTS_OF_KINDS if name in lists), None)
    if named:
        lengths.append(2 * len(lists[named]))
    if "mlp_layer_types" in lists:
        lengths.append(2 * len(lists["mlp_layer_types"]))
    count = max(lengths)
    count += count % 2
    more: dict[str, Any] = {"num_hidden_layers": count}
    if named:
        more[named] = (lists[named] * count)[:count]  # in turn
    if "mlp_layer_types" in lists:
        kinds = lists["mlp_layer_types"]
        more["mlp_layer_types"] = [kinds[len(kinds) * number // count] for number in range(count)]  # dense ones first
    if named or "mlp_layer_types" in lists:
        with contextlib.suppress(Exception):  # the family has a rule of its own for how they are spread
            return kind(**sizes | more)
    return kind(**sizes)


def _kinds_of_layers(kind: type) -> dict[str, list[str]]:
    """The kinds of decoder layers and of their MLPs that a class's default has."""
    try:
        default = kind()
    except Exception:
        return {}
    found = {}
    for name in (*LISTS_OF_KINDS, "mlp_layer_types"):
        kinds = list(dict.fromkeys(getattr(default, name, None) or []))
        if kinds and all(isinstance(each, str) for each in kinds):
            found[name] = kinds
    return found


def mapping() -> tuple[str, ...]:
    """The keys of transformers' causal-LM mapping."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def judged_families() -> list[str]:
    """The families of the installed transformers that go down the whole path."""
    return [family for family in mapping() if family not in NOT_JUDGED]
