"""Writes the map of rooms in CONTRIBUTING.md from the rooms' own docstrings.

python tools/map.py
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qlora_helpers"
PAGE = ROOT / "CONTRIBUTING.md"
BETWEEN = re.compile(r"(<!-- rooms -->\n).*(<!-- /rooms -->)", re.DOTALL)


def main() -> int:
    """Rewrites the page."""
    PAGE.write_text(with_map(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def with_map(page: str) -> str:
    """The page with the map as the package has it now."""
    return BETWEEN.sub(lambda match: match[1] + room_table() + match[2], page)


def room_table() -> str:
    """A row for each room from the top down, with the rooms inside it, and for each module that stands alone."""
    contracts = (ROOT / ".importlinter").read_text(encoding="utf-8")
    layers = re.search(r"^layers =\n((?:    .*\n)+)", contracts, re.MULTILINE)
    assert layers, ".importlinter has no layers"
    rows = ["| to change | open |", "|---|---|"]
    for name in re.findall(r"\w+", layers[1]):
        folder = PACKAGE / name
        rows += [f"| {first_line(folder if folder.is_dir() else PACKAGE / f'{name}.py')} | `{place(folder)}` |"]
        inner = sorted(path.parent for path in folder.glob("*/__init__.py"))
        rows += [f"| {first_line(path)} | `{place(path)}` |" for path in inner]
    return "\n".join(rows) + "\n"


def place(path: Path) -> str:
    """How a room or module is named in the map: `data/`, `views/widgets/`, `demo.py`."""
    name = path.relative_to(PACKAGE).as_posix()
    return f"{name}/" if path.is_dir() else f"{name}.py"


def first_line(path: Path) -> str:
    """The first sentence of a docstring, without its full stop."""
    file = path / "__init__.py" if path.is_dir() else path
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".").replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
