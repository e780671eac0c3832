"""A JupyterLab of its own for a test, and a notebook in it as a person sees it.

The server runs as a process on a free port, in the tiny profile, with copies of the notebooks, runs and settings in scratch
folders. Tests click and type; what a person does by menu (open a file, run all) goes through JupyterLab's own commands.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entry_points import declare_entry_points

from qlora_helpers.runs.folder import Run

ROOT = Path(__file__).parent.parent.parent
LAPTOP = {"width": 1280, "height": 800}
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
RUN_TIMEOUT_S = 180.0
MADE = f"""
import sys, time, dataclasses, pathlib
sys.path.insert(0, {str(ROOT / "tests")!r})
from fake_run import fake_run, add_progress, finished_run
from qlora_helpers.base.files import write_json
run = fake_run(pathlib.Path("made"))
run.start_session(max_steps=60, resumed_from=0)
add_progress(run)
run.append_progress({{"event": "saved", "session": 1, "step": 20}})
run.append_progress({{"event": "start", "session": 2, "resumed_from": 20}})
for step in range(22, 46, 2):
    run.append_progress({{"session": 2, "step": step, "loss": 2.1 + 0.05 * (step % 3), "grad_norm": 0.9, "tokens_per_s": 812.0,
        "learning_rate": 1e-3 * (1 - step / 60), "gpus": [{{"memory_used_gib": 18.2 + step / 60, "load": 97}}]}})
run.append_progress({{"session": 2, "step": 40, "eval_loss": 2.2}})
gpus = {{"gpus": [{{"name": "NVIDIA A10G", "memory_used_gib": 18.9, "memory_total_gib": 24.0, "load": 97.0}}]}}
now = time.time()
write_json(run.status_path, dataclasses.replace(run.status(), step=44, session=2, spent_s=300.0, spent_usd=0.5, usd_per_hour=5.67,
    started_at=now - 90, heartbeat=now, readings=gpus))
run.save_config(run.config().with_settings({{"train.stop_at_minutes": 3}}))
_ = run.log_path.write_text('''2026-11-30 18:03:05,978 qlora_helpers.training.train INFO fast step: 12 layers compiled
2026-11-30 18:03:06,101 qlora_helpers.training.callback INFO step 22: epoch 1, loss 2.1, learning_rate 0.001
2026-11-30 18:03:08,010 qlora_helpers.runs.heartbeat WARNING the heartbeat could not be written: No space left on device
2026-11-30 18:03:09,000 qlora_helpers.training.checkpoints INFO checkpoint-40 is sealed, with a name that is long enough to need
''')
"""
"""A cell that makes a run which seems to train: its trainer is the notebook's own kernel."""


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def end(run: Run) -> None:
    """Kills the trainer of a run that a test started, where it still lives."""
    status = run.status()
    if status.is_live and status.pid:
        os.kill(status.pid, signal.SIGKILL)


class Lab:
    """A running JupyterLab server.

    Attributes:
        folder: what it serves: the copied notebooks.
        runs: where the notebooks keep their runs.
        url, token: its address.
    """

    def __init__(self, folder: Path, runs: Path, url: str, token: str) -> None:
        self.folder, self.runs, self.url, self.token = folder, runs, url, token

    def add_notebook(self, name: str, cells: list[str]) -> str:
        """Writes a notebook of code cells into the served folder and returns its name."""
        import nbformat

        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
        nbformat.write(notebook, self.folder / name)
        return name


@contextlib.contextmanager
def running_lab(scratch: Path) -> Iterator[Lab]:
    """Starts JupyterLab on copies of the notebooks and ends it, with its kernels, at the end of the block."""
    folder, runs = scratch / "notebooks", scratch / "runs"
    shutil.copytree(ROOT / "notebooks", folder, ignore=shutil.ignore_patterns("runs", ".ipynb_checkpoints"))
    _write_settings(scratch / "settings")
    declare_entry_points(scratch / "site")  # the environment may have been made before they were
    port, token = free_port(), secrets.token_hex(16)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(scratch / "site")]),
        "QLORA_PROFILE": "tiny",
        "QLORA_RUNS": str(runs),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "JUPYTER_CONFIG_DIR": str(scratch / "config"),
        "JUPYTER_DATA_DIR": str(scratch / "data"),
        "JUPYTER_RUNTIME_DIR": str(scratch / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(scratch / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(scratch / "workspaces"),
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.expose_app_in_browser=True",
        "--ServerApp.terminals_enabled=False",
    ]
    with open(scratch / "server.log", "wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for_server(server, f"http://127.0.0.1:{port}", token, scratch / "server.log")
            yield Lab(folder, runs, f"http://127.0.0.1:{port}", token)
        finally:
            server.terminate()  # ends its kernels first
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _write_settings(folder: Path) -> None:
    """No question about news, nothing that asks the network, no notifications over what is looked at."""
    path = folder / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}))


def _wait_for_server(server: subprocess.Popen[bytes], url: str, token: str, log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/api/status?token={token}", timeout=5):
            return
        if server.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"JupyterLab did not start:\n{log.read_text()}")
        time.sleep(0.1)


class Notebook:
    """A notebook in a browser's page.

    Args:
        page: Playwright's page.
        lab: the server.
        name: the notebook's file, below the served folder.
    """

    def __init__(self, page: Any, lab: Lab, name: str) -> None:
        self.page, self.lab, self.name = page, lab, name
        self.open()

    def open(self) -> None:
        """Opens it (again: as a reload of the page) and waits until its kernel is there."""
        self.page.goto(f"{self.lab.url}/lab?token={self.lab.token}&reset")
        self.page.wait_for_function("() => window.jupyterapp !== undefined")
        self.page.evaluate(
            """async name => {
                await jupyterapp.restored;
                window.notebook = await jupyterapp.commands.execute('docmanager:open', {path: name, factory: 'Notebook'});
                await notebook.context.ready;
                await notebook.sessionContext.ready;
                if (!jupyterapp.shell.leftCollapsed) jupyterapp.shell.collapseLeft();
            }""",
            self.name,
        )
        self.wait_idle()

    def reload(self) -> None:
        """Saves and reloads the page, as a person who comes back; the kernel lives on."""
        self.page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
        self.page.wait_for_function("() => !notebook.context.model.dirty")
        self.open()

    def run_all(self, timeout_s: float = RUN_TIMEOUT_S) -> None:
        """Runs all cells and waits until the last has ended.

        Raises:
            AssertionError: a cell failed; with its traceback.
        """
        self.page.evaluate(
            """() => {
                window.ended = undefined;
                jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.ended = true; });
            }"""
        )
        self.page.wait_for_function("() => window.ended", timeout=1000 * timeout_s)
        self.wait_idle()
        errors = [output for output in self.outputs() if output["output_type"] == "error"]
        assert not errors, "\n".join("\n".join(error["traceback"]) for error in errors)

    def run_cell(self, number: int, timeout_s: float = RUN_TIMEOUT_S) -> None:
        """Runs one cell, counted from 0, and waits for its end."""
        self.page.evaluate(
            """number => {
                window.ended = undefined;
                notebook.content.deselectAll();
                notebook.content.activeCellIndex = number;
                jupyterapp.commands.execute('notebook:run-cell').then(() => { window.ended = true; });
            }""",
            number,
        )
        self.page.wait_for_function("() => window.ended", timeout=1000 * timeout_s)

    def kernel(self, code: str) -> str:
        """Runs code in the notebook's kernel, after all that was clicked before, and returns what it prints."""
        return self.page.evaluate(
            """async code => {
                let printed = '';
                const future = notebook.sessionContext.session.kernel.requestExecute({code});
                future.onIOPub = message => {
                    if (message.header.msg_type === 'stream') printed += message.content.text;
                    if (message.header.msg_type === 'error') printed += message.content.traceback.join('\\n');
                };
                await future.done;
                return printed;
            }""",
            code,
        )

    def outputs(self) -> list[dict[str, Any]]:
        """The outputs of all cells, as the notebook's file would hold them."""
        cells = self.page.evaluate("() => notebook.content.model.toJSON().cells")
        return [output for cell in cells for output in cell.get("outputs", [])]

    def wait_idle(self, timeout_s: float = 60.0) -> None:
        """Waits until the kernel has nothing to do."""
        self.page.wait_for_function(
            "() => notebook.sessionContext.session?.kernel?.status === 'idle'", timeout=1000 * timeout_s
        )

    def theme(self, name: str) -> None:
        """Changes to the `light` or `dark` theme and waits until it is drawn."""
        self.page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", THEMES[name])
        light = "true" if name == "light" else "false"
        self.page.wait_for_function(
            f"() => document.body.dataset.jpThemeLight === '{light}' && !document.querySelector('#jupyterlab-splash')"
        )

    def close(self) -> None:
        """Ends the kernel: each holds a torch of its own."""
        self.page.evaluate("() => notebook.sessionContext.shutdown()")
