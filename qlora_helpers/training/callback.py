"""Reports a trainer's progress and checkpoints to the run folder, and stops it when people ask or its budget is used up."""

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
from qlora_helpers.runs.heartbeat import readings_everywhere
from qlora_helpers.runs.status import BY_BUDGET, BY_INTERRUPT, BY_REQUEST, Status
from qlora_helpers.training import checkpoints as saved

HEARTBEAT_S = 2.0
log = logging.getLogger(__name__)


class RunFolderCallback(TrainerCallback):
    """Writes what the trainer does into the run folder, handles people's requests, and keeps to the budget.

    Under torchrun only the first process writes; it broadcasts its decisions, so that all processes stop at the same step.

    Attributes:
        stopped: whether this session ended before all steps were done; `stop_reason` says why.
    """

    def __init__(self, run: Run, config: TrainConfig, session: int, is_writer: bool) -> None:
        self.run, self.config, self.session, self.is_writer = run, config, session, is_writer
        self.trainer: Any = None  # the SummaryTrainer, for its counts
        self.stop_reason = ""
        status = run.status() if is_writer else Status()
        losses = (record["eval_loss"] for record in run.progress() if "eval_loss" in record) if is_writer else ()
        self.budget = Budget(config, status, losses)
        self.saving_for: list[Any] = []
        self._beat = 0.0
        self._phase = "training"
        self._mark = (time.monotonic(), 0)

    @property
    def stopped(self) -> bool:
        return bool(self.stop_reason)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        """Makes a resumed session use the current settings; Trainer takes steps and learning rate from the checkpoint."""
        state.compute_steps(args, state.max_steps)
        schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps it
        schedule.base_lrs = [args.learning_rate] * len(optimizer.param_groups)
        for group, schedule_of in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["initial_lr"] = args.learning_rate
            group["lr"] = args.learning_rate * schedule_of(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._handle_requests(state, control)
        self._write_heartbeat(state)
        if self.is_writer and control.should_save and not control.should_evaluate:
            self._enter("saving", state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Handles what was asked during the evaluation at once, not a step later: Trainer saves after this."""
        self._handle_requests(state, control)
        self._enter("saving" if control.should_save else "training", state)

    def _handle_requests(self, state: Any, control: Any) -> None:
        asked = self.run.requests.pending(self.session) if self.is_writer else []
        kinds = {request.kind for request in asked}
        reason = BY_REQUEST if "stop" in kinds else ""
        if self.is_writer and sigterm.interrupted():
            reason = BY_INTERRUPT
        if self.is_writer and sigterm.received():
            reason = sigterm.REASON
        all_done = state.global_step >= state.max_steps
        if self.is_writer and not reason and not all_done and (limit := self.budget.exhausted()):
            reason = BY_BUDGET + limit
        save, reason = _broadcast((bool(kinds or reason), reason))
        if save:
            self.saving_for = asked
            control.should_save = True
        if reason:
            self.stop_reason = reason
            control.should_training_stop = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._enter("evaluating", state)
        self._write_heartbeat(state)

    def _enter(self, phase: str, state: Any) -> None:
        """Says what the trainer does now; it is written where it changes alone."""
        if self.is_writer and phase != self._phase:
            self._phase = phase
            self.run.set_status(phase=phase, step=state.global_step)

    def _write_heartbeat(self, state: Any) -> None:
        if self.is_writer and time.monotonic() - self._beat > HEARTBEAT_S:
            self._beat = time.monotonic()
            self.run.set_status(step=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not {"loss", "eval_loss"} & logs.keys():  # the summary at the end, or an interrupted evaluation
            return
        # A float16 gradient may overflow: the loss scaler then skips that step and lowers its scale. The trainer's watch reports
        # a run in which that happens at every step.
        for name in ("loss", "eval_loss") if args.fp16 else ("loss", "eval_loss", "grad_norm"):
            if name in logs and not math.isfinite(float(logs[name])):
                raise RunError(
                    f"{name} is no longer a finite number at step {state.global_step}",
                    next_step=f"Lower train.learning_rate; the run goes on from {self._goes_on_from()}.",
                )
        if "eval_loss" in logs:  # before its line is written, which counts evaluations without a better loss
            self.budget.evaluated(float(logs["eval_loss"]))
        if self.is_writer:
            record = self._record(logs, state)
            self.run.append_progress(record)
            unlogged = ("step", "session", "process", "processes", "gpus")
            values = ", ".join(f"{name} {value:.5g}" for name, value in record.items() if name not in unlogged)
            log.info("step %d: %s", state.global_step, values)
            self.run.set_status(step=state.global_step)

    def _goes_on_from(self) -> str:
        return self.trainer.goes_on_from() if self.trainer and self.is_writer else "its last good checkpoint"

    def _record(self, logs: dict[str, float], state: Any) -> dict[str, Any]:
        names = ("loss", "learning_rate", "grad_norm", "eval_loss")
        record: dict[str, Any] = {
            "session": self.session,
            "step": state.global_step,
            "epoch": round(state.epoch or 0, 4),
        }
        values = {name: float(logs[name]) for name in names if name in logs}
        record |= {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no NaN
        if "loss" in logs and self.trainer is not None:
            tokens, now = int(self.trainer.tokens_seen), time.monotonic()
            processes = self.trainer.accelerator.num_processes
            record["tokens_per_s"] = round((tokens - self._mark[1]) * processes / max(1e-9, now - self._mark[0]), 1)
            self._mark = (now, tokens)
        return record | self.budget.used() | readings_everywhere()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.is_writer:
            return
        if not self.trainer.watch.suspects:  # checkpoints from before the loss rose may still be needed
            since = self.trainer.watch.health.doubtful_since
            suspect_from = since - 1 if since else None
            saved.rotate(self.run.checkpoints_dir, self.config.checkpoints_kept, suspect_from=suspect_from)
        self.run.append_progress({"event": "saved", "session": self.session, "step": state.global_step})
        for request in self.saving_for:
            self.run.requests.acknowledge(request, f"saved at step {state.global_step}")
        self.saving_for = []
        self._enter("training", state)


def _broadcast(decision: tuple[bool, str]) -> tuple[bool, str]:
    """Returns the first process's decision in every process of a torchrun job."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return decision
    decided = [decision]
    dist.broadcast_object_list(decided, src=0)
    return decided[0]


class CallEachTime(TrainerCallback):
    """Calls a function during training, with at least some time between calls; it shows progress in the cell that trains.

    Args:
        call: takes no arguments; is called in the training thread.
        every_s: seconds between two calls, at least.
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
