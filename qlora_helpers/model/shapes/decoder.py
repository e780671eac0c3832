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
        per_layer: how many of them a decoder layer has; a mean over the layers where these differ (hybrids).
        bias: whether it has a bias of `out_features`, which stays unquantised.
    """

    name: str
    in_features: int
    out_features: int
    per_layer: float = 1
    bias: bool = False

    @property
    def parameters_per_layer(self) -> float:
        """Weights without biases."""
        return self.per_layer * self.in_features * self.out_features


@dataclass(frozen=True)
class ModelSizes:
    """What a causal language model is made of; every count is in weights, not bytes.

    Where layers differ (hybrids, a few dense layers before the experts, sizes of their own), a decoder layer here is the mean of
    all: so each sum over the layers is exact. The widest one is kept apart where it sets a peak.

    Attributes:
        family: the `model_type` whose wiring this is.
        hidden: width of the residual stream.
        layers: decoder layers.
        heads, kv_heads, head_dim: of the attention; `kv_heads` after multi-query sharing (1 for Falcon-7B).
        intermediate: inner width of one MLP, or of one expert.
        vocab: rows of the embedding.
        tied: whether the output head is the embedding.
        linears: the `nn.Linear` modules of ONE decoder layer: what bitsandbytes stores in 4 bits.
        other_parameters_per_layer: the rest of a decoder layer that is not quantised: norms, biases, a router, convolutions,
            and what the model's code reads directly.
        other_parameters: outside the decoder layers: embeddings, final norm, projections.
        other_quantized: those of them that are stored in 4 bits all the same: of linear layers such as OPT-350M's projections.
        head_parameters: of the output head, which is not quantised; 0 where it is tied (Phi's bias always counts).
        gated_mlp: whether the MLP multiplies two branches (SwiGLU, GeGLU), so that it keeps more activations.
        parallel_attention: whether attention and MLP read the same residual and are added together.
        norm: `rms` (weight alone) or `layer` (weight and bias).
        norms_per_layer: norms of width `hidden`.
        qk_norm: whether queries and keys are normalised for each head.
        logit_softcap: tanh cap on the logits; None where there is none.
        attention_softcap: tanh cap on the attention's scores, which a GPU's kernels do not know, so that they are there in full.
        experts, experts_per_token: of a mixture of experts, else 0.
        expert_parameters_per_layer: of all experts together. transformers keeps them in parameters of three dimensions, not in
            `nn.Linear` modules; they are stored in 4 bits too, and peft's `target_modules` does not reach them.
        expert_stacks: the matrices of the experts by stack, such as `experts.down_proj`; `per_layer` counts experts.
        widest_experts: of the layer that has most of them; dequantised together while that layer computes. None: as in the mean.
        inner_per_token: inner values of all MLPs and experts that a token goes through; None: of one MLP, or of each chosen expert.
        widest_inner: the same of the widest layer.
        expert_inner: of `inner_per_token` what experts have; None: all of it.
        expert_kept: values that an expert keeps for the backward pass for each inner value of a token: its branches and what its
            activation adds. The experts' part of a layer is not compiled.
        mixer_values: values a token that attention, or what stands for it, keeps for the backward pass; None: by `heads`.
        mixer_without_kernels: the same where transformers computes recurrent layers by PyTorch's own operations; None where that
            is no different.
        mixer_packages: what must be installed for their kernels, by the names that are imported.
        recurrent_share: share of the layers that carry a state along the sequence (state space, linear attention, convolution).
        beside_text: weights of vision and audio parts that are loaded with the text part; no other count includes them.
        beside_quantized: of these, the weights that are stored in 4 bits.
        float32_parameters: of all weights that are not in 4 bits, those that transformers keeps in float32 whatever is asked for.
        counted: `arithmetic` from the configuration, or `built`: on the layers that transformers builds of it.
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
    other_parameters_per_layer: float
    other_parameters: int
    head_parameters: int
    gated_mlp: bool
    parallel_attention: bool = False
    norm: str = "rms"
    norms_per_layer: float = 2
    qk_norm: bool = False
    logit_softcap: float | None = None
    attention_softcap: float | None = None
    experts: int = 0
    experts_per_token: int = 0
    expert_parameters_per_layer: float = 0
    expert_stacks: tuple[LinearLayer, ...] = ()
    widest_experts: int | None = None
    inner_per_token: float | None = None
    widest_inner: int | None = None
    expert_inner: float | None = None
    expert_kept: float = 3.0
    mixer_values: float | None = None
    mixer_without_kernels: float | None = None
    mixer_packages: tuple[str, ...] = ()
    recurrent_share: float = 0.0
    other_quantized: int = 0
    beside_text: int = 0
    beside_quantized: int = 0
    float32_parameters: int = 0
    counted: str = "arithmetic"

    @property
    def linear_parameters_per_layer(self) -> float:
        """Weights of a decoder layer's linear layers, which are stored in 4 bits."""
        return sum(layer.parameters_per_layer for layer in self.linears)

    @property
    def quantized_parameters_per_layer(self) -> float:
        """Weights of a decoder layer that are stored in 4 bits: of linear layers and experts."""
        return self.linear_parameters_per_layer + self.expert_parameters_per_layer

    @property
    def inner(self) -> float:
        """Inner values of the MLPs that a token goes through in a layer, before a gate doubles them."""
        active = self.intermediate * max(1, self.experts_per_token)
        return active if self.inner_per_token is None else self.inner_per_token

    @property
    def inner_of_experts(self) -> float:
        """Inner values of the experts that a token goes through in a layer; 0 without experts."""
        if not self.experts:
            return 0.0
        return self.inner if self.expert_inner is None else self.expert_inner

    @property
    def parameters_in_use(self) -> int:
        """Weights that a token is multiplied with or looked up in: all but the experts that it does not go through."""
        idle = 1 - self.experts_per_token / self.experts if self.experts else 0.0
        return round(self.parameters - self.layers * self.expert_parameters_per_layer * idle)

    @property
    def parameters_added_last_per_layer(self) -> float:
        """Weights of a decoder layer whose matrix multiplications a recomputation can skip."""
        names = added_to_residual({"model_type": self.family, "parallel_attn": self.parallel_attention})
        return sum(layer.parameters_per_layer for layer in self.linears if layer.name in names)

    @property
    def parameters(self) -> int:
        """All weights; tied ones count once."""
        in_a_layer = self.quantized_parameters_per_layer + self.other_parameters_per_layer
        return round(self.layers * in_a_layer) + self.other_parameters + self.head_parameters
