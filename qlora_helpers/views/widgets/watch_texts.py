"""The texts of the watch panel as HTML: state, budget, readings, requests and log. Everything that comes from files is escaped."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence

from qlora_helpers.base.text import plain
from qlora_helpers.base.units import duration
from qlora_helpers.runs.requests import Request
from qlora_helpers.views.follow import View, as_number, as_readings, named_gpus, named_processes
from qlora_helpers.views.widgets.panel import error_html


def state(view: View) -> str:
    """Returns name, state, step, time left, cost, and what went wrong."""
    status = view.status
    facts = []
    if status.max_steps:
        facts.append(("step", f"{status.step:,} of {status.max_steps:,}"))
    if view.seconds_left is not None:
        facts.append(("time left", f"about {duration(view.seconds_left)}"))
    if status.used_s:
        facts.append(("time so far", duration(status.used_s)))
    if status.used_usd is not None:
        facts.append(("cost so far", f"{status.used_usd:,.2f} USD"))
    if status.is_live and view.silent_s >= 15:
        facts.append(("last sign of life", f"{duration(view.silent_s)} ago"))
    shown = "".join(f'<span><span class="what">{name}</span> {html.escape(text)}</span>' for name, text in facts)
    ended = status.exit_reason if status.state in ("stopped", "finished") else ""
    ended = f'<span class="what">{html.escape(ended)}</span>' if ended else ""
    badge = f'<span class="qlora-badge {html.escape(status.state)}" role="status">{html.escape(status.state)}</span>'
    head = f'<div class="qlora-head"><strong>{html.escape(view.name)}</strong>{badge}{shown}{ended}</div>'
    return head + error_html(view.trouble)


def limits(view: View) -> str:
    """Returns how much of the budget is used, with a bar for each limit; empty without a budget."""
    return _bars([(f"limit: {limit.name}", limit.share, limit.text) for limit in view.limits])


def readings(view: View) -> str:
    """Returns memory and load of each GPU of every machine, or of the processes and the CPU if there is no GPU."""
    rows: list[tuple[str, float | None, str]] = []
    gpus, process = as_readings(view.readings)
    for number, gpu in named_gpus(view.readings):
        used, total, load = (as_number(gpu.get(key)) for key in ("memory_used_gib", "memory_total_gib", "load"))
        name = number + (f" {gpu['name']}" if gpu.get("name") and len(gpus) <= 2 else "")
        if used is not None:
            of = f" of {total:.0f}" if total else ""
            rows.append((f"{name} memory", used / total if total else None, f"{used:.1f}{of} GiB"))
        if load is not None:
            rows.append((f"{number} load", load / 100, f"{load:.0f} %"))
    rss, cpu = as_number(process.get("rss_gib")), as_number(process.get("cpu_percent"))
    rows += [("process memory", None, f"{rss:.2f} GiB")] if rss is not None else []
    rows += [("CPU", None, f"{cpu:.0f} % of a core")] if cpu is not None else []
    for name, each in named_processes(view.readings):
        rss, cpu = as_number(each.get("rss_gib")), as_number(each.get("cpu_percent"))
        rows += [(f"{name} memory", None, f"{rss:.2f} GiB")] if rss is not None else []
        rows += [(f"{name} CPU", None, f"{cpu:.0f} % of a core")] if cpu is not None else []
    return _bars(rows)


def events_copy(view: View) -> str:
    """Returns the state of the copy of the TensorBoard events on S3; a failed copy is a warning, not an error."""
    if view.events_copy is None:
        return ""
    line = html.escape(plain(f"TensorBoard: {view.events_copy.line()}"))
    return f'<div class="qlora-copied{" failed" if view.events_copy.last_error else ""}" role="status">{line}</div>'


def requests(view: View) -> str:
    """Returns each request and its stage: asked, received, done."""
    return "".join(_request(request, view) for request in view.requests)


def _request(request: Request, view: View) -> str:
    name = {"stop": "Stop and save", "save": "Save now"}.get(request.kind, request.kind)
    if request.stage == "answered":
        steps, now = ["asked", "received", request.answer or "done"], 2
    elif not view.status.is_live:
        steps, now = ["asked", f"not received: the trainer is {view.status.state}"], 1
    elif request.stage == "received":
        waits = "once the model is loaded" if view.status.state == "starting" else "after this step or evaluation"
        steps, now = ["asked", f"received, follows {waits}", "done"], 1
    else:
        steps, now = [f"asked {duration(max(0, time.time() - request.asked_at))} ago", "received", "done"], 0
    shown = " → ".join(
        f'<span class="{"now" if number == now else ""}">{html.escape(step)}</span>'
        for number, step in enumerate(steps)
    )
    return f'<div class="qlora-steps" role="status">{html.escape(name)}: {shown}</div>'


def log(view: View) -> str:
    """Returns the last lines of the log."""
    if not view.log:
        return ""
    lines = html.escape("\n".join(view.log))
    return f'<div class="qlora-tail" tabindex="0" aria-label="log"><pre>{lines}</pre></div>'


def _bars(rows: Sequence[tuple[str, float | None, str]]) -> str:
    if not rows:
        return ""
    return f'<div class="qlora-bars">{"".join(_bar(*row) for row in rows)}</div>'


def _bar(name: str, share: float | None, text: str) -> str:
    label, value = f"<span>{html.escape(name)}</span>", f"<span>{html.escape(text)}</span>"
    if share is None:
        return f'<div class="plain">{label}{value}</div>'
    full = " full" if share >= 0.95 and not name.endswith("load") else ""  # a GPU should be busy
    width = 100 * min(1.0, max(0.0, share))
    return f'<div>{label}<div class="qlora-meter{full}"><div style="width:{width:.1f}%"></div></div>{value}</div>'
