"""Builds the book: the notebooks with their stored outputs, and the documents, as a static site that needs no server.

    python tools/book.py [--out build/book]        `make book` calls it in an environment of its own

What Sphinx reads is staged first, in the folders of the repository, so that every relative link leads where it leads there.
Nothing is executed. A link that leads nowhere, and a page that would load something from another host, end the build.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAIN_TRACK = ("start", "primer", "00", "01", "02", "03", "10", "04", "05", "06")
DOCUMENTS_FIRST = ("glossary", "bands", "data", "panels")
WORK_LISTS = ("questions",)  # documents for those who write the course; they are pages, at the end
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
ATTRIBUTE = re.compile(r"<(?:a|img|source)\b[^>]*?\s(?:href|src|srcset)=\"([^\"]+)\"")
CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`", re.DOTALL | re.MULTILINE)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)
PREDICTION = re.compile(r"=.*\bNone\b.*# your answer")
THEMED = re.compile(
    r"<picture><source media=\"\(prefers-color-scheme: dark\)\" srcset=\"([^\"]+)\">\s*"
    r"<img alt=\"([^\"]*)\" src=\"([^\"]+)\"></picture>"
)
LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio)\b[^>]*?\ssrc=\"(https?:)?//|<link\b[^>]*?\shref=\"(https?:)?//"
)
PICTURES = (".png", ".svg", ".jpg", ".gif", ".webp")


def main() -> int:
    """Builds the book; returns the exit code, 1 where a page would load something from another host."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "book", help="folder of the pages; it is made anew"
    )
    out = parser.parse_args().out.absolute()
    staged = out.parent / f"{out.name}-source"
    for folder in (staged, out):
        shutil.rmtree(folder, ignore_errors=True)
    stage(staged)
    sphinx = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-b", "html"]
    done = subprocess.run([*sphinx, "-d", f"{staged}/.doctrees", staged, out])
    if done.returncode:
        return done.returncode
    for page in staged.rglob("*"):  # those that a page names in HTML, which Sphinx does not read
        if page.suffix in PICTURES and page.parent != staged:
            shutil.copy(page, out / page.relative_to(staged))
    if strangers := pages_that_load(out):
        print("error: these pages load something from another host:", *strangers, sep="\n", file=sys.stderr)
        return 1
    shutil.rmtree(staged)
    print(f"The book: {out / 'index.html'}")
    return 0


def stage(folder: Path) -> None:
    """Writes what Sphinx reads: notebooks, documents, what they link to, and the first page."""
    for source in (*notebooks(), *documents()):
        _stage(source, folder)
    for path in (ROOT / "docs").iterdir():
        if path.suffix in PICTURES:
            shutil.copy(path, folder / "docs" / path.name)
    for name in ("conf.py", "book.css"):
        shutil.copy(ROOT / "book" / name, folder / name)
    others = [path.relative_to(folder) for path in folder.rglob("*.md") if path.parent != folder / "docs"]
    index = (ROOT / "book" / "index.md").read_text(encoding="utf-8").replace("](../", "](")
    (folder / "index.md").write_text(index + contents(others), encoding="utf-8")


def _stage(source: Path, folder: Path) -> None:
    """Copies a page as the book needs it, and the files of this repository that it links to."""
    target = folder / source.relative_to(ROOT)
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".ipynb":
        target.write_text(json.dumps(for_readers(json.loads(source.read_text(encoding="utf-8")))), encoding="utf-8")
    elif source.suffix == ".md":
        target.write_text(themed(source.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        shutil.copy(source, target)
        return
    for link in links_of(source):
        found = (source.parent / link.partition("#")[0]).resolve()
        if found.is_file() and found.is_relative_to(ROOT) and found.suffix != ".ipynb":
            _stage(found, folder)


def notebooks() -> list[Path]:
    """All notebooks, those of the main track first and in its order."""
    found = sorted((ROOT / "notebooks").glob("*.ipynb"))
    return sorted(found, key=lambda path: (*_place(path.stem), path.stem))


def _place(name: str) -> tuple[int, int]:
    number = name.partition("_")[0]
    return (0, MAIN_TRACK.index(number)) if number in MAIN_TRACK else (1, 0)


def documents() -> list[Path]:
    """The documents, those that a learner needs first."""
    order = {name: place for place, name in enumerate(DOCUMENTS_FIRST)} | dict.fromkeys(WORK_LISTS, 1000)
    found = (ROOT / "docs").glob("*.md")
    return sorted(found, key=lambda path: (order.get(path.stem, len(DOCUMENTS_FIRST)), path.stem))


def contents(others: list[Path]) -> str:
    """The tables of contents: main track, appendices, documents, and what these link to."""
    tracks = {"The main track": 0, "Appendices": 1}
    parts = {
        name: [f"notebooks/{path.stem}" for path in notebooks() if _place(path.stem)[0] == place]
        for name, place in tracks.items()
    }
    parts["Documents"] = [f"docs/{path.stem}" for path in documents()] + [str(path.with_suffix("")) for path in others]
    return "".join(
        f"\n```{{toctree}}\n:caption: {name}\n:maxdepth: 1\n\n" + "\n".join(pages) + "\n```\n"
        for name, pages in parts.items()
    )


def for_readers(notebook: dict[str, Any]) -> dict[str, Any]:
    """A notebook whose outputs are folded where a reader is asked to predict them."""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and PREDICTION.search(source):
            cell["metadata"] = cell["metadata"] | {"tags": [*cell["metadata"].get("tags", []), "hide-output"]}
        elif cell["cell_type"] == "markdown":
            cell["source"] = themed(source)
    return notebook


def themed(text: str) -> str:
    """Markdown whose pictures in two versions follow the book's theme, which a reader may choose."""
    picture = '<img class="book-picture only-light" alt="{1}" src="{2}"><img class="book-picture only-dark" alt="{1}" src="{0}">'
    return THEMED.sub(lambda found: picture.format(*found.groups()), text)


def pages_that_load(folder: Path) -> list[str]:
    """Pages that would load a script, a style or a picture from another host."""
    return [str(page) for page in sorted(folder.rglob("*.html")) if LOADED.search(page.read_text(encoding="utf-8"))]


def links_of(page: Path) -> list[str]:
    """The links of a notebook's texts, or of a document, that lead into this repository."""
    return [link for text in texts_of(page) for link in links(text) if not ELSEWHERE.match(link)]


def texts_of(page: Path) -> Iterator[str]:
    """The Markdown of a page."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        yield text
        return
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] == "markdown":
            yield "".join(cell["source"])


def links(text: str) -> list[str]:
    """All links and pictures of a Markdown text, those in code left out."""
    plain = CODE.sub("", text)
    return [found[1] for pattern in (LINK, ATTRIBUTE) for found in pattern.finditer(plain)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page: its headings as GitHub and MyST name them, and the `id`s that it gives itself."""
    found: set[str] = set()
    for text in texts_of(page):
        plain = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
        for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", plain, flags=re.MULTILINE):
            name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
            count = sum(1 for _ in range(1000) if f"{name}-{_}" in found) if name in found else 0
            found.add(f"{name}-{count + 1}" if name in found else name)
        found.update(re.findall(r"\bid=\"([^\"]+)\"", plain))
    return found


def broken_links(page: Path) -> list[str]:
    """The links of a page that lead to no file, or to no anchor in it."""
    broken = []
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            broken.append(f"{link}: no such file")
        elif anchor and target.suffix in (".md", ".ipynb") and anchor not in anchors(target):
            broken.append(f"{link}: no such anchor")
    return broken


if __name__ == "__main__":
    sys.exit(main())
