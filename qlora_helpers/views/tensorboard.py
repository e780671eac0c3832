"""TensorBoard as a process beside the notebook, and the address at which a browser finds it.

On a person's own machine the browser reaches TensorBoard's port directly; on JupyterHub and in SageMaker Studio it can't, and goes
through Jupyter's proxy. Only TensorBoard reads the event files, here or on S3. This module imports no torch.
"""

from __future__ import annotations

import atexit
import html
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import RunError
from qlora_helpers.base.style import inline
from qlora_helpers.runs.events_copy import s3_target
from qlora_helpers.runs.folder import Run

START_TIMEOUT_S = 90.0
_ADDRESS = re.compile(rb"TensorBoard \S+ at http://[^ :]+:(\d+)/")
_pages: dict[str, TensorBoardPage] = {}


def tensorboard_arguments(run: Run, config: RunConfig) -> list[str]:
    """Returns the arguments with which the `tensorboard` command (or `%tensorboard`) shows this run, from S3 or from its folder."""
    return ["--logdir", s3_target(run, config) or str(run.events_dir)]


def start_tensorboard(*runs: Run, from_s3: bool | None = None) -> TensorBoardPage:
    """Starts TensorBoard on one or more runs, on a free port of this machine, or returns the page if it is running already.

    Args:
        runs: the runs to show, as in `start_tensorboard(run)` or `start_tensorboard(*find_runs("runs"))`.
        from_s3: whether to read the copy of a single run on S3, with every run beside it; None prefers local events, which are
            never behind the copy.

    Returns:
        A page that shows itself in a notebook and prints as its address. `stop()` ends it, and so does the end of the kernel.

    Raises:
        RunError: a run has no events, or TensorBoard did not start.
    """
    name = ", ".join(run.name for run in runs)
    if from_s3 is None:
        from_s3 = len(runs) == 1 and bool(_bucket(runs[0])) and not any(runs[0].events_dir.glob("events.*"))
    if from_s3:
        place: str | dict[str, Path] | None = _bucket(runs[0])
        if place is None:
            raise RunError(
                f"the events of {name!r} are not copied to a bucket",
                next_step="Set train.tensorboard=s3://bucket/prefix first.",
            )
    else:
        place = {run.name: run.need(run.events_dir, "Notebook 04_train").resolve() for run in runs}
    key = str(place)
    if key not in _pages or not _pages[key].is_running:
        _pages[key] = TensorBoardPage(name, place)
    return _pages[key]


def _bucket(run: Run) -> str | None:
    place = run.config().train.tensorboard
    return place if place.startswith("s3://") else None


class TensorBoardPage:
    """A running TensorBoard.

    Args:
        name: the name of what it shows.
        place: an `s3://` address, or a folder of events for each run's name.

    Attributes:
        port: the port that TensorBoard chose.
        url: where a browser finds it; only a path if Jupyter passes it on.
    """

    def __init__(self, name: str, place: str | Mapping[str, Path]) -> None:
        self.name = name
        # TensorBoard names a run after its folder, so a folder of links gives runs the names that people know.
        self._links = tempfile.TemporaryDirectory(prefix="tensorboard-")
        if not isinstance(place, str):
            for run_name, folder in place.items():
                (Path(self._links.name) / run_name).symlink_to(folder, target_is_directory=True)
        command = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1", "--port", "0", "--logdir"]
        command += [place, "--reload_interval", "30"] if isinstance(place, str) else [self._links.name]
        with tempfile.TemporaryFile() as log:
            # In the kernel's own process group, interrupting a cell would end TensorBoard too.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(os.environ),
                process_group=0,
            )
            atexit.register(self.stop)
            self.port = self._wait_for_port(log)
        self.url = browser_url(self.port)

    def _wait_for_port(self, log: IO[bytes]) -> int:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            printed = os.pread(log.fileno(), 100_000, 0)  # read() would move the position at which TensorBoard writes
            if found := _ADDRESS.search(printed):
                return int(found[1])
            if not self.is_running or time.monotonic() > deadline:
                self.stop()
                last = [line for line in printed.decode(errors="replace").splitlines() if line.strip()][-1:]
                raise RunError("TensorBoard did not start", got=repr(*last or [""]), next_step="Is it installed here?")
            time.sleep(0.05)

    @property
    def is_running(self) -> bool:
        """Whether its process is alive."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends the process; the event files stay."""
        atexit.unregister(self.stop)
        if self.is_running:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._links.cleanup()

    def __enter__(self) -> TensorBoardPage:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        if not self.is_running:
            return f"TensorBoard of {self.name}: stopped"
        return f"TensorBoard of {self.name}: {self.url} (stop() ends it)"

    def _repr_html_(self) -> str:
        if not self.is_running:
            return f"<p>{html.escape(repr(self))}</p>"
        url, name = html.escape(self.url), html.escape(self.name)
        return (
            f'<p>TensorBoard of {name}: <a href="{url}" target="_blank" rel="noopener">open it in its own tab</a></p>'
            f'<iframe title="TensorBoard of {name}" src="{url}" width="100%" height="640" style="{inline("frame")}"></iframe>'
        )


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment with the variable in which TensorBoard, unlike boto3, looks for an S3 that is not Amazon's."""
    endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
    return ({"S3_ENDPOINT": endpoint} if endpoint else {}) | dict(environ)


def browser_url(port: int, environ: Mapping[str, str] = os.environ) -> str:
    """Returns the address at which a browser finds a port of this machine.

    The address goes through `jupyter-server-proxy` on JupyterHub, in SageMaker Studio, and wherever the Jupyter server that started
    this kernel has it. Otherwise it is the port itself, which a browser on the same machine reaches. `TENSORBOARD_PROXY_URL`, with
    `%PORT%` in it, overrides both.
    """
    if "TENSORBOARD_PROXY_URL" in environ:
        return environ["TENSORBOARD_PROXY_URL"].replace("%PORT%", str(port))
    if prefix := environ.get("JUPYTERHUB_SERVICE_PREFIX"):
        return f"{prefix.rstrip('/')}/proxy/{port}/"
    if app := environ.get("SAGEMAKER_APP_TYPE_LOWERCASE") or environ.get("SAGEMAKER_APP_TYPE", "").lower():
        return f"/{app}/default/proxy/{port}/"
    server = _jupyter_server(environ)
    if server and _answers(f"{server['url']}proxy/{port}/", server.get("token", "")):
        return f"{server['base_url']}proxy/{port}/"
    return f"http://127.0.0.1:{port}/"


def _jupyter_server(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns what the Jupyter server that started this kernel wrote about itself, or None if there is no such server."""
    try:
        from jupyter_core.paths import jupyter_runtime_dir

        path = Path(jupyter_runtime_dir()) / f"jpserver-{int(environ['JPY_PARENT_PID'])}.json"
        server = json.loads(path.read_text())
        return server if {"url", "base_url"} <= server.keys() else None
    except (ImportError, KeyError, ValueError, OSError):
        return None


def _answers(url: str, token: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"token {token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
