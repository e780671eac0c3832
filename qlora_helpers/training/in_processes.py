"""Trains a run in several processes and waits for them, where the plan wants several and the caller is a single one.

A notebook's kernel is one process, in which layers can only be spread over GPUs that then work one after another. Copies and shards
take processes of their own; what they do is read from the run's folder, as a panel reads it. Imports no torch before their end.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from qlora_helpers.base.errors import Interrupted, RunError, UserError
from qlora_helpers.base.text import Say
from qlora_helpers.planning import starting
from qlora_helpers.planning.choosing import Choice
from qlora_helpers.runs import locks
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.plan_file import read_plan

if TYPE_CHECKING:
    from qlora_helpers.training.result import TrainResult

EVERY_S = 1.0


def several_by_plan(run: Run) -> Choice | None:
    """Returns how a training of this run shares the GPUs, where that takes several processes and this is a single one; else None.

    Raises:
        RunError: others use all GPUs.
        UserError: the way that `train.share` names does not fit.
    """
    if "RANK" in os.environ or run.config().model.device_map == "cpu" or len(locks.visible_gpus()) < 2:
        return None
    chosen, _, _ = starting.prepare(run)
    return chosen if chosen.processes > 1 else None


def remark_on_loading(run: Run) -> str:
    """Says, before a model is loaded in a single process, that several would train it faster; empty where they would not."""
    with contextlib.suppress(UserError):
        if run.status().state == "finished":  # it is loaded for answers
            return ""
        if chosen := several_by_plan(run):
            return (
                f"The plan for training on these GPUs: {chosen.why} ql.start(run) trains so, in {chosen.processes} processes; a "
                "model that this process loads is spread over the GPUs, and has to be free again by then."
            )
    return ""


def train_in_processes(
    run: Run, *, redraw: Callable[[], None] | None = None, shut_down_app: bool = False, say: Say = print
) -> TrainResult:
    """Starts a run's training as the plan says, waits for its end and returns how it ended.

    An interrupt has the processes save and end.

    Args:
        run: the run.
        redraw: called every second.
        shut_down_app: as for `planning.starting.start`.
        say: called with a line on how the work is shared.

    Raises:
        RunError: the training failed.
        Interrupted: this process was interrupted.
    """
    before = run.status().step
    say(repr(starting.start(run, shut_down_app=shut_down_app)))
    try:
        while run.status().is_live:
            time.sleep(EVERY_S)
            if redraw:
                redraw()
    except KeyboardInterrupt:
        with contextlib.suppress(RunError):  # it has ended
            run.request("stop")
        raise Interrupted(f"{run.name} was asked to save and stop; watch(run) shows when it has") from None
    status = run.status()
    if status.state == "failed":
        raise RunError(
            f"the training of {run.name!r} failed: {status.last_error or status.exit_reason}",
            next_step=f"Its log says more: {run.log_path}",
        )
    return _result(run, before)


def _result(run: Run, before: int) -> TrainResult:
    """Returns how the session ended that began at a step, as the run's folder says."""
    from qlora_helpers.training.result import TrainResult

    status, measured = run.status(), read_plan(run).measured
    losses = {
        name: line[name] for line in run.progress() for name in ("loss", "eval_loss") if line.get(name) is not None
    }
    if measured is None or status.step == before:  # no step was taken
        return TrainResult(status.step, 0, None, None, 0.0, 0.0, {}, status.state == "stopped", "")
    return TrainResult(
        steps=status.step,
        new_steps=status.step - before,
        loss=losses.get("loss"),
        eval_loss=losses.get("eval_loss"),
        seconds=measured.seconds,
        tokens_per_s=measured.tokens_per_s,
        peak_gib=measured.peak_gib,
        stopped=status.state == "stopped",
        machine=measured.machine,
        reserved_gib=measured.reserved_gib,
        fast_step="\n".join(measured.fast_step),
        stop_reason=(status.exit_reason or "") if status.state == "stopped" else "",
    )
