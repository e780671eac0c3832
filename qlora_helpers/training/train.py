"""Trains the adapters of a model on prepared data, through `transformers.Trainer`.

A session runs inside the fast step (`fast_step`) where the settings ask for it; without it this is the plain reference path. Knows
nothing of where model and data came from, and leaves the run's state to `workflow`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback

from qlora_helpers.base.config import TrainConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.place import at
from qlora_helpers.data.packing import NumberedSequences, PreparedData
from qlora_helpers.model.host_embedding import restore_embedding
from qlora_helpers.model.tokenizers import refuse_tokens_without_row
from qlora_helpers.model.wiring import base_model_of, can_recompute
from qlora_helpers.runs import sigterm
from qlora_helpers.runs.folder import Run
from qlora_helpers.training import checkpoints as saved
from qlora_helpers.training.arguments import half_of, training_arguments
from qlora_helpers.training.averaging import copy_from_first, processes
from qlora_helpers.training.callback import RunFolderCallback
from qlora_helpers.training.checkpoint_trust import refuse_code
from qlora_helpers.training.fast_step.parts import FastStep
from qlora_helpers.training.global_batch import with_same_sequences
from qlora_helpers.training.processes import from_first
from qlora_helpers.training.result import TrainResult, machine_name, of_all_processes, peak_memory, reserved_memory
from qlora_helpers.training.row_isolation import check_isolation
from qlora_helpers.training.step import make_collator, open_fast_step
from qlora_helpers.training.trainer import SummaryTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


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
    """Trains the adapters, resuming from the newest good checkpoint in the run folder where there is one.

    Where that checkpoint is of the last step, its adapter is loaded and nothing is trained.

    Args:
        model: a peft model.
        tokenizer: the model's.
        data: prepared data.
        config: training settings.
        run: where progress and checkpoints go.
        extra_callbacks: further callbacks, such as TensorBoard's.
        show_progress: whether Trainer draws its bar or table.
        trained_on: plain values that can't change in later sessions; kept in every checkpoint.

    Raises:
        ModelError: a token has no row in the embedding, packed rows would attend to each other, or the fast step's losses differ
            from the plain path's; or no checkpoint can be gone on from and the adapters are not untrained.
        RunError: a loss or gradient is no longer finite, or a checkpoint can't be written.
    """
    for rows, what in ((data.train, "the training data"), (data.eval, "the evaluation data")):
        refuse_tokens_without_row(model, tokenizer, rows["input_ids"], what)
    restore_embedding(model.get_input_embeddings())  # where a session that ran out of memory left it on the host
    resume = _resumed_from(run)
    if resume is None and saved.all_checkpoints(run.checkpoints_dir):
        _refuse_trained_adapters(model)
    config = with_same_sequences(config, resume, processes())
    with contextlib.ExitStack() as opened:
        opened.enter_context(_loss_named(model))
        fast = None
        refuse_settings(config)
        if config.fast_step:
            fast = opened.enter_context(open_fast_step(model, tokenizer, data, config))
            log.info("fast step:\n%s", fast)
        trainer = _make_trainer(model, tokenizer, data, config, run, fast, show_progress=show_progress)
        trainer.trained_on = trained_on
        opened.enter_context(_adapters_restored_on_failure(model))
        return _run_session(trainer, model, config, run, resume, extra_callbacks)


def _resumed_from(run: Run) -> Path | None:
    """Returns the checkpoint that all processes go on from, which the first of them chooses; None where there is none.

    Raises:
        RunError: it holds something that is not to be trusted.
    """

    def name() -> str | None:
        found = saved.newest_good(run.checkpoints_dir)
        return None if found is None else found.name

    chosen = from_first(name)
    if chosen is None:
        return None
    refuse_code(run.checkpoints_dir / chosen)
    return run.checkpoints_dir / chosen


def _refuse_trained_adapters(model: torch.nn.Module) -> None:
    """Refuses to start anew from adapters that have learned something: B of an untrained one is zero.

    Raises:
        ModelError: as it says.
    """
    if any(bool(weight.any()) for name, weight in model.named_parameters() if "lora_B" in name):
        raise ModelError(
            "no checkpoint is healthy, so training starts anew, but the adapters in memory have been trained",
            next_step="Call it without a model, or load the model and add its adapters again.",
        )


def refuse_settings(config: TrainConfig) -> None:
    """Refuses settings that contradict each other; this needs no model, so it can be asked before one is loaded.

    Raises:
        ModelError: FP8 without the fast step.
    """
    if config.matmul_dtype == "fp8" and not config.fast_step:
        raise ModelError(
            "FP8 is a part of the fast step, which is off",
            next_step="Set train.fast_step=true, or train.matmul_dtype=bfloat16.",
        )


def _make_trainer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    config: TrainConfig,
    run: Run,
    fast: FastStep | None,
    *,
    show_progress: bool,
) -> SummaryTrainer:
    """The trainer with the collator and arguments that fit the step; without the fast step, packing is checked here."""
    one_shape = fast is not None and (fast.compiled or fast.capturing)
    collator = make_collator(
        model, tokenizer, data, fast=fast, sequences=config.micro_batch_size if one_shape else None
    )
    if data.packed and fast is None:
        check_isolation(model, collator, longest=data.seq_len_tokens)
    on_cpu = model.get_input_embeddings().weight.device.type == "cpu"
    half = None if on_cpu else half_of(model)
    if fast is None and config.activation_checkpointing and not can_recompute(model):
        log.warning("no activation checkpointing: transformers has none for %s", type(base_model_of(model)).__name__)
        config = replace(config, activation_checkpointing=False)
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
    trainer.fast = fast
    if not show_progress:
        trainer.remove_callback(PrinterCallback)  # what it prints is in the progress file and the log
    return trainer


@contextlib.contextmanager
def _loss_named(model: torch.nn.Module) -> Iterator[None]:
    """While open, errors of the model's own loss function say so; the fast step's loss takes its place and does the same."""
    inner = base_model_of(model)
    own = inner.loss_function
    inner.loss_function = at("loss")(own)
    try:
        yield
    finally:
        inner.loss_function = own


@contextlib.contextmanager
def _adapters_restored_on_failure(model: torch.nn.Module) -> Iterator[None]:
    """Restores the adapters and frees the gradients where a session fails, so that the run can continue in this process."""
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
    """Restores the loss summed since the last log, which Trainer's own start forgets."""

    def __init__(self, trainer: SummaryTrainer, checkpoint: Path) -> None:
        self.restore = lambda: trainer.restore_loss_sum(checkpoint)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()


def _run_session(
    trainer: SummaryTrainer,
    model: torch.nn.Module,
    config: TrainConfig,
    run: Run,
    resume: Path | None,
    extra: tuple[TrainerCallback, ...],
) -> TrainResult:
    is_writer = trainer.is_world_process_zero()
    total, start = planned_steps(trainer), saved.step_of(resume) if resume else 0
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
        if resume and start >= total:  # Trainer would do one more step
            trainer.state = saved.load_finished(model, resume)
        else:
            copy_from_first(weight for weight in model.parameters() if weight.requires_grad)
            with sigterm.deferred(), at(facts=lambda: _facts(trainer)):
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        # Trainer leaves its autocast around `forward`; the model should answer as the same adapter does when reloaded.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return _result(trainer, start, time.monotonic() - started, callback.stop_reason)


def _facts(trainer: SummaryTrainer) -> dict[str, Any]:
    """What an error for want of memory must know to say what would fit: see `planning.out_of_memory.Failure`."""
    fast = trainer.fast
    return {
        "step": trainer.state.global_step,
        "checkpointed": fast.checkpointed if fast else None,
        "compiled": fast.compiled if fast else False,
    }


def _result(trainer: SummaryTrainer, start: int, seconds: float, stop_reason: str) -> TrainResult:
    """How a session ended that began at step `start`."""
    fast, steps = trainer.fast, trainer.state.global_step
    losses = {key: item[key] for item in trainer.state.log_history for key in ("loss", "eval_loss") if key in item}
    tokens = int(trainer.tokens_seen) * trainer.accelerator.num_processes
    return TrainResult(
        steps=steps,
        new_steps=steps - start,
        loss=losses.get("loss"),
        eval_loss=losses.get("eval_loss"),
        seconds=seconds,
        tokens_per_s=tokens / max(1e-9, seconds),
        peak_gib=of_all_processes(peak_memory()),
        stopped=bool(stop_reason),
        machine=machine_name(trainer.model.get_input_embeddings().weight.device),
        reserved_gib=of_all_processes(reserved_memory()),
        compiled=fast.compiled if fast else False,
        fp8=fast is not None and fast.is_on("fp8"),
        captured=bool(fast and fast.graphs and fast.graphs.replayed),
        checkpointed=fast.checkpointed if fast else 0,
        fast_step=repr(fast) if fast else "",
        stop_reason=stop_reason,
    )


def planned_steps(trainer: Trainer) -> int:
    """Returns how many optimizer steps a whole run has."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    batches = len(trainer.get_train_dataloader())
    per_epoch = max(1, math.ceil(batches / trainer.args.gradient_accumulation_steps))
    return math.ceil(trainer.args.num_train_epochs * per_epoch)
