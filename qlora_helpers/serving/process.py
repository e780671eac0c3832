"""Starts and stops servers: `serve` and `stop_serving`, in a notebook and from the command line. Imports no torch."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import ipaddress
import json
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from qlora_helpers.base.errors import ModelError, RunError, UserError
from qlora_helpers.base.python import python_command, python_environment
from qlora_helpers.base.text import Say, brief
from qlora_helpers.runs import locks
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.guard import refuse_links
from qlora_helpers.serving.records import Serving, all_serving, is_alive, token_path
from qlora_helpers.serving.server import FAILED, LOADING, READY
from qlora_helpers.serving.together import runs_to_serve

NEEDED = ("starlette", "uvicorn")
INSTALL = "Install them: pip install 'qlora_helpers[serve]', or pip install starlette uvicorn."
STOP_TIMEOUT_S = 10.0
_servers: dict[tuple[Any, ...], Server] = {}


def serve(run: Run, *, also: Sequence[Run] = (), host: str = "127.0.0.1", port: int = 0, say: Say = print) -> Server:
    """Serves a run's model to OpenAI clients on this machine, or returns the server that this process runs already.

    The server answers for `base` (the untuned model) and the run's name, in the run's own prompt and with its stop tokens, to who
    has its token. It is a process of its own and ends with this one; what this process holds on a GPU stays there.

    Args:
        run: a run with a saved adapter and its certificate.
        also: further runs on the same base model, each under its own name.
        host: the address to listen on; any other than this machine's own loopback lets other machines reach it.
        port: 0 takes a free one.
        say: called with lines on what takes long, and with a warning about `host`.

    Returns:
        The server: `OpenAI(base_url=server.url, api_key=server.token)`; `server.stop()` ends it.

    Raises:
        UserError: an adapter has no certificate, the runs have different base models, a GPU is in use, the port is taken, or
            starlette and uvicorn are not installed.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs {' and '.join(missing)}", next_step=INSTALL)
    if not _is_loopback(host):
        say(
            f"Warning: on {host} other machines can reach this server. Its token and all texts go over the network "
            "unencrypted: use it on a network that you trust, or put a proxy with TLS before it."
        )
    for each in (run, *also):
        refuse_links(each.folder)
    runs = runs_to_serve(run, also)
    key = (*(each.folder.resolve() for each in runs), host, port)
    if key not in _servers or not _servers[key].is_running:
        if runs[0].config().model.device_map != "cpu":
            locks.refuse_busy_gpus(locks.visible_gpus())
        _servers[key] = Server(runs, host, port, say)
    return _servers[key]


def stop_serving(run: Run | None = None) -> list[Serving]:
    """Stops what serves a run, whoever of this account started it on this machine.

    Args:
        run: the run; where none serves it as its first, those that serve it beside another are stopped. None stops the only
            server there is.

    Returns:
        What was stopped.

    Raises:
        RunError: nothing serves it, or several servers run and none is named.
    """
    import psutil

    running = all_serving()
    found = running
    if run is not None:
        folder = str(run.folder.resolve())
        first = [each for each in running if each.folders[:1] == (folder,)]
        found = first or [each for each in running if folder in each.folders]
    if not found or (run is None and len(found) > 1):
        names = ", ".join(each.names[1] for each in running) or "nothing"
        raise RunError(
            f"{run.name!r} is not being served here" if run else "it is not clear which server is to stop",
            got=f"served: {names}",
            next_step="Name a run that is served." if running else "",
        )
    for serving in found:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(serving.pid)
            if is_alive(serving):
                process.terminate()
                with contextlib.suppress(psutil.TimeoutExpired):
                    process.wait(STOP_TIMEOUT_S)
            if is_alive(serving) and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
    for server in _servers.values():
        server.is_running  # noqa: B018  # collects the process if it was a child
    all_serving()  # removes the records
    return found


class Server:
    """A server that runs in a process of its own. Its text holds no token, so a notebook file gives nobody access.

    Attributes:
        url: the address for a client.
        token: its key.
        names: of the models.
    """

    def __init__(self, runs: Sequence[Run], host: str, port: int, say: Say) -> None:
        self.token = secrets.token_urlsafe(32)
        self.url, self.names = "", ()
        folders = [str(run.folder.resolve()) for run in runs]
        asked = {"token": self.token, "folders": folders, "host": host, "port": port}
        with tempfile.TemporaryFile() as output:
            # In the kernel's own process group, interrupting a cell would end the server too.
            self._process = subprocess.Popen(
                python_command("qlora_helpers.serving.server"),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=python_environment() | {"PYTHONUNBUFFERED": "1"},
                process_group=0,
            )
            atexit.register(self.stop)
            try:
                self._wait_until_ready(output, json.dumps(asked), say)
            except BaseException:
                self.stop()
                raise

    def _wait_until_ready(self, output: IO[bytes], asked: str, say: Say) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended already; its output says why
            assert self._process.stdin is not None
            self._process.stdin.write(f"{asked}\n".encode())
            self._process.stdin.flush()  # and stays open: the process ends when it is closed
        read, seen = b"", 0
        while True:
            ended = not self.is_running
            read += os.pread(output.fileno(), 2**20, len(read))  # read() would move the position at which it writes
            *lines, rest = read.decode(errors="replace").split("\n")
            for line in lines[seen:]:
                if self._is_ready(line, say):
                    return
            seen = len(lines)
            if ended:
                last = [line for line in (*lines, rest) if line.strip()][-1:]
                raise RunError("the server did not start", got=brief(Exception(*last)))
            time.sleep(0.05)

    def _is_ready(self, line: str, say: Say) -> bool:
        if line.startswith(LOADING):
            say(json.loads(line.removeprefix(LOADING)))
        elif line.startswith(FAILED):
            parts = json.loads(line.removeprefix(FAILED))
            raise ModelError(parts.pop("problem"), **parts)
        elif line.startswith(READY):
            found = json.loads(line.removeprefix(READY))
            self.url, self.names = found["url"], tuple(found["names"])
            return True
        return False

    @property
    def is_running(self) -> bool:
        """Whether its process is alive."""
        return self._process.poll() is None

    @property
    def token_path(self) -> Path:
        """The file that holds the token while the server runs; no other user can read it."""
        return token_path(self._process.pid)

    def wait(self) -> None:
        """Returns when the server has ended."""
        self._process.wait()

    def stop(self) -> None:
        """Ends the process; an answer that is being given is broken off."""
        atexit.unregister(self.stop)
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        if self.is_running:
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        all_serving()  # removes what a process that was killed has left

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        names = ", ".join(self.names)
        if not self.is_running:
            return f"server of {names}: stopped"
        return f"{self.url} answers for {names} to who has server.token (server.stop() ends it)"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise UserError(
            "a server listens on an address",
            expected="such as 127.0.0.1, or 0.0.0.0 for all of this machine's",
            got=repr(host[:60]),
            next_step="Give the address in numbers.",
        ) from None
