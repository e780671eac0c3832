"""Fills the figures into the documents: `templates/*.md` become `docs/*.md`, and marked places of the README are filled.

    .venv/bin/python benchmarks/documents.py [--check]

The prose is in the templates, in Markdown; `{{ name }}` is a figure of `document_values.py`, `{{ table_name }}` a table of
`document_tables.py`. Between `<!-- figures:NAME -->` and `<!-- /figures -->` in the README is what this script wrote. `--check`
fails where a document differs from its records.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jinja2
import notebook_band_tables
from document_tables import TABLES, plot
from document_values import values

from qlora_helpers.base.files import write_text

HERE = Path(__file__).parent
ROOT = HERE.parent
README = ROOT / "README.md"


def main() -> int:
    """Writes the documents, or with `--check` names those that would change."""
    new = documents()
    if "--check" in sys.argv[1:]:
        stale = [path.name for path, text in new.items() if path.read_text(encoding="utf-8") != text]
        print(f"{', '.join(stale)}: run benchmarks/documents.py" if stale else "the documents agree with benchmarks/")
        return int(bool(stale))
    for path, text in new.items():
        write_text(path, text)
    write_text(ROOT / "docs" / "step_speed.svg", plot())
    return 0


def documents() -> dict[Path, str]:
    """Every document's path and text."""
    figures = (
        values() | {f"table_{name}": table() for name, table in TABLES.items()} | notebook_band_tables.document_values()
    )
    made = {
        ROOT / "docs" / template.name: rendered(template.read_text(encoding="utf-8"), figures)
        for template in sorted((HERE / "templates").glob("*.md"))
    }
    return made | {README: filled(README.read_text(encoding="utf-8"), figures)}


def rendered(template: str, figures: dict[str, str]) -> str:
    """A template with its figures; an unknown name raises."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(template).render(figures)


def filled(text: str, figures: dict[str, str]) -> str:
    """The README with every marked place filled; the mark names a figure or a table.

    Raises:
        KeyError: a place names no figure.
    """
    place = re.compile(r"(<!-- figures:(\w+) -->)(\n?).*?(<!-- /figures -->)", re.DOTALL)
    return place.sub(lambda match: match[1] + match[3] + figures[match[2]] + match[3] + match[4], text)


if __name__ == "__main__":
    sys.exit(main())
