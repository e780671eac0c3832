"""A model with adapters and labelled blocks -> a trained adapter, through `transformers.Trainer`.

The reference path: plain and right. Its callback writes the run folder (progress, heartbeats, verified checkpoints) and hears the
requests of people. Knows nothing of where model and data came from, and leaves the run's state to `workflow`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from qlora_helpers import telemetry
from qlora_helpers import training_checkpoints as saved
from qlora_helpers.blocks import BlockCollator, PreparedData, row_losses, takes_logits_to_keep
from qlora_helpers.config import TrainConfig
from qlora_helpers.errors import ModelError, RunError
from qlora_helpers.labels import IGNORED
from qlora_helpers.run import Run
from qlora_helpers.units import gib

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEARTBEAT_S = 2.0
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
        peak_gib: most memory held by tensors on each GPU; on a CPU the process's peak.
        stopped: whether a person stopped it before the end.
        machine: what it ran on: the GPUs' names, or `CPU`.
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

    def __repr__(self) -> str:
        if self.new_steps == 0:
            return f"nothing left to do: all {self.steps} steps were done before"
        peak = ", ".join(f"{value:.2f} GiB on {name}" for name, value in self.peak_gib.items())
        end = "stopped by request" if self.stopped else "finished"
        losses = f"loss {self.loss:.3f}" if self.loss is not None else "no loss logged"
        losses += f", evaluation loss {self.eval_loss:.3f}" if self.eval_loss is not None else ""
        return f"{end} after {self.steps} steps: {losses}\n{self.tokens_per_s:,.0f} tokens/s, peak {peak}"


def make_collator(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> BlockCollator:
    """The collator that fits a model and prepared data."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    eager = getattr(inner.config, "_attn_implementation", "sdpa") == "eager"
    return BlockCollator(
        pad_token_id=tokenizer.pad_token_id,
        packed=data.packed,
        mask_dtype=inner.dtype if eager else None,
        pad_to=data.seq_len_tokens if data.packed else None,
        keep_trained_logits=takes_logits_to_keep(model),
    )


@torch.no_grad()
def check_rows_apart(
    model: torch.nn.Module, collator: BlockCollator, *, leak: float = 1e-3, rounding: float = 0.1
) -> tuple[float, float]:
    """Proves on the loaded model that a row in a packed block is answered as if it stood alone.

    Two probes: other words in the row before must not change a row's logits (the same sums are made either way, so this is
    exact even in 16 bits), and the row alone must give the same logits up to rounding.

    Args:
        model: with or without adapters.
        collator: of the packed data.
        leak: largest change allowed when the row before changes, as a share of the logits' spread.
        rounding: largest root mean square difference from the row alone, likewise.

    Returns:
        The two differences found.

    Raises:
        ModelError: the rows see each other.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(2, vocabulary, (n,), generator=draw).tolist() for n in (9, 9, 7))
    probe = BlockCollator(collator.pad_token_id, True, collator.mask_dtype, keep_trained_logits=False)
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    answers = []
    for before in (first, other):
        ids, segments = before + second, [1] * len(before) + [2] * len(second)
        batch = probe([{"input_ids": ids, "labels": [IGNORED] * len(ids), "segment_ids": segments}])
        del batch["labels"]
        logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
        answers.append(logits[0, len(before) :].float())
    alone = model(input_ids=torch.tensor([second], device=device)).logits[0].float()
    model.train(was_training)
    spread = alone.std()
    changed = float((answers[0] - answers[1]).abs().max() / spread)
    apart = float((answers[0] - alone).square().mean().sqrt() / spread)
    if not (changed <= leak and apart <= rounding):
        raise ModelError(
            "this model does not keep packed rows apart",
            expected="a row's answers not to depend on the row before it",
            got=f"a change of {changed:.2%}, and {apart:.2%} between packed and alone",
            next_step="Set data.packing=false.",
        )
    return changed, apart


def training_arguments(config: TrainConfig, run: Run, *, on_cpu: bool, half: torch.dtype | None) -> TrainingArguments:
    """Our settings in `TrainingArguments`' words, for transformers 5.17 to 5.23.

    Args:
        config: the run's training settings.
        run: where checkpoints go.
        on_cpu: don't touch a GPU.
        half: bfloat16 or float16 for autocast over float32 adapters, or None.
    """
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
        optim=config.optim,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # its default logs a NaN loss as 0.0 and goes on
        eval_strategy="steps" if config.eval_steps else "epoch",
        eval_steps=config.eval_steps,
        save_strategy="steps" if config.save_steps else "epoch",
        save_steps=config.save_steps or 500,
        save_total_limit=None,  # Trainer removes old ones before the new one is verified; we rotate after
        use_cpu=on_cpu,
        bf16=half == torch.bfloat16,
        fp16=half == torch.float16,
        seed=config.seed,
        data_seed=config.seed,
        remove_unused_columns=False,
        report_to="none",
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
        **{
            checkpointing: config.activation_checkpointing,
            f"{checkpointing}_kwargs": {"use_reentrant": False} if config.activation_checkpointing else None,
        },
    )


class SummaryTrainer(Trainer):
    """`Trainer` with two things of ours: tokens are counted, and the evaluation loss is a mean over tokens.

    Trainer's own `eval_loss` is a mean over batches, which depends on the batch size where rows differ in length.
    """

    tokens_seen: torch.Tensor | int = 0

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """Counts the tokens that are not padding; the sum stays on the device until it is logged."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        pad = self.data_collator.pad_token_id
        self.tokens_seen = self.tokens_seen + sum(batch["input_ids"].ne(pad).sum() for batch in batches)
        return batches, items

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Sum of the token losses over the number of trained tokens, over all processes."""
        model = self.model
        was_training = model.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        rows = 0
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                losses, tokens = row_losses(model, batch)
            losses, tokens = self.accelerator.gather_for_metrics((losses, tokens))
            sums += torch.stack([losses.sum(), tokens.sum()]).double().cpu()
            rows += len(tokens)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        metrics = {f"{metric_key_prefix}_loss": float(sums[0] / sums[1])}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)


class RunFolderCallback(TrainerCallback):
    """Writes what the trainer does into the run folder, and hears what people ask of it.

    Under torchrun only the first process writes; what it hears is told to all, so that they stop at the same step.
    """

    def __init__(self, run: Run, config: TrainConfig, session: int, is_writer: bool) -> None:
        self.run, self.config, self.session, self.is_writer = run, config, session, is_writer
        self.trainer: SummaryTrainer | None = None
        self.stopped = False
        self.saving_for: list[Any] = []
        self._beat = 0.0
        self._mark = (time.monotonic(), 0)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        """A resumed session goes by today's settings; Trainer takes the steps and the learning rate of the checkpoint."""
        state.compute_steps(args, state.max_steps)
        schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps it
        schedule.base_lrs = [args.learning_rate] * len(optimizer.param_groups)
        for group, course in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["initial_lr"] = args.learning_rate
            group["lr"] = args.learning_rate * course(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked = self.run.pending_requests(self.session) if self.is_writer else []
        kinds = _told_to_all({request.kind for request in asked})
        if kinds:
            self.saving_for = asked
            control.should_save = True
        if "stop" in kinds:
            self.stopped = control.should_training_stop = True
        self._beat_heart(state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._beat_heart(state)

    def _beat_heart(self, state: Any) -> None:
        if self.is_writer and time.monotonic() - self._beat > HEARTBEAT_S:
            self._beat = time.monotonic()
            self.run.set_status(step=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "train_runtime" in logs:
            return
        # With float16 a gradient may overflow: the loss scaler then leaves out that step and scales less.
        for name in ("loss", "eval_loss") if args.fp16 else ("loss", "eval_loss", "grad_norm"):
            if name in logs and not math.isfinite(float(logs[name])):
                raise RunError(
                    f"{name} is no longer a finite number at step {state.global_step}",
                    next_step="Lower train.learning_rate; the run goes on from its last good checkpoint.",
                )
        if self.is_writer:
            record = self._record(logs, state)
            self.run.append_progress(record)
            log.info("%s", {name: value for name, value in record.items() if name not in ("process", "gpus")})
            self.run.set_status(step=state.global_step)

    def _record(self, logs: dict[str, float], state: Any) -> dict[str, Any]:
        names = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm", "eval_loss": "eval_loss"}
        record: dict[str, Any] = {
            "session": self.session,
            "step": state.global_step,
            "epoch": round(state.epoch or 0, 4),
        }
        values = {ours: float(logs[theirs]) for theirs, ours in names.items() if theirs in logs}
        record |= {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no NaN
        if "loss" in logs and self.trainer is not None:
            tokens, now = int(self.trainer.tokens_seen), time.monotonic()
            processes = self.trainer.accelerator.num_processes
            record["tokens_per_s"] = round((tokens - self._mark[1]) * processes / max(1e-9, now - self._mark[0]), 1)
            self._mark = (now, tokens)
        return record | readings()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.is_writer:
            return
        saved.verify(self.run.checkpoints_dir / f"checkpoint-{state.global_step}")
        saved.rotate(self.run.checkpoints_dir, self.config.checkpoints_kept)
        for request in self.saving_for:
            self.run.acknowledge(request, f"saved at step {state.global_step}")
        self.saving_for = []


def readings() -> dict[str, Any]:
    """GPU readings, or the process's own where there is no GPU, for a line of progress."""
    gpus = telemetry.read_gpus()
    if gpus:
        return {"gpus": [{"memory_used_gib": gpu.memory_used_gib, "load": gpu.utilisation_percent} for gpu in gpus]}
    process = telemetry.read_process()
    return {"process": {"rss_gib": round(process.rss_gib, 3)}} if process else {}


def _told_to_all(kinds: set[str]) -> set[str]:
    """What the first process heard, in every process of a torchrun job."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return kinds
    told = [sorted(kinds)]
    dist.broadcast_object_list(told, src=0)
    return set(told[0])


def train(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    config: TrainConfig,
    run: Run,
    *,
    extra_callbacks: tuple[TrainerCallback, ...] = (),
    show_progress: bool = True,
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

    Raises:
        ModelError: packed rows would see each other.
        RunError: a loss or gradient is no longer finite, or a checkpoint can't be written.
    """
    device = model.get_input_embeddings().weight.device
    on_cpu = device.type == "cpu"
    collator = make_collator(model, tokenizer, data)
    if data.packed:
        check_rows_apart(model, collator)
    args = training_arguments(config, run, on_cpu=on_cpu, half=None if on_cpu else half_of(model))
    args.disable_tqdm = not show_progress
    if args.n_gpu > 1:  # with several GPUs and one process Trainer would wrap the model in DataParallel
        args._n_gpu = 1
    trainer = SummaryTrainer(
        model=model, args=args, train_dataset=data.train, eval_dataset=data.eval, data_collator=collator
    )
    resume = saved.newest_good(run.checkpoints_dir)
    is_writer = trainer.is_world_process_zero()
    total = planned_steps(trainer)
    start = saved.step_of(resume) if resume else 0
    session = run.start_session(total, start) if is_writer else 0
    callback = RunFolderCallback(run, config, session, is_writer)
    callback.trainer = trainer
    trainer.add_callback(callback)
    for extra in extra_callbacks:
        trainer.add_callback(extra)
    started = time.monotonic()
    try:
        if resume and start >= total:  # Trainer would do one step more
            trainer.state = saved.load_finished(model, resume)
        else:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        # Trainer leaves its autocast around `forward`; the model should answer as the same adapter does when reloaded.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    seconds = time.monotonic() - started
    losses = {key: item[key] for item in trainer.state.log_history for key in ("loss", "eval_loss") if key in item}
    tokens = int(trainer.tokens_seen) * trainer.accelerator.num_processes
    return TrainResult(
        trainer.state.global_step, trainer.state.global_step - start, losses.get("loss"), losses.get("eval_loss"),
        seconds, tokens / max(1e-9, seconds), peak_memory(), callback.stopped, machine_name(device),
    )  # fmt: skip


def planned_steps(trainer: Trainer) -> int:
    """Optimizer steps of a whole run."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    batches = len(trainer.get_train_dataloader())
    per_epoch = max(1, math.ceil(batches / trainer.args.gradient_accumulation_steps))
    return math.ceil(trainer.args.num_train_epochs * per_epoch)


def half_of(model: torch.nn.Module) -> torch.dtype | None:
    """The 16-bit type a model computes in, or None."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    dtype = inner.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def machine_name(device: torch.device) -> str:
    """What a model on this device runs on: `CPU`, or the GPUs' names, such as `2 x NVIDIA L4`."""
    if device.type == "cpu":
        return "CPU"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return " + ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def peak_memory() -> dict[str, float]:
    """Most memory held since the process began: tensors on each GPU, GiB; on a CPU the process's peak."""
    if torch.cuda.is_available():
        return {
            f"cuda:{index}": gib(torch.cuda.max_memory_allocated(index)) for index in range(torch.cuda.device_count())
        }
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return {"cpu": gib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
