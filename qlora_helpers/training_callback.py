"""What a trainer tells the run folder (progress, heartbeats, verified checkpoints), and what it hears from people there."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from transformers import TrainerCallback

from qlora_helpers import telemetry, termination
from qlora_helpers import training_checkpoints as saved
from qlora_helpers.config import TrainConfig
from qlora_helpers.errors import RunError
from qlora_helpers.run import Run

HEARTBEAT_S = 2.0
log = logging.getLogger("qlora_helpers.training")


class RunFolderCallback(TrainerCallback):
    """Writes what the trainer does into the run folder, and hears what people ask of it.

    Under torchrun only the first process writes; what it hears is told to all, so that they stop at the same step.
    """

    def __init__(self, run: Run, config: TrainConfig, session: int, is_writer: bool) -> None:
        self.run, self.config, self.session, self.is_writer = run, config, session, is_writer
        self.trainer: Any = None  # the SummaryTrainer, for its token count
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
        self._listen(control)
        self._beat_heart(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer saves after this, so what was asked during the evaluation is done at once, not a step later."""
        self._listen(control)

    def _listen(self, control: Any) -> None:
        asked = self.run.pending_requests(self.session) if self.is_writer else []
        told_to_end = {"stop"} if self.is_writer and termination.asked() else set()
        kinds = _told_to_all({request.kind for request in asked} | told_to_end)
        if kinds:
            self.saving_for = asked
            control.should_save = True
        if "stop" in kinds:
            self.stopped = control.should_training_stop = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._beat_heart(state)

    def _beat_heart(self, state: Any) -> None:
        if self.is_writer and time.monotonic() - self._beat > HEARTBEAT_S:
            self._beat = time.monotonic()
            self.run.set_status(step=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not {"loss", "eval_loss"} & logs.keys():  # the summary at the end, or an evaluation that was cut short
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
        if not self.trainer.watch.suspects:  # what was saved before the loss rose may be needed yet
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
