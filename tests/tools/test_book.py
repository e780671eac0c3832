"""The book: what is staged for Sphinx, and with QLORA_SLOW=1 the pages that it makes of it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("book", ROOT / "tools" / "book.py")
book = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(book)


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book") / "source"
    book.stage(folder)
    return folder


def test_the_main_track_comes_first_and_every_notebook_and_document_is_there(staged):
    text = (staged / "index.md").read_text(encoding="utf-8")
    tracks = re.findall(r":caption: (.+)\n:maxdepth: 1\n\n((?:.+\n)+?)```", text)
    assert [name for name, _ in tracks] == ["The main track", "Appendices", "Documents"]
    main, further, documents = (pages.split() for _, pages in tracks)
    numbers = [page.removeprefix("notebooks/").partition("_")[0] for page in main]
    assert numbers == ["start", "primer", "00", "01", "02", "03", "10", "04", "05", "06"]
    assert {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")} == {*main, *further}
    assert {f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md")} <= set(documents)
    assert all(
        (staged / f"{page}.ipynb").exists() or (staged / f"{page}.md").exists() for page in main + further + documents
    )


def test_outputs_are_those_that_are_stored_and_folded_where_a_reader_predicts(staged):
    folded = 0
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        before = json.loads(path.read_text(encoding="utf-8"))["cells"]
        after = json.loads((staged / "notebooks" / path.name).read_text(encoding="utf-8"))["cells"]
        assert [cell.get("outputs") for cell in before] == [cell.get("outputs") for cell in after]
        for cell in after:
            predicts = cell["cell_type"] == "code" and "# your answer" in "".join(cell["source"])
            assert predicts == ("hide-output" in cell["metadata"].get("tags", []))
            folded += predicts
    assert folded >= 60


def test_pictures_in_two_versions_follow_the_theme(staged):
    text = (staged / "docs" / "panels.md").read_text(encoding="utf-8")
    assert text.count("only-dark") == text.count("only-light") >= 4 and "<picture" not in text


def test_a_page_that_loads_from_another_host_is_found(tmp_path):
    (tmp_path / "good.html").write_text('<a href="https://example.org">a</a><script src="_static/a.js"></script>')
    for number, bad in enumerate(
        ('<script async src="https://cdn.org/a.js">', '<link rel="stylesheet" href="//cdn.org/a.css">')
    ):
        (tmp_path / f"bad{number}.html").write_text(bad)
    assert [Path(page).name for page in book.pages_that_load(tmp_path)] == ["bad0.html", "bad1.html"]


class Page(HTMLParser):
    """The ids of a page, and what it links to and shows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.add(found.get("id") or "")
        self.targets += [found[name] or "" for name in ("href", "src") if name in found]


@pytest.mark.only_slow
def test_the_book_is_built_and_all_its_links_lead_somewhere(tmp_path):
    venv, out = tmp_path / "venv", tmp_path / "site"
    subprocess.run([sys.executable, ROOT / "tools" / "install.py", "--venv", venv, "--book"], check=True)
    subprocess.run([venv / "bin" / "python", ROOT / "tools" / "book.py", "--out", out], check=True)
    pages = {path: Page(path) for path in out.rglob("*.html")}
    assert len(pages) > 25
    broken = []
    for path, page in pages.items():
        for target in page.targets:
            if book.ELSEWHERE.match(target):
                continue
            name, _, anchor = target.partition("#")
            file = (path.parent / name.partition("?")[0]).resolve() if name else path
            if not file.exists() or (anchor and file in pages and anchor not in pages[file].ids):
                broken.append(f"{path.name}: {target}")
    assert not broken
    text = (out / "notebooks" / "01_load_model.html").read_text(encoding="utf-8")
    assert "data:image/svg+xml" in text and "<details" in text and "tex-svg.js" in text
    assert "quantisation" in (out / "searchindex.js").read_text(encoding="utf-8")
