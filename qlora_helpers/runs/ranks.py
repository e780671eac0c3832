"""Starts the processes of one training on this machine, and ends them together.

torchrun's stores listen on every address of a machine without a password, and unpickle what they are sent
(https://github.com/pytorch/pytorch/issues/173909). Here the processes meet in a file in a folder that only their owner can enter,
and gloo and NCCL are bound to the loopback interface. Each process is numbered by `RANK`, as torchrun numbers them. This module
imports no torch; `training.processes` joins the processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from types import FrameType

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.python import python_environment
from qlora_helpers.machine.telemetry import cpu_cores

STORE = "QLORA_STORE"
"""The environment variable that names the file in which the processes meet."""
NOTICE_S = 10.0
"""How long the others have to notice by themselves that one has failed, and to report why, before they are asked to end."""
END_S = 20.0
"""How long after that they are killed."""
_POLL_S = 0.1
LOOPBACK = "127.0.0.1"


def machines() -> int:
    """Returns how many machines train together, as torchrun says; 1 where it started nothing."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def loopback_interface() -> str:
    """Returns the name of the network interface that has the address 127.0.0.1: `lo` on Linux, `lo0` on macOS.

    Raises:
        UserError: no interface has it.
    """
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == LOOPBACK for each in addresses):
            return name
    raise UserError(
        "several processes need this machine's loopback interface",
        expected=f"an interface with the address {LOOPBACK}",
        got=", ".join(psutil.net_if_addrs()) or "no interface",
        next_step="Train in one process.",
    )


def rank_environment(rank: int, processes: int, store: str, interface: str) -> dict[str, str]:
    """Returns the variables by which torch, accelerate and transformers know a process's place among the others."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": "1",  # nothing listens there: who asks for it has not joined by the store
        STORE: store,
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": f"={interface}",
    }


def run_ranks(command: Sequence[str], processes: int) -> int:
    """Runs a command in several processes that can join each other, and returns when all have ended.

    SIGTERM is passed on. Where one process fails, the others are ended. If this process is killed, so are they (on Linux).

    Args:
        command: the command of each process.
        processes: how many.

    Returns:
        0 if all succeeded, else the exit code of the first that failed.

    Raises:
        UserError: fewer than one process, or there is no loopback interface.
    """
    check_processes(processes)
    interface = loopback_interface()
    threads = {"OMP_NUM_THREADS": str(max(1, cpu_cores() // processes))}  # a value that the person has set is kept
    with tempfile.TemporaryDirectory(prefix="qlora-ranks-") as folder:  # only its owner may enter it
        store = os.path.join(folder, "store")
        started: list[subprocess.Popen[bytes]] = []
        forwarder = _SigtermPassedOn(started)
        before = signal.signal(signal.SIGTERM, forwarder.handle)
        try:
            for rank in range(processes):
                environment = threads | python_environment() | rank_environment(rank, processes, store, interface)
                started.append(subprocess.Popen(command, env=environment))
                if forwarder.received:
                    started[-1].terminate()
            return _wait(started, forwarder)
        finally:
            _end(started)
            signal.signal(signal.SIGTERM, before)


def check_processes(processes: int) -> None:
    """Raises a `UserError` for fewer than one process."""
    if processes < 1:
        raise UserError("a training needs processes", expected="at least 1", got=str(processes))


class _SigtermPassedOn:
    def __init__(self, started: list[subprocess.Popen[bytes]]) -> None:
        self.started, self.received = started, False

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        for process in self.started:
            if process.poll() is None:
                process.terminate()


def _wait(started: list[subprocess.Popen[bytes]], forwarder: _SigtermPassedOn) -> int:
    first, noticed_at = 0, 0.0
    while None in (codes := [process.poll() for process in started]):
        failed = next(filter(None, codes), 0)
        if failed and not forwarder.received:
            first, noticed_at = first or failed, noticed_at or time.monotonic()
            if time.monotonic() - noticed_at > NOTICE_S:
                break
        time.sleep(_POLL_S)
    code = first or next(filter(None, codes), 0)
    return code if code >= 0 else 128 - code


def _end(started: list[subprocess.Popen[bytes]]) -> None:
    left = [process for process in started if process.poll() is None]
    for process in left:
        process.terminate()
    until = time.monotonic() + END_S
    for process in left:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
