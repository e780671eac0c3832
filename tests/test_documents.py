"""The figures in the README and in docs/ are those of the JSON files under benchmarks/."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jinja2
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import documents  # noqa: E402


def test_every_figure_comes_from_its_record():
    made = documents.documents()
    assert len(made) >= 2
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run benchmarks/documents.py"


def test_a_tampered_figure_is_put_right():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tampered = re.sub(r"\| \*\*tuned\*\* \| [\d.]+ \|", "| **tuned** | 99.9 |", text, count=1)
    assert tampered != text
    made = documents.documents()
    figures = documents.values() | {f"table_{name}": table() for name, table in documents.TABLES.items()}
    assert documents.filled(tampered, figures) == made[ROOT / "README.md"]


def test_a_figure_without_a_record_is_refused():
    with pytest.raises(KeyError):
        documents.filled("<!-- figures:nothing -->1<!-- /figures -->", {})
    with pytest.raises(jinja2.UndefinedError):
        documents.rendered("{{ nothing }}", {})


def test_every_figure_is_quoted_somewhere():
    templates = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks" / "templates").glob("*.md"))
    quoted = set(re.findall(r"\{\{ (\w+) \}\}", templates))
    quoted |= set(re.findall(r"figures:(\w+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    unused = {*documents.values(), *(f"table_{name}" for name in documents.TABLES)} - quoted
    assert unused == set()


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 6 * 1024
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
