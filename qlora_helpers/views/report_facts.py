"""The facts on the report page: what was asked for, what ran, what it took, and every setting.

Functions take the files of a run and return plain values for the template. This module imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_helpers.base.config import SECTIONS, RunConfig, describe
from qlora_helpers.base.text import short_name
from qlora_helpers.base.units import duration
from qlora_helpers.data.known import DATA_LICENCES
from qlora_helpers.data.label_report import LabelReport
from qlora_helpers.data.plain_templates import template_name
from qlora_helpers.model.shapes.catalog import MODEL_LICENCES
from qlora_helpers.model.shapes.expert_targets import EXPERTS
from qlora_helpers.views.report_parts import Parts

PROMPTS = {
    "recipe": "the recipe's plain text",
    "plain": "plain text with a line that names each role",
    "chat": "the model's own chat template",
    "auto": "the model's own chat template where it works, else plain text",
}


def asked(parts: Parts) -> list[tuple[str, str]]:
    """Returns what was asked for, according to the settings and the prepared data."""
    model, data, adapter, train = (getattr(parts.config, name) for name in ("model", "data", "adapter", "train"))
    licence = MODEL_LICENCES.get(model.name, "licence: see the model card")
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
        facts.append(("Rows", "{:,} for training, {:,} for the evaluation loss, {:,} held out".format(*rows)))
    else:
        facts.append(("Data", f"{short_name(data.source)} ({DATA_LICENCES.get(data.source, 'licence not known yet')})"))
    held = [*(parts.adapter.get("target_modules") or ()), *(parts.adapter.get("target_parameters") or ())]
    targets = held or adapter.target_modules or ["the linear layers of the architecture"]
    targets = list(dict.fromkeys(_shown(name) for name in targets))
    variant = ", rank-stabilised" * adapter.use_rslora + ", DoRA" * adapter.use_dora
    unit = (
        f"packed sequences of {data.seq_len_tokens:,} tokens" if parts.prepared.get("packed", data.packing) else "rows"
    )
    batch = train.micro_batch_size * train.gradient_accumulation_steps
    return [
        *facts,
        ("Prompt", PROMPTS[parts.prepared.get("template") or template_name(data)]),
        (
            "Trained tokens",
            "all of them, including the prompt" if data.loss_on == "all" else "the answers and their ends",
        ),
        ("Adapter", f"LoRA, r={adapter.r}, alpha={adapter.lora_alpha}, dropout {adapter.lora_dropout:g}{variant}"),
        ("Adapted layers", ", ".join(sorted(targets))),
        ("Batch", f"{batch} {unit} per step and process"),
        ("Learning rate", f"{train.learning_rate:g}, {train.lr_scheduler_type}"),
    ]


def _shown(name: str) -> str:
    """Returns the last part of a path, which is one layer of many; of a stack of experts, the last two."""
    holder, _, last = name.rpartition(".")
    holder = holder.rpartition(".")[2]
    return f"{holder}.{last}" if holder == EXPERTS else last


def measured(parts: Parts) -> list[tuple[str, str]]:
    """Returns what happened, as far as it was measured."""
    facts = []
    if measured := parts.measured:
        facts += [
            ("Steps", f"{measured['steps']:,}"),
            ("Training time", f"{measured['seconds']:,.0f} seconds, including evaluation"),
            ("Machine", machine(parts)),
            ("Versions", ", ".join(f"{name} {number}" for name, number in measured["versions"].items())),
            ("Ended", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(parts.status.heartbeat))),
        ]
    if "demo_seconds" in parts.plan:
        facts.append(("Whole job", f"{duration(parts.plan['demo_seconds'])}, including loading and evaluation"))
    return facts


def machine(parts: Parts) -> str:
    """Returns `a CPU` or the names of the GPUs, never the host name."""
    name = parts.measured["machine"]
    return "a CPU" if name == "CPU" else name


def parameters(parts: Parts) -> dict[str, str]:
    """Returns how many parameters there are and how many were trained; empty before training."""
    if not parts.measured:
        return {}
    trained, total = parts.measured["trainable_parameters"], parts.measured["parameters"]
    return {
        "trained": f"{trained:,}",
        "total": f"{total:,}",
        "percent": f"{100 * trained / total:.2f}\N{NO-BREAK SPACE}%",
        "published": f"{parts.measured['published_parameters']:,}",
    }


def memory(parts: Parts) -> list[tuple[str, str, str]]:
    """Returns each device with the memory of its weights and its peak."""
    weights, peak = (parts.measured.get(key, {}) for key in ("weights_gib", "peak_gib"))
    return [
        (name, *(f"{values[name]:.2f} GiB" if name in values else "" for values in (weights, peak)))
        for name in dict.fromkeys([*weights, *peak])
    ]


def labels(prepared: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the label reports of the two sets, line by line."""
    if not prepared:
        return []
    train, evaluation = (LabelReport(**prepared[key]) for key in ("report", "eval_report"))
    ours, theirs = dict(train.lines()), dict(evaluation.lines())
    names = sorted(
        ours | theirs, key="verdict".__eq__
    )  # in their order, the verdict last; one set may have lines of its own
    return [(name, ours.get(name, "none"), theirs.get(name, "none")) for name in names]


def reload(check: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns whether the reloaded adapter is the trained one, and the evidence; empty if that was not checked."""
    if check is None:
        return {}
    off = check["largest_difference"]
    logits = f"differ by at most {off:.1e}" if off else "are equal"
    text = f"{check['same_answers']} of {check['prompts']} answers are identical, and the next-token logits {logits}."
    return {"passed": check["same_answers"] == check["prompts"], "text": text}


def settings(config: RunConfig, decisions: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Returns every setting with its value, its default if that differs, what it does, and why it was decided so.

    Args:
        config: of the run.
        decisions: what was decided when the run was made (`plan.json`); a value that was changed since has no reason any more.
    """
    decided = {each["setting"]: each for each in decisions}
    return [
        {
            "name": f"{section}.{row['name']}",
            "value": _value_text(row["value"]),
            "default": "" if row["value"] == default["value"] else _value_text(default["value"]),
            "text": row["text"],
            "why": _reason(decided.get(f"{section}.{row['name']}"), row["value"]),
        }
        for section, kind in SECTIONS.items()
        for row, default in zip(describe(getattr(config, section)), describe(kind), strict=True)
    ]


def _reason(decision: Mapping[str, Any] | None, value: Any) -> str:
    return decision["reason"] if decision and decision["value"] == value else ""


def _value_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return ", ".join(value) if isinstance(value, tuple) else str(value)
