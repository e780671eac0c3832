"""The page at the end: what ran, how good it became, and what it cost, in one file that needs no network.

Owns what the page says; how it looks is `report.html`'s. Reads the run folder alone, and says of a missing part what makes it.
Every text loses its control characters and is escaped by the template engine, so nothing in a dialogue is ever run.
"""

from __future__ import annotations

import importlib.resources
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers import __version__
from qlora_helpers.base.config import SECTIONS, RunConfig, describe
from qlora_helpers.base.files import read_json, write_text
from qlora_helpers.base.text import plain, short_name
from qlora_helpers.base.units import duration
from qlora_helpers.data.known import DATA_LICENCES
from qlora_helpers.data.labels import LabelReport
from qlora_helpers.model.shapes.catalog import MODEL_LICENCES
from qlora_helpers.runs.folder import Run, Status
from qlora_helpers.runs.status import stopped_by
from qlora_helpers.views.monitor import LossCurve, loss_curve
from qlora_helpers.views.report_scores import (
    has_scores,
    intervals,
    outcomes,
    percent,
    score_rows,
    shown_dialogues,
    signed,
    verdicts,
)

NOTES_SHOWN = 20


def write_report(run: Run) -> Path:
    """Writes the run's `report.html`, whole or not at all; parts that are not there yet are named with what makes them.

    Returns:
        The page's path.

    Raises:
        RunError: the run does not exist, or one of its files is damaged.
    """
    parts = _read(run)
    write_text(run.report_path, _template().render(_page(parts)))
    return run.report_path


@dataclass(frozen=True)
class _Parts:
    """What is in the run folder; an empty dict stands for a file that is not there."""

    run: Run
    config: RunConfig
    status: Status
    curve: LossCurve
    plan: dict[str, Any]
    evaluation: dict[str, Any]
    prepared: dict[str, Any]
    adapter: dict[str, Any]

    @property
    def measured(self) -> dict[str, Any]:
        return self.plan.get("measured", {})

    @property
    def has_random_weights(self) -> bool:
        return self.evaluation.get("random_weights", self.config.model.name.startswith("random:"))


def _read(run: Run) -> _Parts:
    def found(path: Path) -> dict[str, Any]:
        return read_json(path) if path.exists() else {}

    return _Parts(
        run,
        run.config(),
        run.status(),
        loss_curve(run),
        found(run.plan_path),
        found(run.evaluation_path),
        found(run.data_dir / "prepared.json"),
        found(run.adapter_dir / "adapter_config.json"),
    )


def _template() -> Any:
    import jinja2

    def shown(value: Any) -> Any:
        return value if hasattr(value, "__html__") else plain(str(value))

    environment = jinja2.Environment(
        autoescape=True, finalize=shown, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = importlib.resources.files("qlora_helpers.views") / "report.html"
    return environment.from_string(page.read_text(encoding="utf-8"))


def _page(parts: _Parts) -> dict[str, Any]:
    from markupsafe import Markup

    return {
        "name": parts.run.name,
        "version": __version__,
        "state": parts.status.state,
        "lead": _lead(parts),
        "banners": _banners(parts),
        "headlines": _headlines(parts),
        "scores": score_rows(parts.evaluation),
        "verdicts": [] if parts.has_random_weights else verdicts(parts.evaluation),
        "intervals": [] if parts.has_random_weights else intervals(parts.evaluation),
        "outcomes": [] if parts.has_random_weights else outcomes(parts.evaluation),
        "form": parts.evaluation.get("form", [])[:1],
        "chart": Markup(parts.curve.svg("currentColor")),  # ours: matplotlib's, with the run's name escaped
        "loss_notes": _loss_notes(parts.curve),
        "dialogues": shown_dialogues(parts.evaluation),
        "held_out": len(parts.evaluation.get("rows", ())),
        "facts": _asked_facts(parts) + _measured_facts(parts),
        "parameters": _parameters(parts),
        "memory": _memory(parts),
        "labels": _labels(parts.prepared),
        "notes": parts.prepared.get("notes", [])[:NOTES_SHOWN],
        "more_notes": max(0, len(parts.prepared.get("notes", [])) - NOTES_SHOWN),
        "reload": _reload(parts.plan.get("reload")),
        "settings": _settings(parts.config),
        "command": lambda step: f"python -m qlora_helpers {step} {_spoken_of(parts.run)}",
    }


def _spoken_of(run: Run) -> str:
    """The run as the command line takes it: a name where it stands below `runs`, else its path."""
    return shlex.quote(run.name if run.folder == Path("runs") / run.name else str(run.folder))


def _lead(parts: _Parts) -> str:
    rows = parts.prepared.get("report", {}).get("rows")
    verb = "learned" if parts.measured else "is to learn"
    examples = f" from {rows:,} examples" if rows else ""
    steps = f", in {parts.measured['steps']:,} steps on {_machine(parts)}" if parts.measured else ""
    return f"{short_name(parts.config.model.name)} {verb} to summarise chat dialogues{examples}{steps}."


def _banners(parts: _Parts) -> list[str]:
    status, found = parts.status, []
    if parts.has_random_weights:
        found.append(
            "This model has random weights: its answers and their scores mean nothing. The run shows that the steps work."
        )
    step = f"step {status.step:,} of {status.max_steps:,}"
    if status.is_live:
        found.append(f"Training is still going on, at {step}: the figures below will change.")
    elif status.state == "stopped":
        found.append(
            f"Training was stopped {stopped_by(status.exit_reason)} at {step}; the figures are those of the adapter as it was then."
        )
    elif status.state in ("failed", "dead"):
        why = "; ".join(filter(None, (status.exit_reason, status.last_error)))
        found.append(f"Training ended early, at {step}: {why.rstrip('.')}.")
    return found


def _headlines(parts: _Parts) -> list[dict[str, Any]]:
    """The four large figures: name, `before` and `after` (or `after` alone), a line below, and whether it is better."""
    names = ["ROUGE-L of the summaries", "Answers that end by themselves", "Training time", "Peak memory"]
    cards = [_card(name) for name in names]
    if has_scores(parts.evaluation):
        base, tuned = parts.evaluation["scores"]["base"], parts.evaluation["scores"]["tuned"]
        gain, more = parts.evaluation["rouge_l_gain"], tuned["stop_rate"] - base["stop_rate"]
        # Random weights make every change a matter of chance: neither good nor bad.
        good = 0 if parts.has_random_weights else 1
        cards[0] = _card(
            names[0], f"{tuned['rouge_l']:.1f}", f"{signed(gain)} points", good * gain, f"{base['rouge_l']:.1f}"
        )
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
        where = "the whole process" if set(measured["peak_gib"]) == {"cpu"} else "tensors on the fullest GPU"
        cards[3] = _card(names[3], f"{max(measured['peak_gib'].values()):.2f} GiB", where)
    return cards


def _card(name: str, after: str = "", below: str = "", change: float = 0.0, before: str = "") -> dict[str, Any]:
    return {"name": name, "before": before, "after": after, "below": below, "change": change}


def _loss_notes(curve: LossCurve) -> list[str]:
    said = []
    for name, points in (("Training loss", curve.loss), ("Evaluation loss", curve.eval_loss)):
        if points:
            (first, start), (last, end) = points[0], points[-1]
            moved = f"{start:.3f} → {end:.3f}, steps {first} to {last}" if last > first else f"{end:.3f} at step {last}"
            said.append(f"{name}: {moved}.")
    if curve.eval_loss:
        step, lowest = min(curve.eval_loss, key=lambda point: point[1])
        if lowest < curve.eval_loss[-1][1]:
            said.append(f"It was lowest ({lowest:.3f}) at step {step}: the steps after that did not help.")
    return said


def _asked_facts(parts: _Parts) -> list[tuple[str, str]]:
    """What was asked for, by the settings and the prepared data."""
    model, data, adapter, train = (getattr(parts.config, name) for name in ("model", "data", "adapter", "train"))
    licence = MODEL_LICENCES.get(model.name, "licence: see the model's card")
    if model.name.startswith("random:"):
        licence = "random weights"
    revision = f" at {model.revision}" if model.revision else ""
    double = ", double quantisation" if model.double_quantization else ""
    facts = [
        ("Model", f"{short_name(model.name, keep_owner=True)}{revision} ({licence})"),
        ("Weights", f"4-bit NF4{double}" if model.quantization == "nf4" else "not quantised"),
    ]
    if parts.prepared:
        reports = (parts.prepared[key]["rows"] for key in ("report", "eval_report"))
        rows = (*reports, len(parts.prepared["test"]))
        facts.append(("Data", parts.prepared["source"]))
        facts.append(("Rows", "{:,} for training, {:,} for the loss in between, {:,} held out".format(*rows)))
    else:
        facts.append(("Data", f"{short_name(data.source)} ({DATA_LICENCES.get(data.source, 'licence not known yet')})"))
    targets = parts.adapter.get("target_modules") or adapter.target_modules or ["the architecture's linear layers"]
    variant = ", rank-stabilised" * adapter.use_rslora + ", DoRA" * adapter.use_dora
    unit = f"blocks of {data.seq_len_tokens:,} tokens" if parts.prepared.get("packed", data.packing) else "rows"
    batch = train.micro_batch_size * train.gradient_accumulation_steps
    return [
        *facts,
        ("Prompt", "the recipe's plain text" if data.template == "recipe" else "the model's own chat template"),
        ("Trained tokens", "the summary and its end" if data.loss_on == "summary" else "everything, prompt included"),
        ("Adapter", f"LoRA, r={adapter.r}, alpha={adapter.lora_alpha}, dropout {adapter.lora_dropout:g}{variant}"),
        ("Adapted layers", ", ".join(sorted(targets))),
        ("Batch", f"{batch} {unit} a step, per process"),
        ("Learning rate", f"{train.learning_rate:g}, {train.lr_scheduler_type}"),
    ]


def _measured_facts(parts: _Parts) -> list[tuple[str, str]]:
    """What happened, as far as it was measured."""
    facts = []
    if measured := parts.measured:
        facts += [
            ("Steps", f"{measured['steps']:,}"),
            ("Training time", f"{measured['seconds']:,.0f} seconds, evaluation in between included"),
            ("Machine", _machine(parts)),
            ("Versions", ", ".join(f"{name} {number}" for name, number in measured["versions"].items())),
            ("Ended", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(parts.status.heartbeat))),
        ]
    if "demo_seconds" in parts.plan:
        facts.append(("Whole job", f"{duration(parts.plan['demo_seconds'])}, loading and evaluation included"))
    return facts


def _machine(parts: _Parts) -> str:
    """`a CPU`, or the GPUs' names; never the machine's own name."""
    name = parts.measured["machine"]
    return "a CPU" if name == "CPU" else name


def _parameters(parts: _Parts) -> dict[str, str]:
    if not parts.measured:
        return {}
    trained, total = parts.measured["trainable_parameters"], parts.measured["parameters"]
    return {
        "trained": f"{trained:,}",
        "total": f"{total:,}",
        "percent": f"{100 * trained / total:.2f}\N{NO-BREAK SPACE}%",
        "published": f"{parts.measured['published_parameters']:,}",
    }


def _memory(parts: _Parts) -> list[tuple[str, str, str]]:
    weights, peak = (parts.measured.get(key, {}) for key in ("weights_gib", "peak_gib"))
    return [
        (name, *(f"{values[name]:.2f} GiB" if name in values else "" for values in (weights, peak)))
        for name in dict.fromkeys([*weights, *peak])
    ]


def _labels(prepared: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The label reports of the two sets, line by line."""
    if not prepared:
        return []
    train, evaluation = (LabelReport(**prepared[key]) for key in ("report", "eval_report"))
    return [(name, ours, theirs) for (name, ours), (_, theirs) in zip(train.lines(), evaluation.lines(), strict=True)]


def _reload(check: Mapping[str, Any] | None) -> dict[str, Any]:
    if check is None:
        return {}
    off = check["largest_difference"]
    logits = f"differ by {off:.1e} at most" if off else "are equal"
    text = f"{check['same_answers']} of {check['prompts']} answers are the same to the letter, the next-token logits {logits}."
    return {"passed": check["same_answers"] == check["prompts"], "text": text}


def _settings(config: RunConfig) -> list[dict[str, Any]]:
    """Every setting with its value, its default where it differs, and what it is."""
    return [
        {
            "name": f"{section}.{row['name']}",
            "value": _spoken(row["value"]),
            "default": "" if row["value"] == default["value"] else _spoken(default["value"]),
            "text": row["text"],
        }
        for section, kind in SECTIONS.items()
        for row, default in zip(describe(getattr(config, section)), describe(kind), strict=True)
    ]


def _spoken(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return ", ".join(value) if isinstance(value, tuple) else str(value)
