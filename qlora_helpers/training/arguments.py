"""Translates the run's settings into `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import fields

import torch
from transformers import TrainingArguments

from qlora_helpers.base.config import TrainConfig
from qlora_helpers.model.wiring import base_model_of
from qlora_helpers.runs.folder import Run


def training_arguments(
    config: TrainConfig, run: Run, *, on_cpu: bool, half: torch.dtype | None, fast: bool = False
) -> TrainingArguments:
    """Translates our settings into `TrainingArguments`, for transformers 5.17 to 5.23.

    Args:
        config: the run's training settings.
        run: where checkpoints go.
        on_cpu: whether to use no GPU.
        half: bfloat16 or float16 for autocast over float32 adapters, or None.
        fast: whether the fast step is on, which does activation checkpointing itself and needs no autocast in bfloat16.
    """
    recompute = config.activation_checkpointing and not fast
    fused = fast and not on_cpu and config.optim == "adamw_torch"
    names = {item.name for item in fields(TrainingArguments)}
    checkpointing = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in names)
    return TrainingArguments(
        output_dir=str(run.checkpoints_dir),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused" if fused else config.optim,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # its default logs a NaN loss as 0.0 and goes on
        eval_strategy="steps" if config.eval_steps else "epoch",
        eval_steps=config.eval_steps,
        save_strategy="steps" if config.save_steps else "epoch",
        save_steps=config.save_steps or 500,
        save_total_limit=None,  # Trainer would remove old ones before the new one is verified; `rotate` does it afterwards
        use_cpu=on_cpu,
        bf16=half == torch.bfloat16 and not fast,
        fp16=half == torch.float16,
        seed=config.seed,
        data_seed=config.seed,
        remove_unused_columns=False,
        report_to="none",
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
        accelerator_config={"non_blocking": not on_cpu},
        **{
            checkpointing: recompute,
            f"{checkpointing}_kwargs": {"use_reentrant": False} if recompute else None,
        },
    )


def half_of(model: torch.nn.Module) -> torch.dtype | None:
    """Returns the 16-bit type that a model computes in, or None."""
    dtype = base_model_of(model).dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None
