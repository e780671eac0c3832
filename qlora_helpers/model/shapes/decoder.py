"""What a causal language model is made of: the counts that planning, adapters and merging build on."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_helpers.model.shapes.families import added_to_residual


@dataclass(frozen=True)
class LinearLayer:
    """The `nn.Linear` modules of one name in a decoder layer.

    Attributes:
        name: last part of the module's name, such as `q_proj`.
        in_features, out_features: the weight is `(out_features, in_features)`.
        per_layer: how many of them a decoder layer has.
        bias: whether it has a bias of `out_features`, which stays unquantised.
    """

    name: str
    in_features: int
    out_features: int
    per_layer: int = 1
    bias: bool = False

    @property
    def parameters_per_layer(self) -> int:
        """Weights without biases."""
        return self.per_layer * self.in_features * self.out_features


@dataclass(frozen=True)
class ModelSizes:
    """What a causal language model is made of; every count is in weights, not bytes.

    Attributes:
        family: the `model_type` whose wiring this is.
        hidden: width of the residual stream.
        layers: decoder layers.
        heads, kv_heads, head_dim: of the attention; `kv_heads` after multi-query sharing (1 for Falcon-7B).
        intermediate: inner width of one MLP, or of one expert.
        vocab: rows of the embedding.
        tied: whether the output head is the embedding.
        linears: the `nn.Linear` modules of ONE decoder layer: exactly what bitsandbytes stores in 4 bits.
        other_parameters_per_layer: the rest of a decoder layer: norms, biases, a router, and experts (see below).
        other_parameters: outside the decoder layers: embeddings, final norm. OPT-350M's two projections are counted here although
            they are stored in 4 bits (1 M weights).
        head_parameters: of the output head, which is not quantised; 0 where it is tied (Phi's bias always counts).
        gated_mlp: whether the MLP multiplies two branches (SwiGLU, GeGLU), so that it keeps more activations.
        parallel_attention: whether attention and MLP read the same residual and are added together.
        norm: `rms` (weight alone) or `layer` (weight and bias).
        norms_per_layer: norms of width `hidden`.
        qk_norm: whether queries and keys are normalised for each head.
        logit_softcap: tanh cap on the logits, which are then needed whole; None where there is none.
        experts, experts_per_token: of a mixture of experts, else 0.
        expert_parameters_per_layer: of all experts together; they are part of `other_parameters_per_layer`.
        assumed: the family is not known here and was taken to be wired like Llama.

    Mixtral: transformers 5 keeps a layer's experts in two three-dimensional parameters, not in `nn.Linear` modules. On loading,
    bitsandbytes replaces `nn.Linear` alone, so 97 % of the weights stay in bfloat16 whatever `load_in_4bit` says (Mixtral 8x7B
    takes about 85 GiB), and peft's `target_modules` reaches the attention only. The same holds for Qwen3's mixtures.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    linears: tuple[LinearLayer, ...]
    other_parameters_per_layer: int
    other_parameters: int
    head_parameters: int
    gated_mlp: bool
    parallel_attention: bool = False
    norm: str = "rms"
    norms_per_layer: int = 2
    qk_norm: bool = False
    logit_softcap: float | None = None
    experts: int = 0
    experts_per_token: int = 0
    expert_parameters_per_layer: int = 0
    assumed: bool = False

    @property
    def linear_parameters_per_layer(self) -> int:
        """Weights of a decoder layer that are stored in 4 bits."""
        return sum(layer.parameters_per_layer for layer in self.linears)

    @property
    def parameters_added_last_per_layer(self) -> int:
        """Weights of a decoder layer whose matrix multiplications a recomputation can skip."""
        names = added_to_residual({"model_type": self.family, "parallel_attn": self.parallel_attention})
        return sum(layer.parameters_per_layer for layer in self.linears if layer.name in names)

    @property
    def parameters(self) -> int:
        """All weights; tied ones count once."""
        in_layers = self.layers * (self.linear_parameters_per_layer + self.other_parameters_per_layer)
        return in_layers + self.other_parameters + self.head_parameters
