"""Settings of the training."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_helpers.base.config.option import option

TRACKERS = ("wandb", "mlflow", "trackio")
"""What `train.report_to` may name."""


@dataclass(frozen=True)
class TrainConfig:
    """How the adapters are trained; the defaults are the 2023 recipe's."""

    epochs: float = option(1.0, "How often training goes through all rows.", low=0.001, high=1000)
    max_steps: int | None = option(None, "Stop after this many optimizer steps, whatever epochs says.", low=1)
    micro_batch_size: int = option(8, "Packed sequences (or padded rows) in one forward pass of each process.", low=1)
    gradient_accumulation_steps: int = option(
        1, "Forward passes whose gradients are added up for one optimizer step.", low=1
    )
    learning_rate: float = option(2e-4, "Peak learning rate of the adapters.", low=1e-8, high=1.0)
    lr_scheduler_type: str = option(
        "linear", "How the learning rate changes after the warm-up.", choices=("linear", "cosine", "constant")
    )
    warmup_steps: int = option(0, "Optimizer steps in which the learning rate rises from zero.", low=0)
    weight_decay: float = option(0.0, "Weight decay of the adapters (AdamW).", low=0, high=1)
    max_grad_norm: float = option(1.0, "Scale the gradients down to this norm where they exceed it.", low=0.001)
    optim: str = option(
        "adamw_torch",
        "Optimizer; the 8-bit ones save GPU memory.",
        choices=("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    )
    activation_checkpointing: bool = option(
        True, "Recompute activations in the backward pass: a step takes up to half as long again, and far less memory."
    )
    checkpointed_layers: int | None = option(
        None,
        "Number of decoder layers with activation checkpointing, if that is on; none takes as few as fit in memory, else all.",
        low=0,
    )
    fast_step: bool = option(
        True,
        "Take fast training steps: block-diagonal attention without a mask, the loss in chunks, adapters in the model's data type.",
    )
    compile: str = option(
        "auto",
        "Compile each decoder layer (CUDA only): auto does so if the run is long enough to win the time back.",
        choices=("auto", "on", "off"),
    )
    cuda_graph: bool = option(
        True,
        "Capture forward and backward passes as CUDA graphs and replay them, for packed sequences on one GPU without dropout.",
    )
    matmul_dtype: str = option(
        "bfloat16",
        "Multiply frozen 4-bit weights in bfloat16, or in FP8 (Ada, Hopper and newer): auto takes FP8 where it was measured and is "
        "faster.",
        choices=("bfloat16", "fp8", "auto"),
    )
    offload_embeddings: bool = option(
        False,
        "Keep the input embedding in CPU memory, which frees its bytes on the GPU; each forward pass copies the rows it needs.",
    )
    offload_checkpoints: bool = option(
        False,
        "Keep the inputs of layers with activation checkpointing in CPU memory until the backward pass: longer batches fit on a "
        "small card, and copies go on beside the computation.",
    )
    share: str = option(
        "auto",
        "How several GPUs work together: copies (each has the whole 4-bit model and its own rows), shards (each holds a part of "
        "every layer and gathers the others' parts when it computes that layer), copies of shards (shards within a machine, "
        "copies between machines), spread (the layers lie one after another on the GPUs), or one (a single GPU). auto: as "
        "the plan finds fastest on the free GPUs; processes whose number is given hold copies.",
        choices=("auto", "one", "copies", "shards", "copies of shards", "spread"),
    )
    logging_steps: int = option(2, "Write a line of progress every so many optimizer steps.", low=1)
    eval_steps: int | None = option(
        None, "Compute the evaluation loss every so many optimizer steps; none does it after each epoch.", low=1
    )
    save_steps: int | None = option(
        None, "Save a checkpoint every so many optimizer steps; none does it after each epoch.", low=1
    )
    checkpoints_kept: int = option(2, "How many verified checkpoints are kept.", low=1, high=100)
    stop_at_usd: float | None = option(
        None, "Save and stop once all sessions of the run together have cost this much, USD.", low=0.0001
    )
    stop_at_minutes: float | None = option(
        None, "Save and stop this many minutes after the session began, loading included.", low=0.001
    )
    patience: int | None = option(
        None, "Save and stop after this many evaluations in a row without a lower evaluation loss.", low=1
    )
    usd_per_hour: float | None = option(
        None,
        "Price of this machine, USD an hour; none takes the catalogue's price on SageMaker, and no price elsewhere.",
        low=0,
    )
    tensorboard: str = option(
        "local", "Where TensorBoard events go: local (the run's folder), an s3://bucket/prefix, or off."
    )
    report_to: tuple[str, ...] | None = option(
        None,
        "Hand the figures to these trackers, too, if they are installed: wandb, mlflow, trackio; how is their own configuration.",
    )
    seed: int = option(42, "Random seed of the adapters, the order of the rows and the dropout.", low=0, high=2**32 - 1)
