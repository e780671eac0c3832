"""What is known of model families without loading anything: adapter targets, how rows are kept apart, and what
its sizes are called.

A model's `config.json` as a plain dict goes in, plain facts come out. Imports no torch, so a form or a plan may ask it at once.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    (`probes.check_rows_apart`).

    Args:
        config: a model's `config.json`.
        seq_len_tokens: length of a block.
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
    """Linear layers of a decoder block whose product is added to the residual and read by nothing else in the block.

    Empty for families that are not listed, such as Gemma, which normalises what its MLP gives.

    Args:
        config: a model's `config.json`.
    """
    family = str(config.get("model_type"))
    together = config.get("new_decoder_architecture") or config.get("parallel_attn", True)
    return _ADDED_LAST.get(family, ()) + (("dense",) if family == "falcon" and together else ())


def draws_at_random(config: dict[str, Any]) -> bool:
    """Whether a model drops some of its own values while it trains, as OPT does unasked.

    Args:
        config: a model's `config.json`.
    """
    return any("drop" in name and isinstance(share, float) and share > 0 for name, share in config.items())


@dataclass(frozen=True)
class LinearLayer:
    """The `nn.Linear` modules of one name in a decoder block.

    Attributes:
        name: last part of the module's name, such as `q_proj`.
        in_features, out_features: the weight is `(out_features, in_features)`.
        per_block: how many of them a block has.
        bias: whether it has a bias of `out_features`, which stays unquantised.
    """

    name: str
    in_features: int
    out_features: int
    per_block: int = 1
    bias: bool = False

    @property
    def parameters_per_block(self) -> int:
        """Weights without biases."""
        return self.per_block * self.in_features * self.out_features


@dataclass(frozen=True)
class ModelSizes:
    """What a causal language model is made of; every count is in weights, not bytes.

    Attributes:
        family: the `model_type` whose wiring this is.
        hidden: width of the residual stream.
        blocks: decoder layers.
        heads, kv_heads, head_dim: of the attention; `kv_heads` after multi-query sharing (1 for Falcon-7B).
        intermediate: inner width of one MLP, or of one expert.
        vocab: rows of the embedding.
        tied: whether the output head is the embedding.
        linears: the `nn.Linear` modules of ONE block: exactly what bitsandbytes stores in 4 bits.
        other_parameters_per_block: the rest of a block: norms, biases, a router, and experts (see below).
        other_parameters: outside the blocks: embeddings, final norm. OPT-350M's two projections are counted here although they
            are stored in 4 bits (1 M weights).
        head_parameters: of the output head, which stays unquantised; 0 where it is tied (Phi's bias always counts).
        gated_mlp: whether the MLP multiplies two branches (SwiGLU, GeGLU), so that it keeps more activations.
        parallel_attention: whether attention and MLP read the same residual and are added together.
        norm: `rms` (weight alone) or `layer` (weight and bias).
        norms_per_block: norms of width `hidden`.
        qk_norm: whether queries and keys are normalised for each head.
        logit_softcap: tanh cap on the logits, which are then needed whole; None where there is none.
        experts, experts_per_token: of a mixture of experts, else 0.
        expert_parameters_per_block: of all experts together; they are part of `other_parameters_per_block`.
        assumed: the family is not known here and was taken to be wired like Llama.

    Mixtral: transformers 5 keeps a block's experts in two three-dimensional parameters, not in `nn.Linear` modules. On loading,
    bitsandbytes replaces `nn.Linear` alone, so 97 % of the weights stay in 16 bits whatever `load_in_4bit` says (Mixtral 8x7B
    takes about 85 GiB), and peft's `target_modules` reaches the attention only. Of Qwen3's mixtures the same holds.
    """

    family: str
    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    linears: tuple[LinearLayer, ...]
    other_parameters_per_block: int
    other_parameters: int
    head_parameters: int
    gated_mlp: bool
    parallel_attention: bool = False
    norm: str = "rms"
    norms_per_block: int = 2
    qk_norm: bool = False
    logit_softcap: float | None = None
    experts: int = 0
    experts_per_token: int = 0
    expert_parameters_per_block: int = 0
    assumed: bool = False

    @property
    def linear_parameters_per_block(self) -> int:
        """Weights of a block that are stored in 4 bits."""
        return sum(layer.parameters_per_block for layer in self.linears)

    @property
    def parameters_added_last_per_block(self) -> int:
        """Weights of a block whose product a recomputation need not make again."""
        names = added_to_residual({"model_type": self.family, "parallel_attn": self.parallel_attention})
        return sum(layer.parameters_per_block for layer in self.linears if layer.name in names)

    @property
    def parameters(self) -> int:
        """All weights; tied ones count once."""
        in_blocks = self.blocks * (self.linear_parameters_per_block + self.other_parameters_per_block)
        return in_blocks + self.other_parameters + self.head_parameters
