"""TensorBoard as a process beside the notebook, shown in a view that no notebook file keeps.

It answers only to who knows its secret path (`tensorboard_server`), and a browser reaches it as `browser_way` finds. Only
TensorBoard reads the event files, here or on S3. This module imports no torch.
"""

from __future__ import annotations

import atexit
import contextlib
import html
import json
import os
import re
import secrets
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import RunError
from qlora_helpers.base.python import python_command, python_environment
from qlora_helpers.base.style import inline
from qlora_helpers.runs.buckets import refuse_unconfirmed
from qlora_helpers.runs.events_copy import s3_target
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.guard import refuse_links
from qlora_helpers.views.browser_way import browser_address
from qlora_helpers.views.tensorboard_relay import socket_name, sockets_folder
from qlora_helpers.views.tensorboard_server import READY

START_TIMEOUT_S = 90.0
_READY = re.compile(rf"{READY} (\d+)\n".encode())
_pages: dict[str, TensorBoardPage] = {}


def tensorboard_arguments(run: Run, config: RunConfig) -> list[str]:
    """Returns the arguments with which the `tensorboard` command shows this run, from S3 or from its folder.

    That command answers whoever reaches its port, all users of the machine among them; `start_tensorboard` does not.
    """
    return ["--logdir", s3_target(run, config) or str(run.events_dir)]


def start_tensorboard(*runs: Run, from_s3: bool | None = None) -> TensorBoardPage:
    """Starts TensorBoard on one or more runs, or returns the page if it is running already.

    Args:
        runs: the runs to show, as in `start_tensorboard(run)` or `start_tensorboard(*find_runs("runs"))`.
        from_s3: whether to read the copy of a single run on S3, with every run beside it; None prefers local events, which are
            never behind the copy.

    Returns:
        A page that shows itself in a notebook and prints as its address. `stop()` ends it, and so does the end of the kernel.

    Raises:
        RunError: a run has no events, its folder holds links, or TensorBoard did not start.
    """
    name = ", ".join(run.name for run in runs)
    for run in runs:
        refuse_links(run.folder)
    if from_s3 is None:
        from_s3 = len(runs) == 1 and bool(_bucket(runs[0])) and not any(runs[0].events_dir.glob("events.*"))
    if from_s3:
        place: str | dict[str, Path] | None = _bucket(runs[0])
        if place is None:
            raise RunError(
                f"the events of {name!r} are not copied to a bucket",
                next_step="Set train.tensorboard=s3://bucket/prefix first.",
            )
        refuse_unconfirmed(runs[0].config())
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
        port: the port of the loopback interface that it listens on; 0 where it listens on a Unix socket.
        url: where a browser finds it; only a path if Jupyter passes it on. It holds the secret: who has it sees the page.
    """

    def __init__(self, name: str, place: str | Mapping[str, Path]) -> None:
        self.name = name
        self._address = browser_address()
        self._token = secrets.token_hex(16)
        self._view: Any = None
        # TensorBoard names a run after its folder, so a folder of links gives runs the names that people know.
        self._links = tempfile.TemporaryDirectory(prefix="tensorboard-")
        if not isinstance(place, str):
            for run_name, folder in place.items():
                (Path(self._links.name) / run_name).symlink_to(folder, target_is_directory=True)
        socket = str(sockets_folder() / socket_name(self._token)) if self._address.by_socket else None
        asked = {
            "logdir": place if isinstance(place, str) else self._links.name,
            "token": self._token,
            "socket": socket,
        }
        with tempfile.TemporaryFile() as log:
            # In the kernel's own process group, interrupting a cell would end TensorBoard too.
            self._process = subprocess.Popen(
                python_command("qlora_helpers.views.tensorboard_server"),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(python_environment()),
                process_group=0,
            )
            atexit.register(self.stop)
            self.port = self._wait_for_port(log, json.dumps(asked))
        self.url = self._address.url(self._token, self.port)

    def _wait_for_port(self, log: IO[bytes], asked: str) -> int:
        with contextlib.suppress(BrokenPipeError):  # it has ended already; its output says why
            assert self._process.stdin is not None
            self._process.stdin.write(f"{asked}\n".encode())
            self._process.stdin.flush()  # and stays open: the process ends when it is closed
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            printed = os.pread(log.fileno(), 100_000, 0)  # read() would move the position at which TensorBoard writes
            if found := _READY.search(printed):
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
        """Takes the view out of the notebook, so that nothing asks for the page again, and ends the process; the events stay."""
        atexit.unregister(self.stop)
        if self._view is not None:
            self._view.value = f"<p>{html.escape(self._line(running=False))}</p>"
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        if self.is_running:
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

    def _line(self, *, running: bool) -> str:
        if not running:
            return f"TensorBoard of {self.name}: stopped"
        caution = f" {self._address.caution}." if self._address.caution else ""
        return f"TensorBoard of {self.name}: print(page.url) gives its address, page.stop() ends it.{caution}"

    def __repr__(self) -> str:
        if not self.is_running:
            return self._line(running=False)
        return f"TensorBoard of {self.name}: {self.url} (stop() ends it)"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """Returns a live view, and a text without the address: what a notebook file keeps gives nobody access."""
        line = self._line(running=self.is_running)
        still = {"text/plain": line, "text/html": f"<p>{html.escape(line)}</p>"}
        if not self.is_running:
            return still
        import ipywidgets

        if self._view is None:
            self._view = ipywidgets.HTML(self._frame())
        return (self._view._repr_mimebundle_() or {}) | still

    def _frame(self) -> str:
        url, name = html.escape(self.url), html.escape(self.name)
        caution = f"<p>{html.escape(self._address.caution)}.</p>" if self._address.caution else ""
        return (
            f'<p>TensorBoard of {name}: <a href="{url}" target="_blank" rel="noopener">open it in its own tab</a></p>{caution}'
            f'<iframe title="TensorBoard of {name}" src="{url}" width="100%" height="640" style="{inline("frame")}"></iframe>'
        )


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment with the variable in which TensorBoard, unlike boto3, looks for an S3 that is not Amazon's."""
    endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
    return ({"S3_ENDPOINT": endpoint} if endpoint else {}) | dict(environ)
