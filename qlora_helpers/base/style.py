"""How things look: reads `style.css`, the one stylesheet that tables, charts, panels and the report share.

The parts of the file, and what each is for, are described at its top. Standard library alone.
"""

from __future__ import annotations

import functools
import importlib.resources
import re


def stylesheet(*parts: str) -> str:
    """Returns parts of the stylesheet, such as `colours` and `panel`, as CSS without comments."""
    return "\n".join(_parts()[part] for part in parts)


def inline(*names: str) -> str:
    """Returns the looks of some classes of the part `still`, for an element's `style` attribute.

    JupyterLab removes `<style>` from the stored outputs of a notebook that it does not trust, and keeps the attribute.

    Args:
        names: classes; where two set one property, the later name wins.
    """
    return ";".join(_classes()[name] for name in names)


def colour(name: str) -> str:
    """Returns the colour of `--qlora-NAME` as the file has it, such as `#3a7bd5`."""
    return _colours()[name]


@functools.cache
def _parts() -> dict[str, str]:
    text = (importlib.resources.files(__package__) / "style.css").read_text(encoding="utf-8")
    pieces = re.split(r"/\* == (\w+) == \*/", text)
    return {
        name: re.sub(r"/\*.*?\*/\n?", "", css, flags=re.DOTALL).strip()
        for name, css in zip(pieces[1::2], pieces[2::2], strict=True)
    }


@functools.cache
def _colours() -> dict[str, str]:
    return dict(re.findall(r"--qlora-([\w-]+): ([^;]+);", _parts()["colours"]))


@functools.cache
def _classes() -> dict[str, str]:
    literal = re.sub(r"var\(--qlora-([\w-]+)\)", lambda match: colour(match[1]), _parts()["still"])
    return {
        name: re.sub(r"\s*([:;])\s*", r"\1", rules).strip("; ")
        for name, rules in re.findall(r"\.([\w-]+) \{ ([^}]*)\}", literal)
    }
