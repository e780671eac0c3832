"""Every link of the notebooks, the documents and the README leads to a file, and to a heading or an anchor in it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("book", ROOT / "tools" / "book.py")
book = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(book)
PAGES = [*book.notebooks(), *book.documents(), ROOT / "book" / "index.md", ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    assert book.broken_links(page) == []


def test_links_are_found_at_all():
    assert sum(len(book.links_of(page)) for page in PAGES) > 80


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "there.md").write_text('# Two  words\n\n## `code` & more\n\n## Twice\n\n## Twice\n\n<a id="own"></a>\n')
    good = "[a](there.md) [b](there.md#two--words) [c](there.md#code--more) [d](there.md#twice-1) [e](there.md#own) [f](#here)"
    page = tmp_path / "page.ipynb"
    texts = [
        f"# Here\n\n{good}",
        '`[code](nowhere.md)` [bad](nowhere.md) <img src="gone.png"> [worse](there.md#nothing)',
    ]
    cells = [nbformat.v4.new_markdown_cell(text) for text in texts]
    page.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))
    assert book.broken_links(page) == [
        "nowhere.md: no such file",
        "there.md#nothing: no such anchor",
        "gone.png: no such file",
    ]
