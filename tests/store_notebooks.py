"""Runs the notebooks in order in the demo profile and stores their outputs.

    python tests/store_notebooks.py [NAME ...]      such as 04_train; all where none is named

What a reader can do nothing with is not stored: progress bars, warnings on stderr, widget states, execution times. A notebook is
written whole or not at all, and not if its outputs hold a path or name of this machine.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from qlora_helpers.base.files import write_text

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
TIMEOUT_S = 3600


def main() -> int:
    """Runs and stores the notebooks; returns 1 if one would give this machine away."""
    names = sys.argv[1:]
    chosen = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if not names or path.stem in names]
    os.environ.setdefault("QLORA_PROFILE", "demo")
    os.environ.setdefault("QLORA_RUNS", tempfile.mkdtemp(prefix="qlora-notebooks-"))
    os.environ.setdefault("JUPYTER_DATA_DIR", tempfile.mkdtemp(prefix="qlora-jupyter-"))
    os.environ["QLORA_LEARNER"] = tempfile.mkdtemp(prefix="qlora-learner-")  # nobody's own attempts open a solution
    os.environ.pop("QLORA_BOARD", None)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for path in chosen:
        started = time.monotonic()
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=TIMEOUT_S, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
        clean(notebook)
        leaks = machine_names(notebook)
        if leaks:
            print(f"{path.name} is not stored: its outputs hold {', '.join(leaks)}")
            return 1
        write_text(path, nbformat.writes(notebook) + "\n")
        print(f"{path.name}: {time.monotonic() - started:.0f} s", flush=True)
    return 0


def clean(notebook: nbformat.NotebookNode) -> None:
    """Removes what changes from run to run and tells a reader nothing."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_worth_storing(output)]


def is_worth_storing(output: nbformat.NotebookNode) -> bool:
    """False for stderr (bars, warnings) and for widget views that say nothing without a live kernel.

    A widget's still text and table stay; its view, which would show as an error, goes.
    """
    if output.output_type == "stream":
        return output.name != "stderr"
    data = output.get("data", {})
    return data.pop("application/vnd.jupyter.widget-view+json", None) is None or "text/html" in data


def machine_names(notebook: nbformat.NotebookNode) -> list[str]:
    """Paths and names of this machine that the outputs hold."""
    text = nbformat.writes(
        nbformat.from_dict({**notebook, "cells": [c for c in notebook.cells if c.cell_type == "code"]})
    )
    names = {str(NOTEBOOKS.parent), str(Path.home()) + "/", os.environ["QLORA_RUNS"], os.environ["JUPYTER_DATA_DIR"]}
    if len(socket.gethostname()) > 3:
        names.add(socket.gethostname())
    return sorted(name for name in names if name in text)


if __name__ == "__main__":
    sys.exit(main())
