"""What of a run's settings a training step's memory and time depend on, and what a decoder layer then keeps for its backward pass.

By arithmetic alone, no torch. Knows nothing of cards, of the rest of a step's bytes, or how settings are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_helpers.base.config import RunConfig, TrainConfig
from qlora_helpers.model.shapes.families import adapter_targets, supports_packing
from qlora_helpers.model.shapes.sizes import LinearLayer, ModelSizes, adapter_parameters

HALF, SINGLE = 2, 4  # bytes of a 16-bit and of a 32-bit value


@dataclass(frozen=True)
class StepSettings:
    """What of a run's settings memory depends on.

    Attributes:
        seq_len_tokens: length of a block.
        blocks: in one forward pass, on each GPU.
        checkpointed: decoder layers that recompute their activations.
        compiled: whether decoder layers are compiled.
        captured: whether passes are played from CUDA graphs.
        r: rank of the adapters.
        adapter_parameters: trainable weights in all.
        optim: optimizer, as in `TrainConfig.optim`.
        trained_share: share of the tokens that are trained.
        quantized, double_quantization: 4-bit storage, and 8-bit constants of it.
        offloaded: whether the input embedding lies in the host's memory; one that is the output layer too stays.
        chunked_loss: whether logits exist a chunk at a time; else all trained tokens' at once.
        dropout: whether the adapters' inputs are dropped in part: a mask for each, and what it leaves, are kept.
        dora: whether the adapters have a magnitude of their own: peft computes them, in 32 bits.
        fast_adapters: whether adapters compute in the model's type at once; else they are peft's, under autocast.
        value_bytes: of a value that the model computes with.
        adapted: names of the linear layers that get an adapter; None for all.
        skipped: whether recomputed layers make no product that nothing in them reads, as the fast step does but in float16, which
            trains under autocast.
        copies: processes that average their gradients: DDP keeps what it sends beside them.
    """

    seq_len_tokens: int
    blocks: int
    checkpointed: int
    compiled: bool
    r: int
    adapter_parameters: int
    optim: str = "adamw_torch"
    trained_share: float = 0.2
    quantized: bool = True
    double_quantization: bool = True
    offloaded: bool = False
    chunked_loss: bool = True
    dropout: bool = False
    dora: bool = False
    fast_adapters: bool = True
    value_bytes: int = HALF
    adapted: frozenset[str] | None = None
    captured: bool = False
    skipped: bool = True
    copies: int = 1

    @property
    def tokens(self) -> int:
        return self.blocks * self.seq_len_tokens

    def adapted_layers(self, sizes: ModelSizes) -> tuple[LinearLayer, ...]:
        """The linear layers of a block that get an adapter; all where none of the names is theirs."""
        return tuple(layer for layer in sizes.linears if self.adapted and layer.name in self.adapted) or sizes.linears


def step_settings(
    config: RunConfig,
    shape: dict[str, Any],
    *,
    blocks: int,
    checkpointed: int = 0,
    compiled: bool = True,
    captured: bool = False,
    trained_share: float,
) -> StepSettings:
    """A run's settings as memory and speed depend on them.

    Args:
        config: of the run.
        shape: the model's `config.json`.
        blocks: in one forward pass, on each GPU.
        checkpointed, compiled: of the decoder layers.
        captured: whether passes are played from CUDA graphs.
        trained_share: of the tokens.

    Raises:
        ModelError: the shape lacks a size, or a target layer is unknown.
    """
    adapter = config.adapter
    return StepSettings(
        seq_len_tokens=config.data.seq_len_tokens,
        blocks=blocks,
        checkpointed=checkpointed,
        compiled=compiled,
        r=adapter.r,
        adapter_parameters=adapter_parameters(shape, adapter.r, adapter.target_modules, adapter.use_dora),
        optim=config.train.optim,
        trained_share=trained_share,
        quantized=config.model.quantization == "nf4",
        double_quantization=config.model.double_quantization,
        offloaded=config.train.offload_embeddings and config.train.fast_step,
        chunked_loss=config.train.fast_step,
        dropout=adapter.lora_dropout > 0,
        dora=adapter.use_dora,
        fast_adapters=config.train.fast_step,
        value_bytes=SINGLE if config.model.compute_dtype == "float32" else HALF,
        adapted=frozenset(adapter.target_modules or adapter_targets(shape) or ()) or None,
        captured=captured,
        skipped=config.model.compute_dtype != "float16",
    )


def is_packed(config: RunConfig, shape: dict[str, Any]) -> bool:
    """Whether rows will be packed: asked for, and the model can keep them apart."""
    return config.data.packing and supports_packing(shape, config.data.seq_len_tokens)


def may_record(train: TrainConfig, packed: bool, dropout: bool, sizes: ModelSizes) -> bool:
    """Whether passes may be recorded as CUDA graphs on one GPU: all of one shape, and nothing in them drawn at random.

    Args:
        train: training settings.
        packed: whether rows are packed.
        dropout: whether some values are dropped.
        sizes: of the model; one that changes its logits takes its own loss, of as many tokens as a batch trains.
    """
    return train.fast_step and train.cuda_graph and packed and not dropout and not sizes.logit_softcap


def kept_values(sizes: ModelSizes, *, compiled: bool, r: int, adapted: tuple[LinearLayer, ...] | None = None) -> int:
    """Values that one decoder layer keeps for its backward pass, a token, with fast adapters that drop nothing.

    Compiled: what no pointwise kernel can make again. The layer's input, the residual between attention and MLP, queries, keys,
    values and the attention's output, the MLP's inner values before their non-linearity, and what each adapter's first matrix
    gives. Uncompiled, also what each norm gives and a root-mean-square norm's input in 32 bits, the non-linearity's output, and
    the product of a gated MLP.
    """
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    residuals = 1 if sizes.parallel_attention else 2
    norms = sizes.norms_per_layer
    extra_norms = max(0, norms - 2)  # Gemma's norms after attention and MLP keep inputs of their own
    stream = sizes.hidden * max(residuals, 1 + extra_norms)  # the residual is their input and what came before
    attention = 2 * queries + 2 * keys + 2 * sizes.heads  # the last: the softmax's sums, in 32 bits
    if sizes.qk_norm:
        attention += queries + keys
    inner = sizes.intermediate * (2 if sizes.gated_mlp else 1)
    if not compiled:
        stream = sizes.hidden * (residuals + extra_norms) * (2 if sizes.norm == "rms" else 1) + sizes.hidden * norms
        inner += sizes.intermediate * (2 if sizes.gated_mlp else 1)
    if sizes.experts:
        inner *= sizes.experts_per_token
    low_rank = r * sum(layer.per_block for layer in adapted or sizes.linears)
    return stream + attention + inner + low_rank


def kept_bytes(sizes: ModelSizes, settings: StepSettings) -> int:
    """Bytes that one decoder layer keeps for its backward pass, a token."""
    fast = settings.fast_adapters and not settings.dora
    adapted = settings.adapted_layers(sizes)
    values = kept_values(sizes, compiled=settings.compiled and fast, r=settings.r, adapted=adapted)
    return settings.value_bytes * values + kept_by_adapters(sizes, settings)


def kept_by_adapters(sizes: ModelSizes, settings: StepSettings) -> int:
    """Bytes a token that one layer's adapters keep beyond what fast ones without dropout do, counted on a CPU.

    (`test_kept_values`.) DoRA: inputs in 32 bits, outputs in 32 and in part in 16. The plain step: most inputs once more, cast.
    Dropout: masks of a byte a value and, where layers are not compiled, what they leave; where peft drops, in 32 bits. Inputs
    that are in 32 bits anyway are kept once.
    """
    layers = settings.adapted_layers(sizes)
    inputs = sum(layer.in_features * layer.per_block for layer in layers)
    outputs = sum(layer.out_features * layer.per_block for layer in layers)
    if settings.dora:
        without = 8 * outputs if settings.value_bytes == SINGLE else SINGLE * inputs + 5 * outputs
        return without + settings.dropout * (SINGLE * inputs + 2 * outputs)
    if not settings.fast_adapters:
        return 3 * inputs // 2 + settings.dropout * SINGLE * inputs
    if not settings.dropout:
        return 0
    return 5 * inputs // 4 if settings.compiled else (1 + settings.value_bytes) * inputs
