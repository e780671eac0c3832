"""What GGUF calls each family of models, which of its settings the file holds, and how its weights are stored there.

Three things are silent when they are wrong: Llama's q and k lie in another order of rows (llama.cpp turns neighbouring values
where transformers turns halves), Gemma's norms are stored with 1 added, and Falcon's q, k and v are apart. A setting that
llama.cpp does not read is refused here, with what can serve the model. Sources: the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and llama.cpp's own reading of the settings (`src/models/`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import ModelError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter

INSTEAD = "Use --to merged or --to vllm: transformers and vLLM read the merged folder."
_NORM = re.compile(r"norm\.weight$")
_QUERY, _KEY = re.compile(r"\.q_proj\.(weight|bias)$"), re.compile(r"\.k_proj\.(weight|bias)$")
_FUSED = re.compile(r"self_attention\.query_key_value\.(weight|bias)$")


@dataclass(frozen=True)
class GgufFamily:
    """How one of transformers' families is written as GGUF.

    Attributes:
        architecture: GGUF's name of it.
        activations: names of the activation functions that llama.cpp computes for it.
        rms: whether its norms are RMS norms; else layer norms.
        permuted: whether rows of q and k change their order.
        norm_plus_one: whether 1 is added to the weights of norms.
        fused: whether q, k and v are one tensor that is ordered by groups of heads.
        windows: whether llama.cpp knows its sliding windows; elsewhere the context ends at the window.
    """

    architecture: str
    activations: tuple[str, ...] = ("silu",)
    rms: bool = True
    permuted: bool = False
    norm_plus_one: bool = False
    fused: bool = False
    windows: bool = False


GELU = (
    "gelu_pytorch_tanh",
    "gelu_new",
    "gelu",
)  # llama.cpp's GELU is the one by tanh; it differs from 'gelu' by 1e-3 at most
FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("llama", permuted=True),
    "mistral": GgufFamily("llama", permuted=True),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    "gemma": GgufFamily("gemma", GELU, norm_plus_one=True),
    "gemma2": GgufFamily("gemma2", GELU, norm_plus_one=True, windows=True),
    "gemma3_text": GgufFamily("gemma3", GELU, norm_plus_one=True, windows=True),
    "phi": GgufFamily("phi2", GELU, rms=False),
    "phi3": GgufFamily("phi3"),
    "falcon": GgufFamily("falcon", GELU, rms=False, fused=True),
}


def gguf_family(config: Any) -> GgufFamily:
    """Returns how a model is written as GGUF.

    Args:
        config: the model's configuration, as transformers reads it.

    Raises:
        ModelError: its family, or one of its settings, is not written here.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"models of the family {config.model_type} are not written as GGUF here",
            expected=", ".join(FAMILIES),
            next_step=INSTEAD,
        )
    found = [what for refused, what in _refusals(config, family) if refused]
    if found:
        raise ModelError(f"llama.cpp does not compute this model: {'; '.join(found)}", next_step=INSTEAD)
    return family


def _refusals(config: Any, family: GgufFamily) -> list[tuple[bool, str]]:
    rope, activation = rope_of(config), _first(config, "hidden_activation", "hidden_act", "activation")
    size, heads = head_size(config), config.num_attention_heads
    layers = config.num_hidden_layers
    known = {"default", "linear", "llama3"} if family.architecture == "llama" else {"default", "linear"}
    scale = config.hidden_size / heads if layers in (46, 62) else size  # llama.cpp knows Gemma's 27B by its layers
    queried = getattr(config, "query_pre_attn_scalar", scale)
    kinds = list(getattr(config, "layer_types", None) or ())
    every = {"gemma2": 2, "gemma3": 6}.get(family.architecture, 0)
    pattern = [("full" if every and (i + 1) % every == 0 else "sliding") + "_attention" for i in range(layers)]
    return [
        (activation not in family.activations, f"its activation is {activation}"),
        (rope.get("rope_type", "default") not in known, f"its positions are scaled by {rope.get('rope_type')}"),
        (bool(getattr(config, "alibi", False)), "its positions are biases (alibi)"),
        (queried != scale, f"its scores are divided by the root of {queried}"),
        (bool(every) and bool(kinds) and kinds != pattern, "its sliding windows lie in other layers"),
        (bool(getattr(config, "use_bidirectional_attention", False)), "its attention looks ahead"),
        (bool(getattr(config, "qk_layernorm", False)), "it normalises q and k (qk_layernorm)"),
        (family.fused and not getattr(config, "parallel_attn", True), "its attention and MLP are not parallel"),
        (family.fused and key_value_heads(config) == heads, "it is a Falcon without shared keys"),
    ]


def write_settings(writer: GGUFWriter, config: Any, family: GgufFamily) -> None:
    """Writes the model's sizes and constants under the names that llama.cpp reads."""
    import gguf

    heads, size, rope = config.num_attention_heads, head_size(config), rope_of(config)
    context = config.max_position_embeddings if hasattr(config, "max_position_embeddings") else 2048
    window = sliding_window(config)
    writer.add_context_length(min(context, window) if window and not family.windows else context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(_first(config, "intermediate_size", "ffn_hidden_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_value_heads(config))
    writer.add_vocab_size(config.vocab_size)
    if family.rms:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(_first(config, "layer_norm_eps", "layer_norm_epsilon"))
    if size * heads != config.hidden_size or family.norm_plus_one or family.architecture == "qwen3":
        writer.add_key_length(size)
        writer.add_value_length(size)
    writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if window and family.windows:
        writer.add_sliding_window(window)
    if family.architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if family.architecture == "gemma3":
        writer.add_rope_freq_base_swa(rope_of(config, "sliding_attention")["rope_theta"])
    if family.fused:
        writer.add_tensor_data_layout("jploski")  # q, k and v one behind the other


def extra_tensors(config: Any, family: GgufFamily) -> Mapping[str, torch.Tensor]:
    """Returns what the file holds besides the checkpoint's tensors: by what Llama 3 divides each frequency, `(head_dim / 2,)`."""
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    size = head_size(config)
    plain = [rope["rope_theta"] ** (-2 * index / size) for index in range(size // 2)]
    return {"rope_freqs.weight": scaled.new_tensor(plain) / scaled}


def stored_as(name: str, config: Any, family: GgufFamily) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Returns what turns a checkpoint's tensor into the one that GGUF holds; None where it is the same.

    Args:
        name: the tensor's name in the checkpoint.
        config: the model's configuration.
        family: of the model.
    """
    heads, shared = config.num_attention_heads, key_value_heads(config)
    if family.permuted and _QUERY.search(name):
        return lambda tensor: neighbours_from_halves(tensor, heads)
    if family.permuted and _KEY.search(name):
        return lambda tensor: neighbours_from_halves(tensor, shared)
    if family.norm_plus_one and _NORM.search(name):
        return lambda tensor: tensor.float() + 1
    if family.fused and _FUSED.search(name):
        return lambda tensor: apart_from_groups(tensor, heads, shared)
    return None


def neighbours_from_halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders the rows of q or k: of each head, rows i and i + size/2 become neighbours.

    Args:
        tensor: `(heads * size, in)`, or `(heads * size,)` for a bias.
        heads: how many heads its rows are of.
    """
    size = tensor.shape[0] // heads
    return tensor.reshape(heads, 2, size // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def apart_from_groups(tensor: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    """Puts all of q, then k, then v one behind the other, which Falcon keeps by groups of heads that share k and v.

    Args:
        tensor: `((heads + 2 * groups) * size, in)`, or without the last dimension for a bias.
        heads: how many heads q has.
        groups: how many k and v have.
    """
    import torch

    size = tensor.shape[0] // (heads + 2 * groups)
    grouped = tensor.reshape(groups, heads // groups + 2, size, *tensor.shape[1:])
    parts = (grouped[:, :-2], grouped[:, -2], grouped[:, -1])
    return torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in parts])


def rope_of(config: Any, kind: str = "full_attention") -> dict[str, Any]:
    """Returns the settings of a model's positions; of a model with two kinds of layers, those of `kind`."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    found = dict(found.get(kind) or found)
    found.setdefault("rope_theta", getattr(config, "rope_theta", 10000.0))
    found.setdefault("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    return found


def head_size(config: Any) -> int:
    """Returns how many values a head has."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def key_value_heads(config: Any) -> int:
    """Returns how many heads k and v have."""
    if config.model_type == "falcon":
        if config.new_decoder_architecture:
            return config.num_kv_heads
        return 1 if config.multi_query else config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def sliding_window(config: Any) -> int | None:
    """Returns how many tokens back a layer with a sliding window looks; None where there is no such layer."""
    used = getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if used else None


def _first(config: Any, *names: str) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
