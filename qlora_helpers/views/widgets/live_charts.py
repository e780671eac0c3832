"""Charts that grow while a run trains: SVG that the kernel draws and an `ipywidgets.HTML` shows.

So they need nothing on the Jupyter server but ipywidgets itself. Packages of charts need an extension of their own there, which
SageMaker Studio's servers lack, and their charts can't be shown once the kernel is gone. What a person sets (the steps to
show, smoothing, a logarithmic axis) is kept in the kernel and so survives new points; what only follows the pointer is a few lines
of script in the page, without which everything else works.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from typing import Any

import ipywidgets

from qlora_helpers.views.charts import Points, number_text
from qlora_helpers.views.follow import View
from qlora_helpers.views.plots import UNITS, Drawing, Mark, Plot
from qlora_helpers.views.run_plots import best_points, draw_run, whole_axis
from qlora_helpers.views.widgets.panel import add_classes, button

SMOOTHING = {"none": 0.0, "light": 0.6, "medium": 0.85, "strong": 0.95}
MARKS = {"saved": "❘ saved", "resumed": "┆ resumed", "best": "★ best evaluation"}

# Called for every event of the pointer over the charts; `this` is the element that holds them all.
_POINTER = """
const host = this.closest('.qlora-live'), area = event.target.closest('.qlora-area');
const show = share => {
  const box = host.querySelector('.qlora-charts');
  if (!box) return;
  const lo = +box.dataset.lo, hi = +box.dataset.hi, step = lo + share * (hi - lo);
  for (const chart of box.querySelectorAll('figure')) {
    const values = chart.querySelectorAll('b'), cursor = chart.querySelector('u');
    let at = null;
    JSON.parse(chart.dataset.lines).forEach((line, index) => {
      let near = null;
      for (const point of line) if (!near || Math.abs(point[0] - step) < Math.abs(near[0] - step)) near = point;
      if (near && at === null) at = near[0];
      if (near) values[index].textContent = near[1] + (near[0] === at ? '' : ' at ' + near[0]);
    });
    if (at === null) continue;
    cursor.hidden = false;
    cursor.dataset.step = 'step ' + at;
    cursor.style.left = 100 * (at - lo) / (hi - lo) + '%';
  }
};
const hide = () => {
  host.qloraShare = host.qloraFrom = null;
  for (const cursor of host.querySelectorAll('u')) cursor.hidden = true;
  for (const value of host.querySelectorAll('b')) value.textContent = value.dataset.last;
};
if (!host.qloraSeen) {
  host.qloraSeen = new MutationObserver(() => { if (host.qloraShare != null) show(host.qloraShare); });
  host.qloraSeen.observe(this.parentNode, {childList: true});
}
const panel = host.closest('.qlora-watch');
if (event.type === 'dblclick') { panel.querySelector('.qlora-all-steps')?.click(); return; }
if (event.type === 'pointerleave' || !area) { hide(); return; }
const box = area.getBoundingClientRect(), share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
const band = area.querySelector('s');
if (event.type === 'pointerdown') { host.qloraFrom = share; event.preventDefault(); }
const from = host.qloraFrom;
if (event.type === 'pointermove' && from != null && event.buttons) {
  band.hidden = false;
  band.style.left = 100 * Math.min(from, share) + '%';
  band.style.width = 100 * Math.abs(from - share) + '%';
}
if (event.type === 'pointerup') {
  host.qloraFrom = null;
  band.hidden = true;
  if (from != null && Math.abs(from - share) > 0.02) {
    const lo = +this.dataset.lo, hi = +this.dataset.hi;
    [['.qlora-from', Math.min(from, share)], ['.qlora-to', Math.max(from, share)]].forEach(([name, at]) => {
      const input = panel.querySelector(name + ' input');
      if (!input) return;
      input.value = Math.round(lo + at * (hi - lo));
      input.dispatchEvent(new Event('change', {bubbles: true}));
    });
  }
}
host.qloraShare = share;
show(share);
"""


class LiveCharts:
    """All charts of a run in one widget, with the controls for how they are drawn.

    Args:
        changed: called after a person chose other steps.

    Attributes:
        box: the charts.
        controls: the widgets that change them.
        first, last, smoothing, log, all_steps: these widgets one by one.
        across: the steps that a person chose to see; None follows the run.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self.box = add_classes(ipywidgets.HTML(layout={"width": "100%"}), "qlora-live")
        self.across: tuple[int, int] | None = None
        self._changed, self._quiet = changed, False
        self._view: View | None = None
        self._shown: Any = None
        small: dict[str, Any] = {"layout": {"width": "auto"}, "style": {"description_width": "initial"}}
        self.first = add_classes(
            ipywidgets.BoundedIntText(description="steps from", min=0, max=1, **small), "qlora-from"
        )
        self.last = add_classes(ipywidgets.BoundedIntText(description="to", min=1, max=1, **small), "qlora-to")
        self.all_steps = add_classes(
            button(
                "All steps",
                "Shows the whole run again and follows it; a double click in a chart does the same",
                self.follow,
            ),
            "qlora-all-steps",
        )
        self.smoothing = ipywidgets.Dropdown(options=list(SMOOTHING), value="none", description="smoothing", **small)
        self.log = ipywidgets.Checkbox(description="log scale of the loss", indent=False, **small)
        self.first.observe(self._choose, "value")
        self.last.observe(self._choose, "value")
        self.smoothing.observe(self._redraw, "value")
        self.log.observe(self._redraw, "value")
        self.controls = add_classes(
            ipywidgets.HBox([self.first, self.last, self.all_steps, self.smoothing, self.log]), "qlora-chart-controls"
        )

    def show(self, view: View) -> None:
        """Draws the run, and sends nothing where nothing is new."""
        self._view = view
        ends = tuple(points[-1] if points else None for points in view.curves.values())
        drawn = (ends, view.generation, view.events, view.status.max_steps, view.status.state)
        settings = (self.across, self.smoothing.value, self.log.value)
        if (drawn, settings) == self._shown:
            return
        self._shown = (drawn, settings)
        whole = whole_axis(view)
        self._set_ends(self.across or whole, most=max(whole[1], view.status.max_steps))
        drawings = draw_run(view, self.across, smoothing=SMOOTHING[self.smoothing.value], log=self.log.value)
        self.box.value = charts_html(drawings, view)

    def follow(self) -> None:
        """Shows all steps again, and new ones as they come."""
        self.across = None
        self._redraw()
        self._changed()

    def _set_ends(self, ends: tuple[int, int], most: int) -> None:
        self._quiet = True
        for widget, value in ((self.first, ends[0]), (self.last, ends[1])):
            widget.max = max(most, value)
            widget.value = value
        self._quiet = False

    def _choose(self, change: Any) -> None:
        if self._quiet:
            return
        first, last = self.first.value, self.last.value
        self.across = (min(first, last), max(last, first + 1)) if first < last else (first, first + 1)
        self._redraw()
        self._changed()

    def _redraw(self, change: Any = None) -> None:
        if self._view is not None:
            self.show(self._view)


def charts_html(drawings: dict[str, Drawing], view: View) -> str:
    """Returns all charts as HTML: the losses large, the others small beside them."""
    losses, *others = drawings.values()
    first, last = losses.across
    forward = "this.onpointermove(event)"
    events = " ".join(f'on{name}="{forward}"' for name in ("pointerdown", "pointerup", "pointerleave", "dblclick"))
    small = "".join(_figure(drawing, "small") for drawing in others)
    return (
        f'<div class="qlora-charts" data-lo="{first:.0f}" data-hi="{last:.0f}" '
        f'onpointermove="{html.escape(_POINTER.strip())}" {events}>'
        f'<div class="qlora-chart-main">{_figure(losses, "main")}{_legend(losses, view)}</div>'
        f'<div class="qlora-chart-others">{small}</div></div>'
    )


def _figure(drawing: Drawing, size: str) -> str:
    plot = drawing.plot
    keys = "".join(
        f'<span class="qlora-key"><i style="background:{line.colour}"></i>{html.escape(line.name) if size == "main" else ""} '
        f"{_value(points, plot)}</span>"
        for line, points in zip(plot.lines, drawing.shown, strict=True)
    )
    texts = [[(step, plot.text(value)) for step, value in points] for points in drawing.shown]
    data = html.escape(json.dumps(texts, separators=(",", ":")))
    log = ", log scale" if plot.log else ""
    return (
        f'<figure class="{size}" role="img" aria-label="{html.escape(drawing.label())}" data-lines="{data}">'
        f"<figcaption><span>{html.escape(plot.title)}{log}</span>{keys}</figcaption>"
        f'<div class="qlora-plot">{_ticks(drawing)}<div class="qlora-area">{_svg(drawing)}{_marks(drawing)}'
        f"<s hidden></s><u hidden></u>{_nothing(drawing)}</div></div>"
        f'<div class="qlora-axis">{"optimizer step" if size == "main" else "step"}</div></figure>'
    )


def _value(points: Points, plot: Plot) -> str:
    text = plot.text(points[-1][1]) if points else "–"
    return f'<b data-last="{text}">{text}</b>'


def _nothing(drawing: Drawing) -> str:
    if not drawing.is_empty:
        return ""
    zoomed = any(line.points for line in drawing.plot.lines)
    text = "no point between these steps" if zoomed else drawing.plot.nothing
    return f'<em class="qlora-nothing">{html.escape(text)}</em>'


def _ticks(drawing: Drawing) -> str:
    if drawing.is_empty:
        return ""
    up = "".join(f'<span class="up" style="bottom:{100 * place:.1f}%">{text}</span>' for place, text in drawing.values)
    across = "".join(
        f'<span class="across" style="left:{100 * place:.1f}%">{text}</span>' for place, text in drawing.steps
    )
    return f'<div class="qlora-ticks" aria-hidden="true">{up}{across}</div>'


def _svg(drawing: Drawing) -> str:
    grid = "".join(f'<path class="grid" d="M0 {UNITS * (1 - place):.0f}H{UNITS}"/>' for place, _ in drawing.values)
    lines = "".join(
        f'<g stroke="{line.colour}"><path class="raw" d="{raw}"/><path class="line" d="{path}"/><path class="dots" d="{dots}"/></g>'
        for line, (raw, path, dots) in zip(drawing.plot.lines, drawing.paths, strict=True)
    )
    return f'<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none" aria-hidden="true">{grid}{lines}</svg>'


def _marks(drawing: Drawing) -> str:
    """Returns what happened at which step, a sign at its place each; the page shows its text under the pointer."""
    return "".join(_mark(mark, drawing) for mark in drawing.marks())


def _mark(mark: Mark, drawing: Drawing) -> str:
    x, y = drawing.place(mark.step, mark.value if not drawing.is_empty else None)
    sign = "★" if mark.kind == "best" else ""
    return (
        f'<span class="mark {mark.kind}" style="left:{100 * x:.2f}%;bottom:{100 * y:.1f}%" '
        f'title="{mark.kind} at step {mark.step:,}">{sign}</span>'
    )


def _legend(drawing: Drawing, view: View) -> str:
    kinds = {mark.kind for mark in drawing.marks()}
    parts = ["● evaluated"] if view.curves["eval_loss"] else []
    parts += [text for kind, text in MARKS.items() if kind in kinds]
    best = "".join(f": {number_text(value)} at step {step:,}" for step, value in best_points(view))
    shown = [html.escape(part + (best if part == MARKS["best"] else "")) for part in parts]
    return f'<div class="qlora-chart-legend">{"&emsp;".join(shown)}</div>'
