"""The `config.json` of well-known models, so that one can be planned or built with random weights before anything is downloaded.

Plain data, in the form that transformers 5 reads (`AutoConfig.for_model(**shape)`). `model_sizes` says what a shape
means in weights and layers; each is tested against the parameter total that its publisher states.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.shapes.recent import RECENT, RECENT_HUB_NAMES

Shape = dict[str, Any]


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta} | more


def _rope_llama3(factor: float) -> dict[str, Any]:
    return _rope(
        500000.0,
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


def _falcon(hidden: int, layers: int, heads: int, kv_heads: int, *, new: bool, vocab: int = 65024) -> Shape:
    return {
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "bias": False,
        "alibi": False,
        "new_decoder_architecture": new,
        "multi_query": True,
        "parallel_attn": True,
        "ffn_hidden_size": 4 * hidden,
        "max_position_embeddings": 2048,
        "rope_parameters": _rope(10000.0),
        "tie_word_embeddings": True,
        "bos_token_id": 11,
        "eos_token_id": 11,
    }


def _decoder(
    model_type: str,
    architecture: str,
    sizes: tuple[int, ...],
    *,
    positions: int,
    rope: dict[str, Any],
    bos: int | None,
    eos: int,
    tied: bool = False,
    **more: Any,
) -> Shape:
    hidden, layers, heads, kv_heads, inner, vocab = sizes
    return {
        "model_type": model_type,
        "architectures": [f"{architecture}ForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        "bos_token_id": bos,
        "eos_token_id": eos,
    } | more


def _llama(*sizes: int, **more: Any) -> Shape:
    return _decoder("llama", "Llama", sizes, **more)


def _llama3(*sizes: int, factor: float | None = 8.0, **more: Any) -> Shape:
    """Llama 3 has no `factor`: it was trained with 8,192 positions and does not stretch them."""
    rope = _rope_llama3(factor) if factor else _rope(500000.0)
    return _llama(*sizes, 128256, positions=131072 if factor else 8192, rope=rope, bos=128000, eos=128001, **more)


def _falcon3(*sizes: int, positions: int = 32768) -> Shape:
    return _llama(*sizes, 131072, positions=positions, rope=_rope(1000042.0), bos=11, eos=11, head_dim=256)


def _smollm2(*sizes: int, theta: float = 100000.0) -> Shape:
    return _llama(*sizes, 49152, positions=8192, rope=_rope(theta), bos=1, eos=2, tied=True)


def _mistral(*sizes: int, theta: float = 1000000.0, window: int | None = None, **more: Any) -> Shape:
    return _decoder("mistral", "Mistral", sizes, rope=_rope(theta), bos=1, eos=2, sliding_window=window, **more)


def _mixtral(*sizes: int, positions: int) -> Shape:
    return _decoder(
        "mixtral",
        "Mixtral",
        sizes,
        positions=positions,
        rope=_rope(1000000.0),
        bos=1,
        eos=2,
        sliding_window=None,
        num_local_experts=8,
        num_experts_per_tok=2,
    )


def _qwen25(*sizes: int, tied: bool = False) -> Shape:
    return _decoder(
        "qwen2",
        "Qwen2",
        sizes,
        positions=32768,
        rope=_rope(1000000.0),
        bos=151643,
        eos=151645,
        tied=tied,
        use_sliding_window=False,
    )


def _qwen3(*sizes: int, tied: bool = False) -> Shape:
    return _decoder(
        "qwen3",
        "Qwen3",
        (*sizes, 151936),
        positions=40960,
        rope=_rope(1000000.0),
        bos=151643,
        eos=151645,
        tied=tied,
        head_dim=128,
        use_sliding_window=False,
    )


def _qwen3_moe(*sizes: int, expert: int) -> Shape:
    return _decoder(
        "qwen3_moe",
        "Qwen3Moe",
        (*sizes, 151936),
        positions=40960,
        rope=_rope(1000000.0),
        bos=151643,
        eos=151645,
        head_dim=128,
        use_sliding_window=False,
        num_local_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=expert,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def _gemma2(*sizes: int, head_dim: int = 256, scalar: int = 256) -> Shape:
    return _decoder(
        "gemma2",
        "Gemma2",
        (*sizes, 256000),
        positions=8192,
        rope=_rope(10000.0),
        bos=2,
        eos=1,
        tied=True,
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
        sliding_window=4096,
        pad_token_id=0,
    )


def _gemma3(
    *sizes: int,
    head_dim: int = 256,
    scalar: int = 256,
    window: int = 1024,
    positions: int = 131072,
    far: dict[str, Any] | None = None,
) -> Shape:
    rope = {
        "full_attention": far or _rope(1000000.0, rope_type="linear", factor=8.0),
        "sliding_attention": _rope(10000.0),
    }
    return _decoder(
        "gemma3_text",
        "Gemma3",
        sizes,
        positions=positions,
        rope=rope,
        bos=2,
        eos=1,
        tied=True,
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
        sliding_window=window,
        pad_token_id=0,
    )


def _phi3(
    *sizes: int,
    window: int | None,
    positions: int,
    theta: float = 10000.0,
    bos: int = 1,
    eos: int = 32000,
    rotated: float = 1.0,
    tied: bool = False,
) -> Shape:
    return _decoder(
        "phi3",
        "Phi3",
        sizes,
        positions=positions,
        rope=_rope(theta, partial_rotary_factor=rotated),
        bos=bos,
        eos=eos,
        pad_token_id=eos,
        tied=tied,
        sliding_window=window,
        original_max_position_embeddings=positions if positions < 131072 else 4096,
    )


# hidden size, layers, heads, key-value heads, inner size of the MLP, and vocabulary where a family has several
SHAPES: dict[str, Shape] = {
    "falcon-tiny": _falcon(256, 4, 8, 2, new=True, vocab=2048) | {"bos_token_id": 0, "eos_token_id": 0},
    "falcon-7b": _falcon(4544, 32, 71, 71, new=False),
    "falcon-40b": _falcon(8192, 60, 128, 8, new=True),
    "falcon-180b": _falcon(14848, 80, 232, 8, new=True) | {"tie_word_embeddings": False},
    "falcon3-1b": _falcon3(2048, 18, 8, 4, 8192, positions=8192),
    "falcon3-3b": _falcon3(3072, 22, 12, 4, 9216),
    "falcon3-7b": _falcon3(3072, 28, 12, 4, 23040),
    "falcon3-10b": _falcon3(3072, 40, 12, 4, 23040),
    "llama-3-8b": _llama3(4096, 32, 32, 8, 14336, factor=None),
    "llama-3-70b": _llama3(8192, 80, 64, 8, 28672, factor=None),
    "llama-3.1-8b": _llama3(4096, 32, 32, 8, 14336),
    "llama-3.1-70b": _llama3(8192, 80, 64, 8, 28672),
    "llama-3.1-405b": _llama3(16384, 126, 128, 8, 53248),
    "llama-3.2-1b": _llama3(2048, 16, 32, 8, 8192, factor=32.0, tied=True, head_dim=64),
    "llama-3.2-3b": _llama3(3072, 28, 24, 8, 8192, factor=32.0, tied=True, head_dim=128),
    "mistral-7b-v0.1": _mistral(4096, 32, 32, 8, 14336, 32000, positions=32768, theta=10000.0, window=4096),
    "mistral-7b-v0.3": _mistral(4096, 32, 32, 8, 14336, 32768, positions=32768),
    "mistral-nemo-12b": _mistral(5120, 40, 32, 8, 14336, 131072, positions=131072, head_dim=128),
    "mixtral-8x7b": _mixtral(4096, 32, 32, 8, 14336, 32000, positions=32768),
    "mixtral-8x22b": _mixtral(6144, 56, 48, 8, 16384, 32000, positions=65536),
    "mixtral-8x22b-instruct": _mixtral(6144, 56, 48, 8, 16384, 32768, positions=65536),
    "qwen2.5-0.5b": _qwen25(896, 24, 14, 2, 4864, 151936, tied=True),
    "qwen2.5-1.5b": _qwen25(1536, 28, 12, 2, 8960, 151936, tied=True),
    "qwen2.5-3b": _qwen25(2048, 36, 16, 2, 11008, 151936, tied=True),
    "qwen2.5-7b": _qwen25(3584, 28, 28, 4, 18944, 152064),
    "qwen2.5-14b": _qwen25(5120, 48, 40, 8, 13824, 152064),
    "qwen2.5-32b": _qwen25(5120, 64, 40, 8, 27648, 152064),
    "qwen2.5-72b": _qwen25(8192, 80, 64, 8, 29568, 152064),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 8, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 8, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 8, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 8, 12288),
    "qwen3-14b": _qwen3(5120, 40, 40, 8, 17408),
    "qwen3-32b": _qwen3(5120, 64, 64, 8, 25600),
    "qwen3-30b-a3b": _qwen3_moe(2048, 48, 32, 4, 6144, expert=768),
    "gemma-2-2b": _gemma2(2304, 26, 8, 4, 9216),
    "gemma-2-9b": _gemma2(3584, 42, 16, 8, 14336),
    "gemma-2-27b": _gemma2(4608, 46, 32, 16, 36864, head_dim=128, scalar=144),
    "gemma-3-1b": _gemma3(1152, 26, 4, 1, 6912, 262144, window=512, positions=32768, far=_rope(1000000.0)),
    "gemma-3-4b": _gemma3(2560, 34, 8, 4, 10240, 262208),
    "gemma-3-12b": _gemma3(3840, 48, 16, 8, 15360, 262208),
    "gemma-3-27b": _gemma3(5376, 62, 32, 16, 21504, 262208, head_dim=128, scalar=168),
    "phi-3-mini": _phi3(3072, 32, 32, 32, 8192, 32064, window=2047, positions=4096),
    "phi-3-medium": _phi3(5120, 40, 40, 10, 17920, 32064, window=2047, positions=4096),
    "phi-3.5-mini": _phi3(3072, 32, 32, 32, 8192, 32064, window=262144, positions=131072),
    "phi-4": _phi3(
        5120, 40, 40, 10, 17920, 100352, window=None, positions=16384, theta=250000.0, bos=100257, eos=100257
    ),
    "phi-4-mini": _phi3(
        3072, 32, 24, 8, 8192, 200064, window=262144, positions=131072, bos=199999, eos=199999, rotated=0.75, tied=True
    ),
    "smollm2-135m": _smollm2(576, 30, 9, 3, 1536),
    "smollm2-360m": _smollm2(960, 32, 15, 5, 2560),
    "smollm2-1.7b": _smollm2(2048, 24, 32, 32, 8192, theta=130000.0),
    "tinyllama-1.1b": _llama(2048, 22, 32, 4, 5632, 32000, positions=2048, rope=_rope(10000.0), bos=1, eos=2),
    **RECENT,
}
"""`config.json` of models that can be planned, and built with random weights (`random:NAME`). falcon-tiny has the wiring of
Falcon-40B. gemma-3-4b, -12b and -27b are the text decoders: the published checkpoints also hold a vision tower. phi-3.5-mini
and phi-4-mini have plain rotary positions where the published models have LongRoPE, which changes no size."""


def _hub_names(owner: str, shapes: dict[str, str], *patterns: str) -> dict[str, str]:
    return {f"{owner}/{pattern.format(size)}": key for size, key in shapes.items() for pattern in patterns}


HUB_NAMES: dict[str, str] = {
    **_hub_names("tiiuae", {"7b": "falcon-7b", "40b": "falcon-40b"}, "falcon-{}", "falcon-{}-instruct"),
    **_hub_names("tiiuae", {"180B": "falcon-180b"}, "falcon-{}", "falcon-{}-chat"),
    **_hub_names("tiiuae", {f"{n}B": f"falcon3-{n}b" for n in (1, 3, 7, 10)}, "Falcon3-{}-Base", "Falcon3-{}-Instruct"),
    **_hub_names(
        "meta-llama", {f"{n}B": f"llama-3-{n}b" for n in (8, 70)}, "Meta-Llama-3-{}", "Meta-Llama-3-{}-Instruct"
    ),
    **_hub_names(
        "meta-llama",
        {f"{n}B": f"llama-3.1-{n}b" for n in (8, 70, 405)},
        "Llama-3.1-{}",
        "Llama-3.1-{}-Instruct",
        "Meta-Llama-3.1-{}",
        "Meta-Llama-3.1-{}-Instruct",
    ),
    **_hub_names("meta-llama", {f"{n}B": f"llama-3.2-{n}b" for n in (1, 3)}, "Llama-3.2-{}", "Llama-3.2-{}-Instruct"),
    "meta-llama/Llama-3.3-70B-Instruct": "llama-3.1-70b",
    **_hub_names("mistralai", {"7B": "mistral-7b-v0.1"}, "Mistral-{}-v0.1", "Mistral-{}-Instruct-v0.1"),
    **_hub_names("mistralai", {"7B": "mistral-7b-v0.3"}, "Mistral-{}-v0.3", "Mistral-{}-Instruct-v0.3"),
    **_hub_names("mistralai", {"Nemo": "mistral-nemo-12b"}, "Mistral-{}-Base-2407", "Mistral-{}-Instruct-2407"),
    **_hub_names("mistralai", {"8x7B": "mixtral-8x7b"}, "Mixtral-{}-v0.1", "Mixtral-{}-Instruct-v0.1"),
    "mistralai/Mixtral-8x22B-v0.1": "mixtral-8x22b",
    "mistralai/Mixtral-8x22B-Instruct-v0.1": "mixtral-8x22b-instruct",
    **_hub_names(
        "Qwen",
        {f"{n}B": f"qwen2.5-{n}b" for n in ("0.5", "1.5", "3", "7", "14", "32", "72")},
        "Qwen2.5-{}",
        "Qwen2.5-{}-Instruct",
    ),
    **_hub_names("Qwen", {f"{n}B": f"qwen3-{n}b" for n in ("0.6", "1.7", "4", "8", "14")}, "Qwen3-{}", "Qwen3-{}-Base"),
    "Qwen/Qwen3-32B": "qwen3-32b",
    **_hub_names("Qwen", {"30B": "qwen3-30b-a3b"}, "Qwen3-{}-A3B", "Qwen3-{}-A3B-Base"),
    **_hub_names("google", {f"{n}b": f"gemma-2-{n}b" for n in (2, 9, 27)}, "gemma-2-{}", "gemma-2-{}-it"),
    **_hub_names("google", {f"{n}b": f"gemma-3-{n}b" for n in (1, 4, 12, 27)}, "gemma-3-{}-pt", "gemma-3-{}-it"),
    "microsoft/Phi-3-mini-4k-instruct": "phi-3-mini",
    "microsoft/Phi-3-mini-128k-instruct": "phi-3.5-mini",
    "microsoft/Phi-3-medium-4k-instruct": "phi-3-medium",
    "microsoft/Phi-3.5-mini-instruct": "phi-3.5-mini",
    "microsoft/phi-4": "phi-4",
    "microsoft/Phi-4-mini-instruct": "phi-4-mini",
    **_hub_names(
        "HuggingFaceTB",
        {n: f"smollm2-{n.lower()}" for n in ("135M", "360M", "1.7B")},
        "SmolLM2-{}",
        "SmolLM2-{}-Instruct",
    ),
    **_hub_names(
        "TinyLlama", {"1.1B": "tinyllama-1.1b"}, "TinyLlama-{}-Chat-v1.0", "TinyLlama-{}-intermediate-step-1431k-3T"
    ),
    "TinyLlama/TinyLlama_v1.1": "tinyllama-1.1b",
    **RECENT_HUB_NAMES,
}
"""Hub id -> key in `SHAPES`."""

MODEL_LICENCES: dict[str, str] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "Apache-2.0",
    "tiiuae/falcon-7b": "Apache-2.0",
    "tiiuae/falcon-40b": "Apache-2.0",
}
"""Hub id -> licence, as the models' cards state it."""

_KEYS = {name.lower(): key for name, key in HUB_NAMES.items()}


def known_shape(name: str) -> Shape | None:
    """Returns the `config.json` of a catalogued model, as a copy that the caller may change; None for other models.

    Args:
        name: a hub id in any case (`tiiuae/falcon-40b`), `random:KEY`, or a key of `SHAPES`.
    """
    wanted = name.strip().lower()
    key = _KEYS.get(wanted, wanted.removeprefix("random:"))
    return copy.deepcopy(SHAPES[key]) if key in SHAPES else None


def near_names(name: str, most: int = 3) -> list[str]:
    """Returns the hub ids of catalogued models that a person may have meant, the nearest first: `qwen3 8b`, `llama3`.

    Args:
        name: as it was typed.
        most: ids that are returned.
    """
    wanted = _letters(name)
    by_letters: dict[str, str] = {}
    for hub_id in sorted(HUB_NAMES, key=len):
        by_letters.setdefault(_letters(hub_id), hub_id)
    begun = [each for each in by_letters if wanted and wanted in each]
    near = difflib.get_close_matches(wanted, by_letters, n=most, cutoff=0.6)
    return [by_letters[each] for each in dict.fromkeys([*begun, *near])][:most]


def _letters(name: str) -> str:
    """Letters and digits of a name without its owner, in lower case."""
    return "".join(filter(str.isalnum, name.rpartition("/")[2].lower()))


def unknown_shape(name: str) -> ModelError:
    """Returns the error for a `random:NAME` that is not catalogued, with the closest names."""
    key = name.strip().lower().removeprefix("random:")
    near = difflib.get_close_matches(key, SHAPES, n=3, cutoff=0.5)
    close = list(dict.fromkeys([*near, "falcon-tiny", "falcon-40b", "llama-3.1-8b"]))[:3]
    return ModelError(
        f"no shape is catalogued for {name}",
        expected=f"one of {len(SHAPES)} such as random:{', random:'.join(close)}",
        next_step="`qlora_helpers.model.shapes.catalog.SHAPES` has all their names.",
    )
