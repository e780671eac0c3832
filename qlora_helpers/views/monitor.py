"""Watching a run: its loss curve, its other readings, and its present state.

This module reads nothing but the run folder, so it works beside a trainer in another process, after it, and without a GPU
(`telemetry.gpu_table` shows what the GPUs do). It knows no model and imports no torch.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.tables import AS_TEXT, Table
from qlora_helpers.base.text import plain
from qlora_helpers.base.units import duration
from qlora_helpers.runs.events_copy import CopyState
from qlora_helpers.runs.folder import Run, Status
from qlora_helpers.runs.plan_file import read_plan
from qlora_helpers.runs.status import PHASES
from qlora_helpers.views.charts import Chart, Panel, Points, number_text
from qlora_helpers.views.follow import Follower, View
from qlora_helpers.views.readings import as_number, as_readings, named_gpus, named_processes, points_of


class LossCurve(Chart):
    """Training and evaluation loss over the steps, in nats per trained token.

    Attributes:
        loss, eval_loss: `(step, value)` pairs; a resumed run is one gapless curve.
    """

    def __init__(self, name: str, loss: Points, eval_loss: Points) -> None:
        self.loss, self.eval_loss = loss, eval_loss
        super().__init__(name, [Panel("loss, nats per token", {"training loss": loss, "evaluation loss": eval_loss})])


def loss_curve(run: Run) -> LossCurve:
    """Returns the loss curve as far as it is logged; a progress file that is missing or half written is not an error."""
    records = run.progress()
    return LossCurve(run.name, points_of(records, "loss"), points_of(records, "eval_loss"))


def curves(run: Run) -> Chart:
    """Returns learning rate, gradient norm and speed of a run as small charts side by side."""
    records = run.progress()
    names = {"learning rate": "learning_rate", "gradient norm": "grad_norm", "tokens/s": "tokens_per_s"}
    return Chart(run.name, [Panel(title, {title: points_of(records, key)}) for title, key in names.items()], columns=3)


def _last(records: Sequence[dict[str, Any]], key: str) -> str:
    points = points_of(records, key)
    return number_text(points[-1][1]) if points else ""


@dataclass(frozen=True, repr=False)
class Watch:
    """The state of a run at one moment; prints as a few lines.

    Attributes:
        name: the run's name.
        status: what `Run.status` returns; the state is `dead` if the trainer's process has ended without saying so.
        readings: name -> text of the values logged last; empty before the first.
        seconds_left: time left in training, estimated from the pace of this session; None if there is no estimate.
        seconds_silent: time since the trainer's last sign of life; None does not print it.
        events_copy: the state of the copy of the TensorBoard events on S3; None if there is no copy.
        left_until: the limit that is expected to end the session before its last step; empty if none is.
    """

    name: str
    status: Status
    readings: dict[str, str]
    seconds_left: float | None = None
    seconds_silent: float | None = 0.0
    events_copy: CopyState | None = None
    left_until: str = ""

    def lines(self) -> list[str]:
        """Returns the lines that are printed: state and step, what went wrong if anything did, and readings."""
        status = self.status
        head = f"{self.name}: {status.state}"
        head += f" ({status.phase})" if status.is_live and status.phase in PHASES else ""
        head += f", step {status.step} of {status.max_steps}" if status.max_steps else ""
        if status.is_live:
            head += f", about {duration(self.seconds_left)} left" if self.seconds_left is not None else ""
            head += f" until {self.left_until} ends it" if self.left_until else ""
            head += (
                f", last sign of life {duration(self.seconds_silent)} ago" if self.seconds_silent is not None else ""
            )
        lines = [head]
        lines += [f"why it ended: {status.exit_reason}"] if status.exit_reason and not status.is_live else []
        lines += [f"last error: {status.last_error}"] if status.last_error else []
        lines += [f"warning: {status.warning}"] if status.warning and not status.is_live else []
        if self.readings:
            lines.append(", ".join(f"{name} {text}" for name, text in self.readings.items()))
        lines += [f"TensorBoard: {self.events_copy.line()}"] if self.events_copy else []
        return [" ".join(plain(line).split()) for line in lines]

    def __repr__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        first, *rest = map(html.escape, self.lines())
        return f"<div {AS_TEXT}><strong>{first}</strong>{''.join(f'<br>{line}' for line in rest)}</div>"


def watch_once(run: Run) -> Watch:
    """Reads a run once: state, step, time left, and the last readings."""
    return watch_of(Follower(run).look())


def watch_of(view: View) -> Watch:
    """Returns what is printed of a run that was looked at already."""
    return Watch(
        view.name,
        view.status,
        _readings(view.records),
        view.seconds_left,
        view.silent_s,
        view.events_copy,
        view.left_until,
    )


def _readings(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    names = {"loss": "loss", "evaluation loss": "eval_loss", "learning rate": "learning_rate"}
    names |= {"gradient norm": "grad_norm", "tokens/s": "tokens_per_s"}
    found = {name: _last(records, key) for name, key in names.items()}
    last = records[-1] if records else {}
    _, process = as_readings(last)
    for name, gpu in named_gpus(last):
        parts = ((as_number(gpu.get("memory_used_gib")), ".1f", "GiB"), (as_number(gpu.get("load")), ".0f", "%"))
        found[name] = " ".join(f"{value:{form}} {unit}" for value, form, unit in parts if value is not None)
    if (rss := as_number(process.get("rss_gib"))) is not None:
        found["process"] = f"{rss:.2f} GiB"
    for name, each in named_processes(last):
        if (rss := as_number(each.get("rss_gib"))) is not None:
            found[name] = f"{rss:.2f} GiB"
    return {name: text for name, text in found.items() if text}


def plan_table(run: Run) -> Table:
    """Returns what `plan.json` says about the step: measured, and on GPUs also predicted for the same settings.

    Raises:
        RunError: the file is damaged, or the run has measured nothing yet.
    """
    plan = read_plan(run)
    measured, predicted = plan.measured, plan.predicted
    if measured is None:
        raise RunError(f"{run.name}/plan.json holds no measured step yet", next_step="Train the run first.")
    rows = [
        [f"{what}, {device}, GiB", f"{expected[device]:.2f}" if device in expected else "", f"{value:.2f}"]
        for what, expected, found in (
            ("peak held by tensors", predicted.allocated_gib if predicted else {}, measured.peak_gib),
            ("peak reserved", predicted.reserved_gib if predicted else {}, measured.reserved_gib),
        )
        for device, value in found.items()
    ]
    speed = f"{predicted.tokens_per_s:,.0f}" if predicted else ""
    rows.append(["tokens/s", speed, f"{measured.tokens_per_s:,.0f}"])
    return Table(["step", "predicted", "measured"], rows, numbers=(1, 2))
