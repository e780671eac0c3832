"""The settings that a training step's memory and time depend on, and what a decoder layer then keeps for its backward pass.

Arithmetic alone, no torch. Knows nothing of cards, of the rest of a step's bytes, or how settings are chosen.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from qlora_helpers.base.config import RunConfig, TrainConfig
from qlora_helpers.model.shapes.decoder import LinearLayer, ModelSizes
from qlora_helpers.model.shapes.expert_targets import refuse_on_experts
from qlora_helpers.model.shapes.families import adapter_targets, packing_refusal
from qlora_helpers.model.shapes.sizes import adapted_stacks, adapter_parameters, model_sizes

HALF, SINGLE = 2, 4  # bytes of a 16-bit and of a 32-bit value
SUMMARY_SHARE = 0.2  # of a row's tokens, before they are counted: a summary is about a fifth of its row


@dataclass(frozen=True)
class StepSettings:
    """The settings of one step that its memory and time depend on.

    Attributes:
        seq_len_tokens: length of a packed sequence, or of a padded row.
        micro_batch_size: sequences in one forward pass, on each GPU.
        checkpointed: decoder layers with activation checkpointing.
        compiled: whether decoder layers are compiled.
        captured: whether passes are captured and replayed as CUDA graphs.
        r: rank of the adapters.
        adapter_parameters: trainable weights in all.
        on_experts: those of them that are on a mixture's experts.
        optim: optimizer, as in `TrainConfig.optim`.
        trained_share: share of the tokens that count in the loss.
        quantized, double_quantization: 4-bit storage, and 8-bit constants of it.
        offloaded: whether the input embedding is in the host's memory; one that is the output layer too stays.
        inputs_on_host: whether the inputs of checkpointed layers wait in the host's memory.
        chunked_loss: whether logits exist a chunk at a time; else those of all trained tokens at once.
        dropout: whether the adapters have dropout: the mask of each input and what it lets through are kept.
        dora: whether the adapters have magnitudes (DoRA): peft computes them, in float32.
        within_rows: whether attention is computed within packed rows by a kernel; else under a mask, which holds capped scores.
        fast_adapters: whether adapters compute in the model's type at once; else they are peft's, under autocast.
        value_bytes: of a value that the model computes with.
        adapted: names of the linear layers that get an adapter; None for all.
        skipped: whether checkpointed layers skip matrix multiplications whose output nothing in them reads. The fast step does so
            except in float16, which trains under autocast.
        fp8: whether frozen 4-bit weights are multiplied in FP8.
        copies: of the whole model, whose gradients are averaged: DDP keeps what it sends beside them.
        shards: GPUs that hold a part of every layer of one copy, and gather the rest when they compute it (FSDP2).
    """

    seq_len_tokens: int
    micro_batch_size: int
    checkpointed: int
    compiled: bool
    r: int
    adapter_parameters: int
    on_experts: int = 0
    optim: str = "adamw_torch"
    trained_share: float = 0.2
    quantized: bool = True
    double_quantization: bool = True
    offloaded: bool = False
    inputs_on_host: bool = False
    chunked_loss: bool = True
    dropout: bool = False
    dora: bool = False
    within_rows: bool = True
    fast_adapters: bool = True
    value_bytes: int = HALF
    adapted: frozenset[str] | None = None
    captured: bool = False
    skipped: bool = True
    fp8: bool = False
    copies: int = 1
    shards: int = 1

    @property
    def tokens(self) -> int:
        """Tokens in one forward pass."""
        return self.micro_batch_size * self.seq_len_tokens

    def adapted_layers(self, sizes: ModelSizes) -> tuple[LinearLayer, ...]:
        """The linear layers of a decoder layer that get an adapter; all of them where none of the names is theirs."""
        return tuple(layer for layer in sizes.linears if self.adapted and layer.name in self.adapted) or sizes.linears


def step_settings(
    config: RunConfig,
    shape: dict[str, Any],
    *,
    micro_batch_size: int,
    checkpointed: int = 0,
    compiled: bool = True,
    captured: bool = False,
    trained_share: float,
) -> StepSettings:
    """Returns what memory and speed depend on in a run's settings.

    Args:
        config: of the run.
        shape: the model's `config.json`.
        micro_batch_size: sequences in one forward pass, on each GPU.
        checkpointed, compiled: of the decoder layers.
        captured: whether passes are replayed as CUDA graphs.
        trained_share: share of the tokens that count in the loss.

    Raises:
        ModelError: the shape lacks a size, or a target layer is unknown.
    """
    adapter, named = config.adapter, config.adapter.target_modules
    sizes = model_sizes(shape)
    stacks = adapted_stacks(sizes, named)
    if stacks:
        refuse_on_experts(adapter)
    on_experts = sizes.layers * sum(each.per_layer * (each.in_features + each.out_features) for each in stacks)
    return StepSettings(
        seq_len_tokens=config.data.seq_len_tokens,
        micro_batch_size=micro_batch_size,
        checkpointed=checkpointed,
        compiled=compiled,
        r=adapter.r,
        adapter_parameters=adapter_parameters(shape, adapter.r, named, adapter.use_dora),
        on_experts=round(adapter.r * on_experts),
        optim=config.train.optim,
        trained_share=trained_share,
        quantized=config.model.quantization == "nf4",
        double_quantization=config.model.double_quantization,
        offloaded=config.train.offload_embeddings and config.train.fast_step,
        inputs_on_host=config.train.offload_checkpoints and config.train.fast_step,
        chunked_loss=config.train.fast_step,
        dropout=adapter.lora_dropout > 0,
        dora=adapter.use_dora,
        within_rows=config.train.fast_step and is_packed(config, shape),
        fast_adapters=config.train.fast_step,
        value_bytes=SINGLE if config.model.compute_dtype == "float32" else HALF,
        adapted=frozenset(n.rpartition(".")[2] for n in named or adapter_targets(shape) or ()) or None,
        captured=captured,
        skipped=config.model.compute_dtype != "float16",
    )


def sequences_per_step(train: TrainConfig) -> int:
    """Counts the sequences that an optimizer step learns from: the settings ask for them, however they are shared out."""
    return train.micro_batch_size * train.gradient_accumulation_steps


def is_packed(config: RunConfig, shape: dict[str, Any]) -> bool:
    """Whether rows will be packed: asked for, and the model's `config.json` says nothing against it."""
    return config.data.packing and packing_refusal(shape, config.data.seq_len_tokens) is None


def may_capture(train: TrainConfig, packed: bool, dropout: bool) -> bool:
    """Whether passes may be captured as CUDA graphs on one GPU: all have one shape and nothing in them is random.

    Args:
        train: training settings.
        packed: whether rows are packed.
        dropout: whether some values are dropped.
    """
    return train.fast_step and train.cuda_graph and packed and not dropout


def kept_values(sizes: ModelSizes, *, compiled: bool, r: int, adapted: tuple[LinearLayer, ...] | None = None) -> float:
    """Counts the values a token that one decoder layer keeps for its backward pass, with fast adapters and no dropout.

    Compiled, it keeps what no pointwise kernel can recompute: the layer's input, the residual between attention and MLP, queries,
    keys, values and the attention's output, the MLP's inner values before their non-linearity, and the output of each adapter's
    first matrix; experts keep more (`kept_by_experts`). Uncompiled, it also keeps the output of each norm, an RMS norm's input in
    float32, the non-linearity's output, and the product of a gated MLP's two branches.
    """
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    residuals = 1 if sizes.parallel_attention else 2
    norms = sizes.norms_per_layer
    extra_norms = max(0, norms - 2)  # Gemma's norms after attention and MLP keep inputs of their own
    stream = sizes.hidden * max(residuals, 1 + extra_norms)  # the residual is their input and what came before
    attention: float = 2 * queries + 2 * keys + 2 * sizes.heads  # the last: the softmax's sums, in float32
    if sizes.mixer_values is not None:
        attention = sizes.mixer_values if has_kernels(sizes) else sizes.mixer_without_kernels or sizes.mixer_values
    if sizes.qk_norm:
        attention += queries + keys
    inner = (sizes.inner - sizes.inner_of_experts) * (2 if sizes.gated_mlp else 1)
    if not compiled:
        stream = sizes.hidden * (residuals + extra_norms) * (2 if sizes.norm == "rms" else 1) + sizes.hidden * norms
        inner *= 2
    inner += kept_by_experts(sizes)
    low_rank = r * sum(layer.per_layer for layer in adapted or sizes.linears)
    return stream + attention + inner + low_rank


def has_kernels(sizes: ModelSizes) -> bool:
    """Whether the kernels of a model's recurrent layers are installed here; without, transformers takes PyTorch's operations."""
    return all(importlib.util.find_spec(package) is not None for package in sizes.mixer_packages)


def kept_by_experts(sizes: ModelSizes) -> float:
    """Counts the values a token that the experts of one layer keep, compiled or not: their code is launched as it is.

    Inner values, each expert's output, which waits for the gradient of its router weight, the router's scores in float32, and the
    places of tokens as integers of 8 bytes.
    """
    if not sizes.experts:
        return 0.0
    chosen = sizes.experts_per_token
    return sizes.inner_of_experts * sizes.expert_kept + sizes.hidden * chosen + 2 * sizes.experts + 16 * chosen


def kept_scores(sizes: ModelSizes, settings: StepSettings, *, compiled: bool) -> float:
    """Counts the attention scores a token that one layer keeps: none with a kernel, else one for each head and token of the block.

    Only soft-caps are computed without one, on the plain path and for padded rows.

    Compiled, the probabilities are kept in the model's type; else those in float32 and what is before the tanh too.
    """
    if sizes.attention_softcap is None or settings.within_rows:
        return 0.0
    return sizes.heads * settings.seq_len_tokens * (1 if compiled else 4)


def kept_bytes(sizes: ModelSizes, settings: StepSettings) -> float:
    """Counts the bytes a token that one decoder layer keeps for its backward pass."""
    fast = settings.fast_adapters and not settings.dora
    adapted = settings.adapted_layers(sizes)
    values = kept_scores(sizes, settings, compiled=settings.compiled and fast) + kept_values(
        sizes, compiled=settings.compiled and fast, r=settings.r, adapted=adapted
    )
    if settings.on_experts:  # what an expert's weights are multiplied with, for the gradients of their adapters
        values += sizes.hidden * sizes.experts_per_token + sizes.inner_of_experts
    return settings.value_bytes * values + kept_by_adapters(sizes, settings)


def kept_by_adapters(sizes: ModelSizes, settings: StepSettings) -> float:
    """Counts the bytes a token that one layer's adapters keep beyond fast ones without dropout.

    Counted on a CPU (`test_kept_values`). DoRA keeps inputs in float32, and outputs in float32 and in part in bfloat16. The plain
    step keeps most inputs a second time, cast. Dropout keeps masks of a byte a value and, where layers are not compiled, what they
    let through; peft's dropout keeps that in float32. Inputs that are in float32 anyway are kept once.
    """
    layers = settings.adapted_layers(sizes)
    inputs = sum(layer.in_features * layer.per_layer for layer in layers)
    outputs = sum(layer.out_features * layer.per_layer for layer in layers)
    if settings.dora:
        without = 8 * outputs if settings.value_bytes == SINGLE else SINGLE * inputs + 5 * outputs
        return without + settings.dropout * (SINGLE * inputs + 2 * outputs)
    if not settings.fast_adapters:
        return 1.5 * inputs + settings.dropout * SINGLE * inputs
    if not settings.dropout:
        return 0
    return 1.25 * inputs if settings.compiled else (1 + settings.value_bytes) * inputs
