"""Several processes of one training, forked from one that has imported everything: real ranks, which join by gloo in a second."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT_S = 240.0


class Ranks:
    """The running processes of a training.

    Args:
        function: what each process calls; what it returns is pickled.
        arguments: of the function.
        processes: how many.
        here: how many of them count as those of one machine; None for all.
        environment: further variables, and one that must differ by process as a list.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        processes: int = 2,
        here: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        from qlora_helpers.runs.ranks import loopback_interface, rank_environment

        self.folder = Path(tempfile.mkdtemp(prefix="qlora-ranks-"))
        interface = loopback_interface()
        self.pids: list[int] = []
        self.codes: dict[int, int] = {}
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(processes):
            variables = rank_environment(rank, processes, str(self.folder / "store"), interface) | (environment or {})
            if here is not None:
                variables |= {"LOCAL_RANK": str(rank % here), "LOCAL_WORLD_SIZE": str(here)}
            child = os.fork()
            if child == 0:
                self._run(rank, function, arguments, variables)
            self.pids.append(child)

    def _run(self, rank: int, function: Callable[..., Any], arguments: tuple, variables: dict[str, str]) -> None:
        code = 1
        try:
            with open(self.folder / f"{rank}.log", "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                sys.stdout = sys.stderr = log
                faulthandler.dump_traceback_later(LIMIT_S - 10, file=log, exit=True)
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)
                os.environ.update(variables)
                try:
                    found = function(*arguments)
                    (self.folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
                    code = 0
                except SystemExit as end:
                    code = end.code if isinstance(end.code, int) else 1
                except BaseException as error:
                    traceback.print_exc()
                    (self.folder / f"{rank}.pickle").write_bytes(pickle.dumps(f"{type(error).__name__}: {error}"))
                log.flush()
        finally:
            os._exit(code)

    def kill(self) -> None:
        """Kills all that still run."""
        for pid in self.pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def wait(self, limit_s: float = LIMIT_S) -> list[int]:
        """Waits for all and returns their exit codes, negative for a signal; those that outlast the limit are killed."""
        until = time.monotonic() + limit_s
        while not self.ended():
            if time.monotonic() > until:
                self.kill()
            time.sleep(0.02)
        return [self.codes[pid] for pid in self.pids]

    def ended(self) -> bool:
        """Whether all of them have ended."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def found(self, rank: int) -> Any:
        """What a process returned, or its error as text; None where it was killed."""
        path = self.folder / f"{rank}.pickle"
        return pickle.loads(path.read_bytes()) if path.exists() else None

    def said(self) -> str:
        """The ends of what the processes printed."""
        return "\n".join(f"--- {path.stem}\n{path.read_text()[-5000:]}" for path in sorted(self.folder.glob("*.log")))


def in_ranks(function: Callable[..., Any], *arguments: Any, **more: Any) -> list[Any]:
    """Calls a function in several processes that can join each other; returns what each returned.

    Args:
        function, arguments: what is called.
        more: as for `Ranks`.
    """
    ranks = Ranks(function, *arguments, **more)
    codes = ranks.wait()
    assert not any(codes), f"exit codes {codes}\n{ranks.said()}"
    return [ranks.found(rank) for rank in range(len(codes))]
