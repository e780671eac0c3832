"""The glossary: terms in order, two sentences each, and every link to it leads to a term."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(\.\./docs/(\w+)\.md#([\w-]+)\)")


def terms() -> dict[str, str]:
    """Each term with its text."""
    _, *pieces = re.split(r"^### ", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {piece.partition("\n")[0]: piece.partition("\n")[2].strip() for piece in pieces}


def anchor(heading: str) -> str:
    """How a heading is addressed in a link, by GitHub's rule."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_term_has_two_sentences():
    found = terms()
    assert len(found) >= 50
    for term, text in found.items():
        assert len(re.findall(r"\.(?=\s|$)", text)) == 2 and text.endswith("."), term
        assert "\n" not in text, term


def test_terms_are_in_alphabetical_order():
    assert list(terms()) == sorted(terms(), key=str.lower)


def test_links_from_notebooks_lead_to_a_heading():
    linked = set()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            linked |= set(LINK.findall(cell.source))
    assert len(linked) >= 20
    for page, name in linked:
        headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), re.MULTILINE)
        assert name in map(anchor, headings), f"{page}.md#{name}"


def test_a_term_is_linked_once_in_a_notebook():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        links = [link for cell in nbformat.read(path, as_version=4).cells for link in LINK.findall(cell.source)]
        assert len(links) == len(set(links)), f"{path.stem} links a term twice"
