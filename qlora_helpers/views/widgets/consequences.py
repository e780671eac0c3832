"""What settings lead to, for a person: a few figures, and a bar for each GPU against its limit; as HTML and as text.

Owns words and colours. The figures are `forecast`'s.
"""

from __future__ import annotations

import html

from qlora_helpers.base.tables import Table
from qlora_helpers.base.units import duration, gib
from qlora_helpers.planning.forecast import Fix, Forecast
from qlora_helpers.planning.memory import GpuMemory

# name -> (parts of `GpuMemory`, colour): told apart by the colour-blind, and seen on white as on black
PARTS: dict[str, tuple[tuple[str, ...], str]] = {
    "weights": (("weights_quantized", "constants", "weights_other"), "#4e79c4"),
    "adapters": (("adapters",), "#e69f00"),
    "gradients, optimizer": (("gradients", "optimizer"), "#cc79a7"),
    "activations": (("activations",), "#009e73"),
    "working": (("working",), "#56b4e9"),
    "reserve": (("fragmentation", "context"), "#8c8c8c"),
}
STYLE = """<style>
.qlora-figures { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 2px 0 8px; }
.qlora-figures b { display: block; font-size: 18px; font-weight: 600; line-height: 1.25; font-variant-numeric: tabular-nums; }
.qlora-figures span { font-size: 11px; color: var(--jp-ui-font-color2, #6e7781); }
.qlora-gpu { display: grid; grid-template-columns: 104px 1fr 118px; gap: 8px; align-items: center; font-size: 12px;
  margin: 3px 0; font-variant-numeric: tabular-nums; }
.qlora-bar { position: relative; height: 18px; display: flex; border-radius: 3px; 
  background: var(--jp-layout-color2, #eee); box-shadow: inset 0 0 0 1px var(--jp-border-color2, #ccc); }
.qlora-bar i { display: block; height: 100%; min-width: 0; }
.qlora-bar u { position: absolute; top: -3px; bottom: -3px; width: 0; border-left: 2px solid var(--jp-ui-font-color0, #000); }
.qlora-over { color: var(--jp-error-color1, #cf222e); }
.qlora-over span:last-child { font-weight: 600; }
.qlora-gpu span { white-space: nowrap; }
.qlora-over .qlora-bar { outline: 2px solid var(--jp-error-color1, #cf222e); }
.qlora-legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 11px; margin: 6px 0 2px; }
.qlora-legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 4px; }
</style>"""


def parts_gib(memory: GpuMemory) -> dict[str, float]:
    """GiB of each part that a bar shows."""
    each = memory.parts_gib()
    return {name: sum(each[part] for part in parts) for name, (parts, _) in PARTS.items()}


def figures(found: Forecast) -> dict[str, str]:
    """The few numbers that a person turns a knob for, by name."""
    step = found.step
    dollars = "no price known" if step.dollars is None else f"${step.dollars:,.2f}"
    dollars = "under 1 cent" if dollars == "$0.00" and step.dollars else dollars
    return {
        f"trainable, {found.adapter_parameters / found.parameters:.3%} of all": f"{found.adapter_parameters:,}",
        "tokens/s": f"{step.tokens_per_s:,.0f}",
        f"for {found.steps:,} steps": duration(step.seconds),
        "on " + found.hardware.label: dollars,
    }


def how(found: Forecast) -> str:
    """How the step is taken, what `auto` and none came to included."""
    step = found.step
    again = "every layer" if step.checkpointed == step.layers else f"{step.checkpointed} of {step.layers} layers"
    again = "no layer" if not step.checkpointed else again
    compiled = "compiled" if step.compiled else "not compiled"
    compiled += ", as CUDA graphs" if step.captured else ""
    at_once = f"{step.micro_batch_size} x {step.seq_len_tokens:,} tokens at once"
    return f"{at_once}, {step.gradient_accumulation_steps} a step; {again} recomputed; {compiled}"


def fix_text(fix: Fix) -> str:
    """A mend as one sentence."""
    change = ", ".join(fix.settings) or "other hardware"
    return f"{change} ({fix.text})"


def verdict(found: Forecast) -> str:
    """Whether it fits, in a sentence; where it does not, with the smallest mend."""
    if found.fits:
        room = found.hardware.usable_gib - found.step.peak_gib
        return f"fits, {room:.1f} GiB of {found.hardware.usable_gib:.1f} free on the fullest GPU"
    fixes = "; or: ".join(map(fix_text, found.fixes)) or "none is known"
    return f"Does not fit: {found.shortfall_gib:.1f} GiB too much on the fullest GPU. Smallest mend: {fixes}"


def plan_text(found: Forecast) -> str:
    """What the plan would do instead, in a sentence or two."""
    choice, several = found.plan.choice, found.several
    text = "the plan finds nothing faster"
    if choice is None:
        text = "the plan finds nothing that fits in one process"
    elif found.plan_is_faster:
        text = f"the plan's fastest: {choice!r}"
    return text + (f"; in {several.copies} processes (torchrun, notebook 07): {several!r}" if several else "")


def consequences_html(found: Forecast) -> str:
    """Figures and bars, with JupyterLab's own colours."""
    shown = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in figures(found).items()
    )
    bars = "".join(_bar(index, found) for index in range(len(found.step.memory)))
    fullest = max(found.step.memory, key=lambda each: each.total)
    legend = "".join(
        f'<span><i style="background:{PARTS[name][1]}"></i>{name} {value:.2f}</span>'
        for name, value in parts_gib(fullest).items()
    )
    return (
        f'{STYLE}<div class="qlora-figures">{shown}</div><div class="muted">{html.escape(how(found))}</div>'
        f'{bars}<div class="qlora-legend muted"><span>GiB on the fullest GPU:</span>{legend}</div>'
    )


def _bar(index: int, found: Forecast) -> str:
    memory, layers = found.step.memory[index], found.step.layers_per_gpu[index]
    total, usable = gib(memory.total), found.hardware.usable_gib
    scale = 100 / (1.03 * max(usable, found.step.peak_gib))
    pieces = "".join(
        f'<i style="width:{value * scale:.2f}%;background:{PARTS[name][1]}" title="{name}: {value:.2f} GiB"></i>'
        for name, value in parts_gib(memory).items()
    )
    over = total > usable
    label = f"GPU {index}: {total:.1f} of {usable:.1f} GiB{', does not fit' if over else ''}"
    return (
        f'<div class="qlora-gpu{" qlora-over" if over else ""}" role="img" aria-label="{label}">'
        f"<span>GPU {index} · {layers} layers</span>"
        f'<div class="qlora-bar">{pieces}<u style="left:{usable * scale:.2f}%" title="usable: {usable:.1f} GiB"></u></div>'
        f"<span>{total:.1f} of {usable:.1f} GiB</span></div>"
    )


def notes_html(found: Forecast, *more: str) -> str:
    """What a reader must know of the figures, small."""
    price = found.hardware.price_note
    notes = [*more, *found.notes, *([f"price: {price}"] if price else [])]
    return "".join(f'<div class="muted" style="font-size:11px">{html.escape(note)}</div>' for note in notes)


def consequences_table(found: Forecast) -> Table:
    """The same as a table, for where there are no widgets."""
    rows = [[name, value] for name, value in figures(found).items()]
    rows.append(["one step", how(found)])
    for index, memory in enumerate(found.step.memory):
        inside = ", ".join(f"{name} {value:.2f}" for name, value in parts_gib(memory).items() if value >= 0.005)
        rows.append([f"GPU {index}", f"{gib(memory.total):.1f} of {found.hardware.usable_gib:.1f} GiB: {inside}"])
    rows += [["verdict", verdict(found)], ["plan", plan_text(found)]]
    rows += [["note", note] for note in found.notes]
    return Table(["consequence", "predicted"], rows)
