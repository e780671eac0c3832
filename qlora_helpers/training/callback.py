"""What a trainer tells the run folder (progress, verified checkpoints), and what makes it stop: people, and its budget."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from qlora_helpers.base.config import TrainConfig
from qlora_helpers.base.errors import RunError
from qlora_helpers.runs import sigterm
from qlora_helpers.runs.budget import Budget
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.heartbeat import readings
from qlora_helpers.runs.status import BY_BUDGET, BY_REQUEST, Status
from qlora_helpers.training import checkpoints as saved

HEARTBEAT_S = 2.0
log = logging.getLogger(__name__)


class RunFolderCallback(TrainerCallback):
    """Writes what the trainer does into the run folder, hears what people ask of it, and keeps to its budget.

    Under torchrun only the first process writes; what it decides is told to all, so that they stop at the same step.

    Attributes:
        stopped: whether this session ended before all steps were done, and `stop_reason` why.
    """

    def __init__(self, run: Run, config: TrainConfig, session: int, is_writer: bool) -> None:
        self.run, self.config, self.session, self.is_writer = run, config, session, is_writer
        self.trainer: Any = None  # the SummaryTrainer, for its token count
        self.stop_reason = ""
        status = run.status() if is_writer else Status()
        losses = (record["eval_loss"] for record in run.progress() if "eval_loss" in record) if is_writer else ()
        self.budget = Budget(config, status, losses)
        self.saving_for: list[Any] = []
        self._beat = 0.0
        self._mark = (time.monotonic(), 0)

    @property
    def stopped(self) -> bool:
        return bool(self.stop_reason)

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
        self._listen(state, control)
        self._beat_heart(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer saves after this, so what was asked during the evaluation is done at once, not a step later."""
        self._listen(state, control)

    def _listen(self, state: Any, control: Any) -> None:
        asked = self.run.requests.pending(self.session) if self.is_writer else []
        kinds = {request.kind for request in asked}
        reason = BY_REQUEST if "stop" in kinds else ""
        if self.is_writer and sigterm.asked():
            reason = sigterm.REASON
        all_done = state.global_step >= state.max_steps
        if self.is_writer and not reason and not all_done and (limit := self.budget.exhausted()):
            reason = BY_BUDGET + limit
        save, reason = _told_to_all((bool(kinds or reason), reason))
        if save:
            self.saving_for = asked
            control.should_save = True
        if reason:
            self.stop_reason = reason
            control.should_training_stop = True

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
        # With float16 a gradient may overflow: the loss scaler then leaves out that step and scales less; the trainer's watch
        # tells where that happens at every step.
        for name in ("loss", "eval_loss") if args.fp16 else ("loss", "eval_loss", "grad_norm"):
            if name in logs and not math.isfinite(float(logs[name])):
                raise RunError(
                    f"{name} is no longer a finite number at step {state.global_step}",
                    next_step="Lower train.learning_rate; the run goes on from its last good checkpoint.",
                )
        if "eval_loss" in logs:  # before its line is written, which says how many were no better
            self.budget.evaluated(float(logs["eval_loss"]))
        if self.is_writer:
            record = self._record(logs, state)
            self.run.append_progress(record)
            passed = ("step", "session", "process", "gpus")
            told = ", ".join(f"{name} {value:.5g}" for name, value in record.items() if name not in passed)
            log.info("step %d: %s", state.global_step, told)
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
        return record | self.budget.used() | readings()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.is_writer:
            return
        if not self.trainer.watch.suspects:  # what was saved before the loss rose may be needed yet
            saved.rotate(self.run.checkpoints_dir, self.config.checkpoints_kept)
        for request in self.saving_for:
            self.run.requests.acknowledge(request, f"saved at step {state.global_step}")
        self.saving_for = []


def _told_to_all(decision: tuple[bool, str]) -> tuple[bool, str]:
    """What the first process decided, in every process of a torchrun job."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return decision
    told = [decision]
    dist.broadcast_object_list(told, src=0)
    return told[0]


class CallEachTime(TrainerCallback):
    """Calls a function as training goes on, at most so often: what shows progress in the cell that trains.

    Args:
        call: takes nothing; is called in the training thread.
        every_s: least seconds between two calls.
    """

    def __init__(self, call: Callable[[], None], every_s: float = 0.5) -> None:
        self.call, self.every_s = call, every_s
        self._last = float("-inf")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self._last >= self.every_s:
            self.call()
            self._last = time.monotonic()

    on_prediction_step = on_step_end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.call()

    on_train_end = on_train_begin
