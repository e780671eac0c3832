"""How a training step is done: the batches that fit a model, the fast step around it, and the choices that settings leave open.

Works on a loaded model with adapters and prepared data; knows nothing of `Trainer`, runs or files.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qlora_helpers.base.config import TrainConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.units import gib
from qlora_helpers.data import batches
from qlora_helpers.data.batches import SequenceCollator, most_rows, most_trained
from qlora_helpers.data.packing import PreparedData
from qlora_helpers.machine.hardware import find_gpu
from qlora_helpers.model.expert_adapters import weights_on_experts
from qlora_helpers.model.shapes.families import has_dropout
from qlora_helpers.model.shapes.sizes import ModelSizes, model_sizes
from qlora_helpers.model.sharding import bytes_elsewhere, is_sharded
from qlora_helpers.model.wiring import base_model_of, is_spread, takes_logits_to_keep
from qlora_helpers.planning.as_given import compiled_and_checkpointed
from qlora_helpers.planning.fp8 import fp8_refusal
from qlora_helpers.planning.memory import CONTEXT_BYTES, MEMORY_MARGIN
from qlora_helpers.planning.speed import UNNAMED_GPU
from qlora_helpers.planning.step_settings import StepSettings, may_capture
from qlora_helpers.training.fast_step.parts import FastStep, fast_step
from qlora_helpers.training.fp8_proof import prove_fp8
from qlora_helpers.training.probes import check_same_losses, probe_losses
from qlora_helpers.training.processes import values_of_all
from qlora_helpers.training.proving import values_rounded_anew
from qlora_helpers.training.row_isolation import check_isolation, has_state, plain_attention

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def make_collator(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    *,
    fast: FastStep | None = None,
    sequences: int | None = None,
) -> SequenceCollator:
    """Makes the collator that fits a model and prepared data.

    Args:
        model: with or without adapters.
        tokenizer: the model's.
        data: prepared data.
        fast: the parts of the fast step that are on; None takes the plain path.
        sequences: how many sequences every batch is filled up to; None fills none.
    """
    targets: batches.Targets = batches.KeptLogits(as_list=is_spread(model))
    if fast and fast.loss is not None:
        targets = batches.TrainedTokens(most_trained(data.train, sequences) if sequences and fast.capturing else None)
    elif not takes_logits_to_keep(model):
        targets = batches.AllLogits()
    return SequenceCollator(
        tokenizer.pad_token_id,
        _attention_for(model, data, fast),
        targets,
        length=data.seq_len_tokens if data.packed else None,
        sequences=sequences if data.packed else None,
        host_tokens=fast is not None and fast.offloaded is not None,
    )


def _attention_for(model: torch.nn.Module, data: PreparedData, fast: FastStep | None) -> batches.Attention:
    if not data.packed:
        return batches.PaddingMask()
    if fast and fast.block_diagonal:
        return batches.RowBounds(most_rows(data.train, data.eval), has_state(base_model_of(model)))
    return plain_attention(model, data.seq_len_tokens)


def open_fast_step(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, data: PreparedData, config: TrainConfig
) -> contextlib.AbstractContextManager[FastStep]:
    """Opens the fast step as the settings ask for it, and proves it on the loaded model before training."""
    longest = data.seq_len_tokens if data.packed else max(map(len, data.train["input_ids"]))
    plainly = make_collator(model, tokenizer, data)
    plain = probe_losses(model, plainly, None)
    with values_rounded_anew(base_model_of(model)):
        rounded = probe_losses(model, plainly, None)

    def check(on: FastStep) -> None:
        collator = make_collator(model, tokenizer, data, fast=on)
        if data.packed:
            check_isolation(model, collator, longest=longest)
        check_same_losses(probe_losses(model, collator, on.loss), plain, rounded)
        _check_fp8(on, model, data, collator, config, no_fp8)

    compiled, checkpointed, no_fp8 = _choose(model, data, config, longest)
    return fast_step(
        model,
        packed=data.packed,
        longest=longest,
        compiled=compiled,
        checkpointed=checkpointed,
        captured=config.cuda_graph,
        accumulation=config.gradient_accumulation_steps,
        offload_embeddings=config.offload_embeddings,
        offload_checkpoints=config.offload_checkpoints,
        fp8=no_fp8 is None,
        check=check,
    )


def _check_fp8(
    on: FastStep,
    model: torch.nn.Module,
    data: PreparedData,
    collator: SequenceCollator,
    config: TrainConfig,
    no_fp8: str | None,
) -> None:
    """Proves FP8 on the loaded model. Where it is refused, `auto` takes bfloat16 and notes why.

    Raises:
        ModelError: FP8 was asked for and is refused.
    """
    if on.fp8:
        random = has_dropout(model.config.get_text_config().to_dict())
        dropout = random or model.active_peft_config.lora_dropout > 0
        proof = prove_fp8(model, on.fp8, data.train[0], collator, dropout=dropout)
        on.fp8.refusal, on.fp8.proof = proof.refusal, str(proof)
        log.info("%s", proof)
    elif no_fp8 is not None and config.matmul_dtype == "auto" and next(model.parameters()).is_cuda:
        on.reasons.append(no_fp8)
    if config.matmul_dtype == "fp8" and not on.is_on("fp8"):
        raise ModelError(
            "frozen weights can't be multiplied in FP8 with this model on this machine",
            got=next((reason for reason in on.why_off if reason.startswith("no FP8")), no_fp8 or ""),
            next_step="Set train.matmul_dtype=bfloat16, or auto.",
        )


def _choose(
    model: torch.nn.Module, data: PreparedData, config: TrainConfig, longest: int
) -> tuple[bool, int | None, str | None]:
    """Decides whether to compile, how many layers get activation checkpointing (None means all), and why there is no FP8, if so.

    The plan decides for one GPU. On a CPU, over several GPUs and for an architecture that can't be planned, the settings do.
    """
    no_fp8 = None if config.matmul_dtype == "fp8" else "no FP8: it is planned for one GPU"
    as_set = config.compile == "on", config.checkpointed_layers if config.activation_checkpointing else 0, no_fp8
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        return as_set
    try:
        sizes = model_sizes(model.config.to_dict())
    except ModelError as error:
        log.warning("the step is not planned: %s", error)
        return as_set
    step = _settings_of(model, data, config, longest, sizes)
    (device,) = devices
    gpu = find_gpu(torch.cuda.get_device_name(device)) or UNNAMED_GPU
    if config.matmul_dtype != "fp8":  # which is tried on any card
        no_fp8 = fp8_refusal(config, sizes, step, gpu)
    step = replace(step, fp8=no_fp8 is None and gpu.fp8_tflops > 0)
    usable = gib(usable_bytes(device) + bytes_elsewhere(model) + CONTEXT_BYTES)
    passes = _passes(data, config)
    compiled, checkpointed = compiled_and_checkpointed(
        config, sizes, step, gpu, usable, passes=passes, packed=data.packed
    )
    all_ranks = values_of_all(
        (compiled, checkpointed)
    )  # cards may differ in what is free; layers are compiled in all or none
    return all(each for each, _ in all_ranks), max(each for _, each in all_ranks), no_fp8


def _settings_of(
    model: torch.nn.Module, data: PreparedData, config: TrainConfig, longest: int, sizes: ModelSizes
) -> StepSettings:
    """Describes a step of a loaded model to the plan, uncompiled and without activation checkpointing."""
    copies, lora = int(os.environ.get("WORLD_SIZE", 1)), model.active_peft_config
    dropout = lora.lora_dropout > 0 or has_dropout(model.config.get_text_config().to_dict())
    quantization = model.config.quantization_config if getattr(model, "is_loaded_in_4bit", False) else None
    step = StepSettings(
        seq_len_tokens=longest,
        micro_batch_size=config.micro_batch_size,
        checkpointed=0,
        compiled=False,
        r=lora.r,
        optim=config.optim,
        adapter_parameters=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        on_experts=weights_on_experts(model),
        trained_share=data.report.trained_tokens / data.report.tokens,
        quantized=quantization is not None,
        double_quantization=getattr(quantization, "bnb_4bit_use_double_quant", False),
        offloaded=config.offload_embeddings,
        inputs_on_host=config.offload_checkpoints,
        dropout=lora.lora_dropout > 0,
        dora=lora.use_dora,
        within_rows=data.packed,
        adapted=frozenset(name.rpartition(".")[2] for name in lora.target_modules),
        value_bytes=model.get_input_embeddings().weight.dtype.itemsize,
        skipped=model.dtype != torch.float16,
        captured=may_capture(config, data.packed, dropout) and model.dtype != torch.float16 and not is_sharded(model),
        copies=copies,
    )
    if not step.captured:
        return step
    # Every batch is then filled up to the most trained tokens of any.
    most = most_trained(data.train, config.micro_batch_size)
    return replace(step, trained_share=most / (config.micro_batch_size * longest))


def usable_bytes(device: torch.device) -> float:
    """Returns how many bytes PyTorch may reserve on a GPU: those free or ours already, less a margin, within the limit set."""
    free, total = torch.cuda.mem_get_info(device)  # without what other processes hold
    ours = free + torch.cuda.memory_reserved(device) - MEMORY_MARGIN * total
    limit = torch.cuda.get_per_process_memory_fraction(device) * total
    return min(ours, (1 - MEMORY_MARGIN) * limit)


def _passes(data: PreparedData, config: TrainConfig) -> int:
    """Returns how many forward passes the whole training has."""
    if config.max_steps:
        return config.max_steps * config.gradient_accumulation_steps
    return math.ceil(config.epochs * len(data.train) / config.micro_batch_size)
