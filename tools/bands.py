"""Writes into each notebook's first cell what the notebook takes on a laptop and on six kinds of GPU.

    .venv/bin/python tools/bands.py [--write]        without --write it names the notebooks that would change

The figures are those of `docs/bands.md`. Goal, 'Before this' and all else in the cell stay as they are; the table is between
`<!-- bands -->` and `<!-- /bands -->`, or where the cell has a table of machines already. The start page keeps its own table, whose
last column is computed for the notebooks that a row links.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
for folder in (ROOT, ROOT / "benchmarks"):
    sys.path.insert(0, str(folder))
START, END = "<!-- bands -->", "<!-- /bands -->"
BLOCK = re.compile(rf"{START}.*?{END}", re.DOTALL)
OLD_TABLE = re.compile(r"^\| *machine *\|.*\n(?:\|.*(?:\n|\Z))+", re.MULTILINE)
START_TABLE = re.compile(r"^\| *you want to *\|.*\n(?:\|.*(?:\n|\Z))+", re.MULTILINE)
TIMES = "computing on a laptop, and exercises"
START_LINK = "Reading comes on top. [How the times are made](../docs/bands.md)"
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
    found = {path: with_table(first_cell(path), table(path.stem)) for path in paths}
    start = NOTEBOOKS / "start.ipynb"
    return found | {start: with_times(first_cell(start))}


def with_times(text: str) -> str:
    """The start page's first cell with the times of each row's notebooks in its table's last column.

    Raises:
        ValueError: it has no table of notebooks.
    """
    from notebook_band_tables import WORK

    if not (found := START_TABLE.search(text)):
        raise ValueError(f"the cell has no table of notebooks: {text[:80]!r}")
    header, ruler, *rows = (line.strip().strip("|").split("|") for line in found[0].strip().splitlines())
    header[-1] = f" {TIMES} "
    for row in rows:
        names = [name for name in dict.fromkeys(re.findall(r"\]\((\w+)\.ipynb\)", row[1])) if name in WORK]
        row[-1] = f" {times(names)} "
    table = "\n".join(f"|{'|'.join(line)}|" for line in (header, ruler, *rows))
    block = BLOCK.search(text)
    first, last = block.span() if block else found.span()
    after = "" if block else "\n"
    return f"{text[:first]}{START}\n{table}\n\n{START_LINK}\n{END}{after}{text[last:]}"


def times(names: list[str]) -> str:
    """What notebooks together take on a laptop's core, in both profiles where these differ, and what their exercises take."""
    from notebook_band_tables import duration_text, on_laptop

    from qlora_helpers.teaching.exercises import BY_NOTEBOOK

    seconds = {"tiny": 0.0, "demo": 0.0}
    for name in names:
        for band in on_laptop(name):
            for profile in seconds if band.profile == "every" else [band.profile]:
                seconds[profile] += band.seconds
    tiny, demo = (duration_text(each) for each in seconds.values())
    minutes = sum(each.minutes for name in names for each in BY_NOTEBOOK.get(name, ()))
    shown = tiny if tiny == demo else f"`tiny` {tiny}, `demo` {demo}"
    return shown + (f"; exercises {minutes} min" if minutes else "")


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
