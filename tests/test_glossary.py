"""The glossary: terms in order, two sentences each, and every link to it leads to a term."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

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


LINKED = ("primer", "start", "00_setup", "01_load_model", "02_lora_config", "03_prepare_data", "04_train")
ORDINARY = {"Run", "Row", "Step", "Layer", "Weight"}  # also words of every day: need no link
OF_CODE = (
    r"<!-- bands -->.*?<!-- /bands -->",  # what is computed
    r"^(?:    .*|#.*)$",  # code and headings
    r"`[^`\n]+`",
    r"\[[^\]]*\]\([^)]*\.ipynb\)",  # names of notebooks
)


def prose(name: str) -> str:
    """A notebook's Markdown without code, headings and tables that are computed; its length and places stay."""
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for pattern in OF_CODE:
        text = re.sub(
            pattern, lambda found: " " * len(found[0]), text, flags=re.DOTALL if "<!" in pattern else re.MULTILINE
        )
    return text


def unlinked(text: str) -> list[str]:
    """Terms that a text uses without a link to the glossary, or before it."""
    found = []
    for term in sorted(terms(), key=len, reverse=True):  # a quantisation block is no quantisation
        link = rf"\[[^\]]*\]\(\.\./docs/glossary\.md#{anchor(term)}\)"
        use = rf"(?i)(?<![\w/#-]){re.escape(term)}(?:s|es)?(?![\w-])"
        first = re.search(link, text)
        if term not in ORDINARY and re.search(use, text[: first.start()] if first else text):
            found.append(term)
        for pattern in (link, use):
            text = re.sub(pattern, lambda match: " " * len(match[0]), text)
    return found


@pytest.mark.parametrize("name", LINKED)
def test_a_term_is_linked_where_it_first_appears(name):
    assert unlinked(prose(name)) == []


def test_a_term_without_its_link_is_found():
    link = "[loss](../docs/glossary.md#loss)"
    assert unlinked(f"The {link} is small, and the loss stays so.") == []
    assert unlinked(f"The losses, or {link}.") == ["Loss"] == unlinked("A loss in each row.")
    assert unlinked("An [evaluation loss](../docs/glossary.md#evaluation-loss).") == []
