"""A real JupyterLab in Debian's headless Chromium, driven by Playwright.

Without Chromium these tests are skipped, unless QLORA_NEED_BROWSER is set: then they fail.
QLORA_SCREENSHOTS names a folder (below the repository) for the pictures that the documents show; the others, which are for looking
at, then go to build/pictures. Without it all go to a scratch folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab import LAPTOP, ROOT, THEMES, Notebook, running_lab

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DOCUMENTED = ("answers", "form", "rows", "runs", "watch")
"""The pictures that docs/panels.md shows."""
IN_SIGHT = 660
"""Pixels of a notebook's height that a laptop shows."""
PATIENCE_S = 120
"""How long a test waits for what must come; a shared machine may be slow."""


@pytest.fixture(scope="session")
def browser():
    """Chromium, without a window."""
    if CHROMIUM is None:
        complain = pytest.fail if os.environ.get("QLORA_NEED_BROWSER") else pytest.skip
        complain("Chromium is not installed; on Debian: apt-get install chromium")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=1000 * PATIENCE_S)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def lab(browser, tmp_path_factory):
    """One JupyterLab server for all tests, with copies of the notebooks; runs are shared between them."""
    with running_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture
def page(browser):
    """A page of a browser profile of its own, as wide as a laptop; what its console says of errors fails the test."""
    context = browser.new_context(viewport=LAPTOP)
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE_S)
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    yield page
    context.close()
    assert not broken, broken


@pytest.fixture
def opened(page, lab):
    """Opens notebooks by name; their kernels end with the test."""
    notebooks: list[Notebook] = []

    def open_notebook(name: str) -> Notebook:
        notebooks.append(Notebook(page, lab, name))
        return notebooks[-1]

    yield open_notebook
    for notebook in notebooks:
        notebook.close()


@pytest.fixture
def picture(tmp_path) -> Callable[[Notebook, Any, str], list[Path]]:
    """Takes a picture of a part of a notebook in the light and in the dark theme."""
    asked = "QLORA_SCREENSHOTS" in os.environ
    shown = ROOT / os.environ["QLORA_SCREENSHOTS"] if asked else tmp_path
    others = ROOT / "build" / "pictures" if asked else tmp_path

    def take(notebook: Notebook, part: Any, name: str) -> list[Path]:
        folder = shown if name in DOCUMENTED else others
        folder.mkdir(parents=True, exist_ok=True)
        paths, height = [], part.bounding_box()["height"]
        if height > IN_SIGHT:  # else JupyterLab's own status bar would be in the picture
            notebook.page.set_viewport_size(LAPTOP | {"height": round(height) + LAPTOP["height"] - IN_SIGHT})
        for theme in THEMES:
            notebook.theme(theme)
            part.scroll_into_view_if_needed()
            paths.append(folder / f"{name}-{theme}.png")
            part.screenshot(path=paths[-1], animations="disabled", caret="hide")
        notebook.page.set_viewport_size(LAPTOP)
        return paths

    return take
