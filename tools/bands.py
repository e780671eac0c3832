"""Writes into each notebook's first cell what the notebook takes on a laptop and on six kinds of GPU.

    .venv/bin/python tools/bands.py [--write]        without --write it names the notebooks that would change

The figures are those of `docs/bands.md`. Goal, 'Before this' and all else in the cell stay as they are; the table is between
`<!-- bands -->` and `<!-- /bands -->`, or where the cell has a table of machines already.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
sys.path.insert(0, str(ROOT / "benchmarks"))
START, END = "<!-- bands -->", "<!-- /bands -->"
BLOCK = re.compile(rf"{START}.*?{END}", re.DOTALL)
OLD_TABLE = re.compile(r"^\| *machine *\|.*\n(?:\|.*(?:\n|\Z))+", re.MULTILINE)
LINK = "[How these figures are made, and Falcon-40B's](../docs/bands.md)"


def main(arguments: list[str] | None = None) -> int:
    """Writes the tables or names the notebooks whose table is not up to date; returns 1 where there are some."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args(arguments).write
    stale = {path: new for path, new in cells().items() if new != first_cell(path)}
    for path, new in stale.items():
        if write:
            store(path, new)
    if stale:
        names = ", ".join(path.stem for path in stale)
        print(f"written: {names}" if write else f"{names}: run tools/bands.py --write")
    return int(bool(stale) and not write)


def cells() -> dict[Path, str]:
    """The first cell of each notebook that has a band, as it should be."""
    from notebook_band_tables import WORK, table

    paths = [NOTEBOOKS / f"{name}.ipynb" for name in WORK]
    return {path: with_table(first_cell(path), table(path.stem)) for path in paths}


def with_table(text: str, table: str) -> str:
    """A cell with the table in place of the one that it has.

    Raises:
        ValueError: it has none.
    """
    block = f"{START}\n{table}\n\n{LINK}\n{END}"
    for place, after in ((BLOCK, ""), (OLD_TABLE, "\n")):
        if found := place.search(text):
            return text[: found.start()] + block + after + text[found.end() :]
    raise ValueError(f"the cell has no table of machines: {text[:80]!r}")


def first_cell(path: Path) -> str:
    """The text of a notebook's first cell."""
    return "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])


def store(path: Path, text: str) -> None:
    """Writes a notebook's first cell; nothing else in the file changes, its outputs least of all."""
    import nbformat

    from qlora_helpers.base.files import write_text

    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = text
    write_text(path, nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    sys.exit(main())
