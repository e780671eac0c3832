"""A still picture of plots: an image that needs no stylesheet, no script and no library to draw.

It is what a stored notebook shows where a live panel was.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from qlora_helpers.views.charts import GREY
from qlora_helpers.views.plots import UNITS, Drawing


def still_picture(drawings: Sequence[Drawing], name: str) -> str:
    """Returns drawings side by side as an image that needs no stylesheet and no script: the first large, the others small.

    Args:
        drawings: one or more; those without a point are left out.
        name: what the picture shows, for those who can't see it.
    """
    filled = [drawing for drawing in drawings if not drawing.is_empty]
    if not filled:
        return ""
    columns = -(-(len(filled) - 1) // 3)
    width, height = 430 + 220 * columns, 270
    parts = [_still(filled[0], 0, 0, 420, height)]
    for index, drawing in enumerate(filled[1:]):
        parts.append(_still(drawing, 430 + 220 * (index // 3), 90 * (index % 3), 210, 90))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, sans-serif" font-size="10" fill="{GREY}">{"".join(parts)}</svg>'
    )
    label = html.escape(f"{name}: " + "; ".join(drawing.label() for drawing in filled))
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{label}" style="max-width:100%" src="data:image/svg+xml;base64,{data}">'


def _still(drawing: Drawing, x: int, y: int, width: int, height: int) -> str:
    left, right, top, bottom = 40, 8, 16, 16 if height < 200 else 28
    inner, tall = width - left - right, height - top - bottom
    keys = [
        f'<tspan fill="{line.colour}">&#160; {"●" if line.dots else "—"} </tspan>{html.escape(line.name)}'
        for line in drawing.plot.lines
    ]
    title = f'<text x="{left}" y="11">{html.escape(drawing.plot.title)}{"".join(keys) if len(keys) > 1 else ""}</text>'
    grid = "".join(
        f'<path d="M{left} {top + tall * (1 - place):.1f}h{inner}" stroke="{GREY}" stroke-opacity=".25"/>'
        f'<text x="{left - 4}" y="{top + tall * (1 - place) + 3.5:.1f}" text-anchor="end">{text}</text>'
        for place, text in drawing.values
    )
    grid += "".join(
        f'<text x="{left + inner * place:.1f}" y="{top + tall + 11}" text-anchor="middle">{text}</text>'
        for place, text in drawing.steps
    )
    if height >= 200:
        grid += f'<text x="{left + inner / 2}" y="{height - 3}" text-anchor="middle">optimizer step</text>'
    for mark in drawing.marks():
        if mark.kind == "resumed":
            across = left + inner * drawing.place(mark.step)[0]
            grid += f'<path d="M{across:.1f} {top}v{tall}" stroke="{GREY}" stroke-dasharray="2 3"/>'
    lines = "".join(
        _stroke(raw, line.colour, 1, 0.35) + _stroke(path, line.colour, 1.6, 1) + _stroke(dots, line.colour, 5, 1)
        for line, (raw, path, dots) in zip(drawing.plot.lines, drawing.paths, strict=True)
    )
    return (
        f'<g transform="translate({x} {y})">{title}{grid}'
        f'<path d="M{left} {top}v{tall}h{inner}" fill="none" stroke="{GREY}"/>'
        f'<svg x="{left}" y="{top}" width="{inner}" height="{tall}" viewBox="0 0 {UNITS} {UNITS}" '
        'preserveAspectRatio="none" overflow="visible" fill="none" stroke-linecap="round" stroke-linejoin="round">'
        f"{lines}</svg></g>"
    )


def _stroke(path: str, colour: str, width: float, opacity: float) -> str:
    look = f'stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}" vector-effect="non-scaling-stroke"'
    return f'<path d="{path}" {look}/>' if path else ""
