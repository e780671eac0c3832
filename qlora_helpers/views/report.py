"""The report page: what ran, how good the model became, and what it cost, in one file that needs no network.

This module says what the page contains; `report.html` lays it out and `style.css` styles it. It reads nothing but the run folder,
and for a missing part the page says what makes it. Every text loses its control characters and is escaped by the template engine,
so nothing in a dialogue is ever executed.
"""

from __future__ import annotations

import importlib.resources
import shlex
from pathlib import Path
from typing import Any

from qlora_helpers import __version__
from qlora_helpers.base.files import write_text
from qlora_helpers.base.style import stylesheet
from qlora_helpers.base.text import plain, short_name
from qlora_helpers.base.units import duration
from qlora_helpers.data.prepared_file import read_prepared_file
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.status import stopped_by
from qlora_helpers.views import report_facts as facts
from qlora_helpers.views.data_card import card_of
from qlora_helpers.views.file_links import KeptFile
from qlora_helpers.views.monitor import LossCurve
from qlora_helpers.views.report_parts import Parts, read_parts
from qlora_helpers.views.report_scores import (
    about_scores,
    confusions,
    has_scores,
    intervals,
    main_card,
    outcomes,
    percent,
    score_header,
    score_rows,
    shown_dialogues,
    signed,
    verdicts,
)
from qlora_helpers.views.report_suite import suite

NOTES_SHOWN = 20


def write_report(run: Run) -> KeptFile:
    """Writes the run's `report.html`, whole or not at all. For a missing part the page says what makes it.

    Returns:
        The path of the page; in a notebook it shows as links to open and to download it.

    Raises:
        RunError: the run does not exist, or one of its files is damaged.
    """
    parts = read_parts(run)
    write_text(run.report_path, template("report.html").render(_page(parts)))
    return KeptFile(run.report_path)


def template(name: str) -> Any:
    """Returns the template of a page; it escapes every value and drops its control characters.

    Args:
        name: of a file beside this module.
    """
    import jinja2

    def shown(value: Any) -> Any:
        return value if hasattr(value, "__html__") else plain(str(value))

    environment = jinja2.Environment(
        autoescape=True, finalize=shown, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = importlib.resources.files("qlora_helpers.views") / name
    return environment.from_string(page.read_text(encoding="utf-8"))


def _page(parts: Parts) -> dict[str, Any]:
    from markupsafe import Markup

    return {
        "style": Markup(stylesheet("colours", "report")),
        "name": parts.run.name,
        "version": __version__,
        "state": parts.status.state,
        "lead": _lead(parts),
        "banners": _banners(parts),
        "headlines": _headlines(parts),
        "scores": score_rows(parts.evaluation),
        "score_header": score_header(parts.evaluation),
        "about_scores": about_scores(parts.evaluation),
        "confusions": confusions(parts.evaluation),
        "verdicts": [] if parts.has_random_weights else verdicts(parts.evaluation),
        "intervals": [] if parts.has_random_weights else intervals(parts.evaluation),
        "outcomes": [] if parts.has_random_weights else outcomes(parts.evaluation),
        "votes": [] if parts.has_random_weights else list(parts.votes),
        "suite": suite(parts.run),
        "form": parts.evaluation.get("form", [])[:1],
        "chart": Markup(parts.curve.svg("currentColor")),  # made by matplotlib, with the run's name escaped
        "loss_notes": _loss_notes(parts.curve),
        "dialogues": shown_dialogues(parts.evaluation),
        "held_out": len(parts.evaluation.get("rows", ())),
        "facts": facts.asked(parts) + facts.measured(parts),
        "parameters": facts.parameters(parts),
        "memory": facts.memory(parts),
        "labels": facts.labels(parts.prepared),
        "card": _card_of_data(parts),
        "notes": parts.prepared.get("notes", [])[:NOTES_SHOWN],
        "more_notes": max(0, len(parts.prepared.get("notes", [])) - NOTES_SHOWN),
        "reload": facts.reload(parts.plan.get("reload")),
        "settings": facts.settings(parts.config, parts.plan.get("decisions", ())),
        "command": lambda step: f"python -m qlora_helpers {step} {_run_argument(parts.run)}",
    }


def _card_of_data(parts: Parts) -> dict[str, Any]:
    """Returns the data card: the verdict, its reasons, facts and the histogram of lengths; empty before the data are prepared."""
    from markupsafe import Markup

    prepared = read_prepared_file(parts.run.data_dir)
    if prepared is None:
        return {}
    card = card_of(parts.run, prepared)
    word, reasons = card.verdict()
    return {"verdict": word, "reasons": reasons, "facts": card.facts(), "histogram": Markup(card.histogram_html())}


def _run_argument(run: Run) -> str:
    """Returns the run as the command line takes it: its name if it is in `runs`, else its path."""
    return shlex.quote(run.name if run.folder == Path("runs") / run.name else str(run.folder))


def _lead(parts: Parts) -> str:
    rows = parts.prepared.get("report", {}).get("rows")
    verb = "learned" if parts.measured else "will learn"
    examples = f" from {rows:,} examples" if rows else ""
    steps = f", in {parts.measured['steps']:,} steps on {facts.machine(parts)}" if parts.measured else ""
    return f"{short_name(parts.config.model.name)} {verb} to summarise chat dialogues{examples}{steps}."


def _banners(parts: Parts) -> list[str]:
    status, found = parts.status, []
    if parts.has_random_weights:
        found.append(
            "This model has random weights, so its answers and scores mean nothing. The run only shows that the steps work."
        )
    step = f"step {status.step:,} of {status.max_steps:,}"
    if status.is_live:
        found.append(f"Training is at {step} and still running; the figures below will change.")
    elif status.state == "stopped":
        found.append(
            f"Training was stopped {stopped_by(status.exit_reason)} at {step}; the figures are for the adapter at that step."
        )
    elif status.state in ("failed", "dead"):
        why = "; ".join(filter(None, (status.exit_reason, status.last_error)))
        found.append(f"Training ended early, at {step}: {why.rstrip('.')}.")
    return found


def _headlines(parts: Parts) -> list[dict[str, Any]]:
    """Returns the four large figures: name, `before` and `after` (or `after` alone), a line below, and whether it is better."""
    names = ["ROUGE-L of the answers", "Answers that end by themselves", "Training time", "Peak memory"]
    cards = [_card(name) for name in names]
    if has_scores(parts.evaluation):
        base, tuned = parts.evaluation["scores"]["base"], parts.evaluation["scores"]["tuned"]
        more = tuned["stop_rate"] - base["stop_rate"]
        # With random weights every change is chance, neither good nor bad.
        good = 0 if parts.has_random_weights else 1
        if main := main_card(parts.evaluation):
            gain, name = main["gain"], f"{main['name']} of the answers"
            cards[0] = _card(name, main["after"], f"{signed(gain)[0]}{main['change']}", good * gain, main["before"])
        cards[1] = _card(
            names[1],
            percent(tuned["stop_rate"]),
            f"{signed(100 * more, 0)} points",
            good * more,
            percent(base["stop_rate"]),
        )
    if measured := parts.measured:
        sessions = f"the last of {parts.status.session} sessions; " if parts.status.session > 1 else ""
        speed = f"{sessions}{measured['tokens_per_s']:,.0f} tokens/s"
        cards[2] = _card(names[2], duration(measured["seconds"]), speed)
        where = (
            "the whole process"
            if all(name.startswith("cpu") for name in measured["peak_gib"])
            else "tensors on the fullest GPU"
        )
        cards[3] = _card(names[3], f"{max(measured['peak_gib'].values()):.2f} GiB", where)
    return cards


def _card(name: str, after: str = "", below: str = "", change: float = 0.0, before: str = "") -> dict[str, Any]:
    return {"name": name, "before": before, "after": after, "below": below, "change": change}


def _loss_notes(curve: LossCurve) -> list[str]:
    notes = []
    for name, points in (("Training loss", curve.loss), ("Evaluation loss", curve.eval_loss)):
        if points:
            (first, start), (last, end) = points[0], points[-1]
            moved = f"{start:.3f} → {end:.3f}, steps {first} to {last}" if last > first else f"{end:.3f} at step {last}"
            notes.append(f"{name}: {moved}.")
    if curve.eval_loss:
        step, lowest = min(curve.eval_loss, key=lambda point: point[1])
        if lowest < curve.eval_loss[-1][1]:
            notes.append(f"It was lowest ({lowest:.3f}) at step {step}; later steps did not improve it.")
    return notes
