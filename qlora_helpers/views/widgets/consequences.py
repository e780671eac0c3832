"""What settings lead to: a few figures, and a bar for each GPU against its limit, as HTML and as text.

`forecast` makes the figures; this module puts them into words and bars.
"""

from __future__ import annotations

import html

from qlora_helpers.base.tables import Table
from qlora_helpers.base.units import duration, gib
from qlora_helpers.planning.cost import TrainingCost
from qlora_helpers.planning.forecast import Fix, Forecast, changed_settings
from qlora_helpers.planning.gpu_memory import GpuMemory
from qlora_helpers.planning.layout import MEANING

# name -> (parts of `GpuMemory`, colour in the stylesheet); the colours are distinct to colour-blind readers on white and on black
PARTS: dict[str, tuple[tuple[str, ...], str]] = {
    "weights": (("weights_quantized", "gathered", "constants", "weights_other"), "weights"),
    "adapters": (("adapters",), "adapters"),
    "gradients, optimizer": (("gradients", "optimizer"), "gradients"),
    "activations": (("activations",), "activations"),
    "working": (("working",), "working"),
    "reserve": (("fragmentation", "context"), "reserve"),
}


def parts_gib(memory: GpuMemory) -> dict[str, float]:
    """Returns the GiB of each part that a bar shows."""
    each = memory.parts_gib()
    return {name: sum(each[part] for part in parts) for name, (parts, _) in PARTS.items()}


def figures(found: Forecast) -> dict[str, str]:
    """Returns the few numbers that a person changes settings for, by name."""
    step = found.step
    dollars = "no price known" if step.dollars is None else f"${step.dollars:,.2f}"
    dollars = "under 1 cent" if dollars == "$0.00" and step.dollars else dollars
    return {
        f"trainable parameters, {found.adapter_parameters / found.parameters:.3%} of all": f"{found.adapter_parameters:,}",
        "tokens/s": f"{step.tokens_per_s:,.0f}",
        f"for {found.steps:,} steps": duration(step.seconds),
        "on " + found.hardware.label: dollars,
    }


def how(found: Forecast) -> str:
    """Returns how a step is computed, including what the trainer chooses for automatic settings."""
    step = found.step
    layers = "every layer" if step.checkpointed == step.layers else f"{step.checkpointed} of {step.layers} layers"
    layers = layers if step.checkpointed else "no layer"
    compiled = "compiled" if step.compiled else "not compiled"
    compiled += ", with CUDA graphs" if step.captured else ""
    batches = f"{step.gradient_accumulation_steps} batch{'es' * (step.gradient_accumulation_steps != 1)} per step"
    batches += f" in each of {step.processes} processes" if step.processes > 1 else ""
    size = f"batches of {step.micro_batch_size} x {step.seq_len_tokens:,} tokens, {batches}"
    return f"{size}; activation checkpointing in {layers}; {compiled}"


def fix_text(fix: Fix) -> str:
    """Returns a fix as one sentence."""
    change = ", ".join(fix.settings) or "other hardware"
    return f"{change} ({fix.text})"


def short(found: Forecast, cost: TrainingCost | None = None) -> str:
    """Returns the consequences in one line, for where the figures are not in sight.

    Args:
        found: on GPUs.
        cost: on this machine's CPU, if that is planned for.
    """
    if cost is not None:
        time = "time not known" if cost.seconds is None else f"about {duration(cost.seconds)}"
        return f"{time} on {cost.machine}" + (f", ${cost.dollars:,.2f}" if cost.dollars is not None else "")
    room = found.hardware.usable_gib - found.step.peak_gib
    fits = f"Fits, {room:.1f} GiB stay free" if found.fits else f"Does not fit, {found.shortfall_gib:.1f} GiB too much"
    price = "" if found.step.dollars is None else f", ${found.step.dollars:,.2f}"
    return f"{fits}; {duration(found.step.seconds)} on {found.hardware.label}{price}"


def cpu_verdict(cost: TrainingCost) -> str:
    """Returns what training on this machine's CPU means, in a sentence."""
    if cost.seconds is None:
        return f"How long it takes on {cost.machine} is not known"
    if cost.is_long:
        return f"This takes hours on {cost.machine}: about {duration(cost.seconds)} for {cost.steps:,} steps"
    return f"Trains on {cost.machine} in about {duration(cost.seconds)}"


def cpu_figures(found: Forecast, cost: TrainingCost) -> dict[str, str]:
    """Returns the figures of `figures` for this machine's CPU, whose memory is not planned."""
    share = f"{found.adapter_parameters / found.parameters:.3%} of all"
    figures = {
        f"trainable parameters, {share}": f"{found.adapter_parameters:,}",
        f"tokens in {cost.rows:,} rows and {cost.epochs:.3g} epochs": f"{cost.tokens:,}",
    }
    figures[f"for {cost.steps:,} steps on {cost.machine}"] = (
        "not known" if cost.seconds is None else duration(cost.seconds)
    )
    return figures | ({"price": f"${cost.dollars:,.2f}"} if cost.dollars is not None else {})


def cpu_html(found: Forecast, cost: TrainingCost) -> str:
    """Returns these figures, with what a GPU would make of it."""
    return _figures_html(cpu_figures(found, cost)) + (
        f'<div class="muted">This machine has no GPU. On {html.escape(found.hardware.label)}: '
        f"{html.escape(short(found).partition(' on ')[0])}</div>"
    )


def cpu_table(found: Forecast, cost: TrainingCost) -> Table:
    """Returns the same as a table."""
    rows = [[name, value] for name, value in cpu_figures(found, cost).items()]
    rows += [["verdict", cpu_verdict(cost)], [f"on {found.hardware.label}", short(found)]]
    return Table(["consequence", "predicted"], [*rows, *(["note", note] for note in found.notes)])


def verdict(found: Forecast) -> str:
    """Returns whether the run fits, in a sentence, and if not the smallest fix."""
    if found.fits:
        room = found.hardware.usable_gib - found.step.peak_gib
        return f"Fits: {room:.1f} of {found.hardware.usable_gib:.1f} GiB stay free on the fullest GPU"
    fixes = "; or: ".join(map(fix_text, found.fixes)) or "none is known"
    return f"Does not fit: {found.shortfall_gib:.1f} GiB too much on the fullest GPU. Smallest fix: {fixes}"


def plan_text(found: Forecast) -> str:
    """Returns what the plan would change, or how a start shares the work, in a sentence or two."""
    choice = found.plan.choice
    if found.started:
        return _start_text(found)
    if choice is None:
        return "The plan finds nothing that fits"
    if not found.plan_is_faster:
        return "The plan finds nothing faster"
    changes = changed_settings(found.plan.workload.config, choice.settings)
    return f"Faster by the plan: {', '.join(changes)} ({duration(choice.seconds)}, {choice.peak_gib:.1f} GiB)"


def _start_text(found: Forecast) -> str:
    step, spread = found.step, found.spread
    if found.plan.choice is None:
        return "The plan finds nothing that fits on these GPUs"
    text = f"Started by ql.start or qlora train: {step.share}, in which {MEANING[step.share]}"
    if spread is None:
        return text
    fits = "" if spread.peak_gib <= found.hardware.usable_gib else ", which does not fit"
    return (
        f"{text}. A model that is loaded in this kernel trains in one process, its layers spread over the GPUs: "
        f"{spread.peak_gib:.1f} GiB, {spread.tokens_per_s:,.0f} tokens/s, {duration(spread.seconds)}{fits}"
    )


def consequences_html(found: Forecast) -> str:
    """Returns figures and bars in JupyterLab's own colours."""
    bars = "".join(_bar(index, found) for index in range(len(found.step.memory)))
    fullest = max(found.step.memory, key=lambda each: each.total)
    legend = "".join(
        f'<span><i style="background:var(--qlora-{PARTS[name][1]})"></i>{name} {value:.2f}</span>'
        for name, value in parts_gib(fullest).items()
    )
    return (
        f'{_figures_html(figures(found))}<div class="muted">{html.escape(how(found))}</div>'
        f'{bars}<div class="qlora-legend muted"><span>GiB on the fullest GPU:</span>{legend}</div>'
    )


def _figures_html(figures: dict[str, str]) -> str:
    shown = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in figures.items()
    )
    return f'<div class="qlora-figures">{shown}</div>'


def _gpu_label(index: int, found: Forecast) -> str:
    """Names the GPUs of a bar: those of several processes hold as much as each other."""
    step = found.step
    return f"Each of {step.layout.gpus} GPUs" if step.processes > 1 else f"GPU {index}"


def _bar(index: int, found: Forecast) -> str:
    memory = found.step.memory[index]
    name = _gpu_label(index, found)
    layers = "" if found.step.processes > 1 else f" · {found.step.layers_per_gpu[index]} layers"
    total, usable = gib(memory.total), found.hardware.usable_gib
    scale = 100 / (1.03 * max(usable, found.step.peak_gib))
    pieces = "".join(
        f'<i style="width:{value * scale:.2f}%;background:var(--qlora-{PARTS[name][1]})" title="{name}: {value:.2f} GiB"></i>'
        for name, value in parts_gib(memory).items()
    )
    over = total > usable
    label = f"{name}: {total:.1f} of {usable:.1f} GiB{', does not fit' if over else ''}"
    return (
        f'<div class="qlora-gpu{" qlora-over" if over else ""}" role="img" aria-label="{label}">'
        f"<span>{name}{layers}</span>"
        f'<div class="qlora-bar">{pieces}<u style="left:{usable * scale:.2f}%" title="usable: {usable:.1f} GiB"></u></div>'
        f"<span>{total:.1f} of {usable:.1f} GiB</span></div>"
    )


def notes_html(found: Forecast, *more: str) -> str:
    """Returns what a reader must know about the figures, in small print."""
    price = found.hardware.price_note
    notes = [*more, *found.notes, *([f"price: {price}"] if price else [])]
    return "".join(f'<div class="muted qlora-note">{html.escape(note)}</div>' for note in notes)


def consequences_table(found: Forecast) -> Table:
    """Returns the same as a table, for places without widgets."""
    rows = [[name, value] for name, value in figures(found).items()]
    rows.append(["each step", how(found)])
    for index, memory in enumerate(found.step.memory):
        inside = ", ".join(f"{name} {value:.2f}" for name, value in parts_gib(memory).items() if value >= 0.005)
        rows.append(
            [_gpu_label(index, found), f"{gib(memory.total):.1f} of {found.hardware.usable_gib:.1f} GiB: {inside}"]
        )
    rows += [["verdict", verdict(found)], ["plan", plan_text(found)]]
    rows += [["note", note] for note in found.notes]
    return Table(["consequence", "predicted"], rows)
