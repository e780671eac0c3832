"""Which plots a run has: its losses, and below them how the step went, with what happened at which step."""

from __future__ import annotations

from qlora_helpers.views.charts import ORANGE, Points
from qlora_helpers.views.follow import View
from qlora_helpers.views.plots import Drawing, Line, Mark, Plot, axis_end, drawn, smoothed

SMOOTHED = ("loss", "grad_norm", "tokens_per_s", "load_percent")
"""The curves that are noisy from step to step."""

DECIMALS = {"memory_gib": 2, "load_percent": 0}
"""How many digits a value of a curve has after its point, where that is not left to its size."""


def run_plots(view: View, *, smoothing: float = 0.0, log: bool = False) -> dict[str, Plot]:
    """Returns a run's plots by the name of their first curve; the losses come first.

    Args:
        view: the run at one moment.
        smoothing: the weight of the past, from 0 to below 1, in the curves that are noisy.
        log: whether the losses are drawn on a logarithmic axis.
    """

    def line(key: str, name: str) -> Line:
        points = view.curves[key]
        if smoothing and key in SMOOTHED:
            return Line(name, smoothed(points, smoothing), raw=points)
        return Line(name, points)

    marks = tuple(Mark(kind, step, _value(view, kind, step)) for kind, step in view.events)
    resumed = tuple(mark for mark in marks if mark.kind == "resumed")
    evaluation = Line("evaluation loss", view.curves["eval_loss"], colour=ORANGE, dots=True)
    losses = (line("loss", "training loss"), evaluation)
    device = "GPU" if view.on_gpu else "process"
    small = {
        "learning_rate": ("learning rate", "learning rate"),
        "grad_norm": ("gradient norm", "gradient norm"),
        "tokens_per_s": ("speed, tokens/s", "tokens/s"),
        "memory_gib": (f"{device} memory, GiB", "GiB"),
        "load_percent": ("GPU load, %", "%") if view.on_gpu else ("CPU load, % of a core", "%"),
    }
    ceilings = {"load_percent": 100.0} if view.on_gpu else {}  # several cores are more than 100 % of one
    return {"loss": Plot("loss, nats per token", losses, marks, log, nothing(view))} | {
        key: Plot(
            title,
            (line(key, name),),
            resumed,
            nothing="nothing logged yet",
            decimals=DECIMALS.get(key),
            ceiling=ceilings.get(key),
        )
        for key, (title, name) in small.items()
    }


def nothing(view: View) -> str:
    """Says why there is no loss to draw yet."""
    status = view.status
    if status.state == "new":
        return "Nothing to draw yet: training has not begun."
    if status.state == "starting":
        return "Nothing to draw yet: the model and the data are being loaded."
    if status.is_live:
        return "Nothing to draw yet: the first point comes with the first logged step."
    return f"Nothing to draw: no step was logged before the run was {status.state}."


def _value(view: View, kind: str, step: int) -> float | None:
    return dict(view.curves["eval_loss"]).get(step) if kind == "best" else None


def whole_axis(view: View) -> tuple[int, int]:
    """Returns the first and the last step of an axis that holds the whole run so far."""
    far = max((points[-1][0] for points in view.curves.values() if points), default=0)
    return 0, axis_end(far, view.status.max_steps)


def draw_run(
    view: View, across: tuple[int, int] | None = None, *, smoothing: float = 0.0, log: bool = False
) -> dict[str, Drawing]:
    """Returns the geometry of a run's plots.

    Args:
        view: the run at one moment.
        across: the first and the last step to show; None shows all.
        smoothing, log: as for `run_plots`.
    """
    ends = across or whole_axis(view)
    return {
        key: drawn(plot, ends) if key == "loss" else drawn(plot, ends, ticks=(4, 4), most=160)
        for key, plot in run_plots(view, smoothing=smoothing, log=log).items()
    }


def best_points(view: View) -> Points:
    """Returns the step and the loss of the best evaluation, or nothing."""
    return tuple((step, value) for kind, step in view.events if (value := _value(view, kind, step)) is not None)
