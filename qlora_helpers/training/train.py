"""A model with adapters and labelled blocks -> a trained adapter, through `transformers.Trainer`.

The fast step (`fast_step`) is opened around a session where the settings ask for it; without it this is the plain reference path.
Knows nothing of where model and data came from, and leaves the run's state to `workflow`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from qlora_helpers.base.config import TrainConfig
from qlora_helpers.base.units import gib
from qlora_helpers.data.packing import NumberedSequences, PreparedData
from qlora_helpers.model.host_embedding import brought_back
from qlora_helpers.model.wiring import base_model_of
from qlora_helpers.runs import sigterm
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.status import stopped_by
from qlora_helpers.training import checkpoints as saved
from qlora_helpers.training.callback import RunFolderCallback
from qlora_helpers.training.probes import check_block_diagonal
from qlora_helpers.training.step import make_collator, open_fast_step
from qlora_helpers.training.trainer import SummaryTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How a session of training ended.

    Attributes:
        steps: optimizer steps done in all sessions.
        new_steps: those of this session.
        loss, eval_loss: the last logged ones; per trained token, in nats.
        seconds: of this session's training.
        tokens_per_s: tokens that are not padding, of this session.
        peak_gib: most memory held by tensors on each GPU while training; on a CPU the process's peak.
        reserved_gib: the most that PyTorch took from each GPU for that; empty on a CPU.
        stopped: whether a person, the budget or SIGTERM stopped it before the end, and `stop_reason` why.
        machine: what it ran on: the GPUs' names, or `CPU`.
        compiled, checkpointed: whether decoder layers were compiled, and how many recomputed their activations.
        captured: whether passes were played from CUDA graphs.
        fast_step: what of the fast step was on, a line each; empty on the plain path.
    """

    steps: int
    new_steps: int
    loss: float | None
    eval_loss: float | None
    seconds: float
    tokens_per_s: float
    peak_gib: dict[str, float]
    stopped: bool
    machine: str
    reserved_gib: dict[str, float] = field(default_factory=dict)
    compiled: bool = False
    captured: bool = False
    checkpointed: int = 0
    fast_step: str = ""
    stop_reason: str = ""

    def __repr__(self) -> str:
        if self.new_steps == 0:
            return f"nothing left to do: all {self.steps} steps were done before"
        peak = ", ".join(f"{value:.2f} GiB on {name}" for name, value in self.peak_gib.items())
        end = f"stopped {stopped_by(self.stop_reason)}" if self.stopped else "finished"
        losses = f"loss {self.loss:.3f}" if self.loss is not None else "no loss logged"
        losses += f", evaluation loss {self.eval_loss:.3f}" if self.eval_loss is not None else ""
        return f"{end} after {self.steps} steps: {losses}\n{self.tokens_per_s:,.0f} tokens/s, peak {peak}"


def training_arguments(
    config: TrainConfig, run: Run, *, on_cpu: bool, half: torch.dtype | None, fast: bool = False
) -> TrainingArguments:
    """Our settings in `TrainingArguments`' words, for transformers 5.17 to 5.23.

    Args:
        config: the run's training settings.
        run: where checkpoints go.
        on_cpu: don't touch a GPU.
        half: bfloat16 or float16 for autocast over float32 adapters, or None.
        fast: the fast step is on: it recomputes activations itself, needs no autocast in bfloat16, and the host never waits.
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
        save_total_limit=None,  # Trainer removes old ones before the new one is verified; we rotate after
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


def train(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    config: TrainConfig,
    run: Run,
    *,
    extra_callbacks: tuple[TrainerCallback, ...] = (),
    show_progress: bool = True,
    trained_on: dict[str, Any] | None = None,
) -> TrainResult:
    """Trains the adapters, from the newest good checkpoint in the run folder where there is one.

    Where that is of the last step already, its adapter is loaded and nothing is trained.

    Args:
        model: a peft model.
        tokenizer: the model's.
        data: prepared blocks.
        config: training settings.
        run: where progress and checkpoints go.
        extra_callbacks: such as TensorBoard's.
        show_progress: whether Trainer draws its bar or table.
        trained_on: what can't change in later sessions, in plain values; kept in every checkpoint.

    Raises:
        ModelError: packed rows would see each other.
        RunError: a loss or gradient is no longer finite, or a checkpoint can't be written.
    """
    brought_back(model.get_input_embeddings())  # where a session that ran out of memory left it on the host
    device = model.get_input_embeddings().weight.device
    on_cpu = device.type == "cpu"
    with contextlib.ExitStack() as opened:
        fast = None
        if config.fast_step:
            fast = opened.enter_context(open_fast_step(model, tokenizer, data, config))
            log.info("fast step:\n%s", fast)
        one_shape = fast is not None and (fast.compiled or fast.recording)
        collator = make_collator(
            model, tokenizer, data, fast=fast, sequences=config.micro_batch_size if one_shape else None
        )
        if data.packed and fast is None:
            check_block_diagonal(model, collator)
        half = None if on_cpu else half_of(model)
        args = training_arguments(config, run, on_cpu=on_cpu, half=half, fast=fast is not None)
        args.disable_tqdm = not show_progress
        if args.n_gpu > 1:  # with several GPUs and one process Trainer would wrap the model in DataParallel
            args._n_gpu = 1
        trainer = SummaryTrainer(
            model=model,
            args=args,
            train_dataset=NumberedSequences(data.train),
            eval_dataset=data.eval,
            data_collator=collator,
        )
        trainer.fast, trainer.trained_on = fast, trained_on
        opened.enter_context(_adapters_kept(model))
        if not show_progress:
            trainer.remove_callback(PrinterCallback)  # what it prints is in the progress file and the log
        return _run_session(trainer, model, config, run, extra_callbacks)


@contextlib.contextmanager
def _adapters_kept(model: torch.nn.Module) -> Iterator[None]:
    """A session that fails leaves the adapters as it found them and no gradients: the run can go on, or begin, in this process."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    before = [weight.detach().cpu().clone() for weight in trained]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for weight, kept in zip(trained, before, strict=True):
                weight.grad = None
                weight.copy_(kept)
        raise


class _Resumed(TrainerCallback):
    """Between Trainer's own start, which forgets the loss summed since the last log, and the first step."""

    def __init__(self, trainer: SummaryTrainer, checkpoint: Path) -> None:
        self.go_on = lambda: trainer.go_on_summing(checkpoint)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.go_on()


def _run_session(
    trainer: SummaryTrainer, model: torch.nn.Module, config: TrainConfig, run: Run, extra: tuple[TrainerCallback, ...]
) -> TrainResult:
    resume = saved.newest_good(run.checkpoints_dir)
    if resume:
        saved.refuse_code(resume)
    is_writer = trainer.is_world_process_zero()
    total = planned_steps(trainer)
    start = saved.step_of(resume) if resume else 0
    session = run.start_session(total, start) if is_writer else 0
    callback = RunFolderCallback(run, config, session, is_writer)
    callbacks = (_Resumed(trainer, resume), callback, *extra) if resume else (callback, *extra)
    for each in callbacks:
        if hasattr(each, "trainer"):  # it reads the trainer's own counts
            each.trainer = trainer
        trainer.add_callback(each)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    started = time.monotonic()
    try:
        if resume and start >= total:  # Trainer would do one step more
            trainer.state = saved.load_finished(model, resume)
        else:
            with sigterm.steps():
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        # Trainer leaves its autocast around `forward`; the model should answer as the same adapter does when reloaded.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    seconds = time.monotonic() - started
    losses = {key: item[key] for item in trainer.state.log_history for key in ("loss", "eval_loss") if key in item}
    tokens = int(trainer.tokens_seen) * trainer.accelerator.num_processes
    return TrainResult(
        trainer.state.global_step,
        trainer.state.global_step - start,
        losses.get("loss"),
        losses.get("eval_loss"),
        seconds,
        tokens / max(1e-9, seconds),
        peak_memory(),
        callback.stopped,
        machine_name(model.get_input_embeddings().weight.device),
        reserved_memory(),
        compiled=trainer.fast.compiled if trainer.fast else False,
        captured=bool(trainer.fast and trainer.fast.graphs and trainer.fast.graphs.replayed),
        checkpointed=trainer.fast.checkpointed if trainer.fast else 0,
        fast_step=repr(trainer.fast) if trainer.fast else "",
        stop_reason=callback.stop_reason,
    )


def planned_steps(trainer: Trainer) -> int:
    """Optimizer steps of a whole run."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    batches = len(trainer.get_train_dataloader())
    per_epoch = max(1, math.ceil(batches / trainer.args.gradient_accumulation_steps))
    return math.ceil(trainer.args.num_train_epochs * per_epoch)


def half_of(model: torch.nn.Module) -> torch.dtype | None:
    """The 16-bit type a model computes in, or None."""
    dtype = base_model_of(model).dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def machine_name(device: torch.device) -> str:
    """What a model on this device runs on: `CPU`, or the GPUs' names, such as `2 x NVIDIA L4`."""
    if device.type == "cpu":
        return "CPU"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return " + ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def reserved_memory() -> dict[str, float]:
    """The most that PyTorch reserved on each GPU, GiB; empty on a CPU."""
    if not torch.cuda.is_available():
        return {}
    gpus = range(torch.cuda.device_count())
    return {f"cuda:{index}": gib(torch.cuda.max_memory_reserved(index)) for index in gpus}


def peak_memory() -> dict[str, float]:
    """Most memory held since the count was last reset: tensors on each GPU, GiB; on a CPU the process's peak."""
    if torch.cuda.is_available():
        return {
            f"cuda:{index}": gib(torch.cuda.max_memory_allocated(index)) for index in range(torch.cuda.device_count())
        }
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return {"cpu": gib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
