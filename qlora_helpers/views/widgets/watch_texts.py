"""The texts of the watch panel as HTML: state, budget, readings and requests. Everything that comes from files is escaped."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence

from qlora_helpers.base.text import plain
from qlora_helpers.base.units import duration
from qlora_helpers.runs.requests import Request
from qlora_helpers.runs.status import INTERRUPTED, PHASES, Status
from qlora_helpers.views.follow import View
from qlora_helpers.views.readings import as_number, as_readings, named_gpus, named_processes
from qlora_helpers.views.widgets.panel import error_html


def state(view: View) -> str:
    """Returns name, state, what the trainer does now, step, time left, time and cost, and what went wrong."""
    status = view.status
    facts = []
    if status.max_steps:
        facts.append(("step", f"{status.step:,} of {status.max_steps:,}"))
    if view.seconds_left is not None:
        until = f", until {view.left_until} ends it" if view.left_until else ""
        facts.append(("time left", f"about {duration(view.seconds_left)}{until}"))
    facts += _sums(status)
    if status.is_live and view.silent_s >= 15:
        facts.append(("last sign of life", f"{duration(view.silent_s)} ago"))
    shown = "".join(f'<span><span class="what">{name}</span> {html.escape(text)}</span>' for name, text in facts)
    ended = _ended(status)
    ended = f'<span class="what">{html.escape(ended)}</span>' if ended else ""
    name = "no folder" if view.is_gone else status.state
    badge = f'<span class="qlora-badge {html.escape(status.state)}" role="status">{html.escape(name)}</span>'
    now = f'<span class="qlora-phase" role="status">{status.phase}</span>' if shows_phase(status) else ""
    head = f'<div class="qlora-head"><strong>{html.escape(view.name)}</strong>{badge}{now}{shown}{ended}</div>'
    return head + error_html(gone(view) or view.trouble)


def gone(view: View) -> str:
    """Says that the run has no folder; empty where it has one."""
    if not view.is_gone:
        return ""
    return f"The folder of the run {view.name!r} is gone: it was deleted, renamed or never made. There is nothing to start."


def shows_phase(status: Status) -> bool:
    """Whether a trainer is alive and says what it does now."""
    return status.is_live and status.phase in PHASES


def _sums(status: Status) -> list[tuple[str, str]]:
    """Returns time and cost: of this session, and of all sessions where there were several."""
    if not status.used_s:
        return []
    several = status.session > 1 and status.spent_s > 0
    session = [duration(status.session_s)] if status.session_s else []
    session += [f"{status.session_usd:,.2f} USD"] if status.session_usd is not None else []
    whole = [duration(status.used_s)] + ([f"{status.used_usd:,.2f} USD"] if status.used_usd is not None else [])
    if not several:
        return [("so far", ", ".join(whole))]
    return [("this session", ", ".join(session)), (f"all {status.session} sessions", ", ".join(whole))]


def _ended(status: Status) -> str:
    if status.state not in ("stopped", "finished"):
        return ""
    if status.exit_reason == INTERRUPTED:
        return "interrupted: Resume continues from the last good checkpoint"
    return status.exit_reason or ""


def progress(view: View) -> str:
    """Returns the bar of steps."""
    status = view.status
    share = min(1.0, status.step / status.max_steps) if status.max_steps else 0.0
    return (
        f'<div class="qlora-progress {html.escape(status.state)}" role="progressbar" aria-label="optimizer steps" '
        f'aria-valuemin="0" aria-valuemax="{status.max_steps}" aria-valuenow="{min(status.step, status.max_steps)}">'
        f'<div style="width:{100 * share:.1f}%"></div></div>'
    )


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
