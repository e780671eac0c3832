"""Measures what each notebook takes on a CPU: runs it and records its computing time, its time by the clock and its memory.

    .venv/bin/python benchmarks/notebook_cost.py benchmarks/notebook_cost_two_cores.json [--profile tiny] [NAME ...]

The computing time is that of the kernel and of the processes that it started, on all cores together: what others do on the machine
changes it little. Waiting is not in it. A notebook that was measured before in this profile is measured again, others are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
from nbclient import NotebookClient

from qlora_helpers.base.files import write_text
from qlora_helpers.machine.environment import versions

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SAMPLE_S = 0.1
TIMEOUT_S = 3600


class Meter(threading.Thread):
    """Looks at a kernel and its children while they live: the most memory they hold together, and their computing time."""

    def __init__(self, client: NotebookClient) -> None:
        super().__init__(daemon=True)
        self.client, self.ended = client, threading.Event()
        self.peak_bytes, self.cpu_s = 0, 0.0

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_S):
            manager = self.client.km
            process = getattr(getattr(manager, "provisioner", None), "process", None)
            if process is None:
                continue
            try:
                kernel = psutil.Process(process.pid)
                children = kernel.children(recursive=True)
                used = kernel.cpu_times()
                held, seconds = (
                    kernel.memory_info().rss,
                    sum(used[:4]),
                )  # its own, and those of children that have ended
                for child in children:
                    held += child.memory_info().rss
                    seconds += sum(child.cpu_times()[:2])
            except psutil.Error:
                continue
            self.peak_bytes, self.cpu_s = max(self.peak_bytes, held), max(self.cpu_s, seconds)


def measure(path: Path) -> dict[str, Any]:
    """Runs a notebook and gives its seconds and GiB; the file is left as it is."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=TIMEOUT_S, resources={"metadata": {"path": str(NOTEBOOKS)}})
    meter = Meter(client)
    started = time.monotonic()
    meter.start()
    try:
        client.execute()
    finally:
        meter.ended.set()
        meter.join()
    return {
        "cpu_s": round(meter.cpu_s, 1),
        "clock_s": round(time.monotonic() - started, 1),
        "peak_gib": round(meter.peak_bytes / 1024**3, 2),
    }


def main() -> int:
    """Measures the notebooks that are named, or all, and writes the record after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", help="such as 04_train; all where none is named")
    parser.add_argument("--profile", choices=("tiny", "demo"), default="tiny")
    options = parser.parse_intermixed_args()
    os.environ["QLORA_PROFILE"] = options.profile
    os.environ.setdefault("QLORA_RUNS", tempfile.mkdtemp(prefix="qlora-notebooks-"))
    os.environ.setdefault("JUPYTER_DATA_DIR", tempfile.mkdtemp(prefix="qlora-jupyter-"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    record = json.loads(options.out.read_text()) if options.out.exists() else {"profiles": {}}
    record["machine"] = {
        "cores": len(os.sched_getaffinity(0)),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or None,
        "processor": platform.machine(),
        "system": platform.system(),
    }
    record["versions"] = versions()
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not options.names or path.stem in options.names:
            found = measure(path)
            record["profiles"].setdefault(options.profile, {})[path.stem] = found
            write_text(options.out, json.dumps(record, indent=1) + "\n")
            print(path.stem, options.profile, found, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
