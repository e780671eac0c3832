"""Propagates a failure of one rank to all ranks of a training, so that none waits for it and the first can report why.

A process that fails writes the reason into the store by which the processes met, before it ends. The others learn of it when the
next exchange fails (gloo closes its connections with the process) or, where a GPU waits inside NCCL, from a thread that looks into
the store once a second. They raise an error that says which process failed and why; for lack of memory it is one that
`planning.out_of_memory` turns into settings that fit, as if it had happened here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.planning.out_of_memory import OutOfMemoryElsewhere, failure_of, is_out_of_memory
from qlora_helpers.planning.rescue import Failure

KEY = "qlora_failure"
LOOK_S = 1.0  # between two looks into the store
ARRIVES_S = 3.0  # a reason is written before its process ends; a slow disk may show it this late
STUCK_S = (
    6.0  # after which a process that still waits for the one that failed reports and ends; `runs.ranks` gives it 10
)
EXIT_CODE = 2  # of a `UserError` on the command line
_WORDS = ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo", "process group")
log = logging.getLogger(__name__)


class CommonFailure(RunError):
    """A failure that every process has found in the same values at the same step: each raises its own, which says the same."""


@contextlib.contextmanager
def failures_propagated(when_stuck: Callable[[Exception], None] = lambda error: None) -> Iterator[None]:
    """While open, an error that ends one process of a training ends all; each of the others raises the reason that it reported.

    Args:
        when_stuck: called with the error in a process that can't raise it, because it waits for the one that failed; the process
            ends afterwards.

    Raises:
        RunError: another process failed, or ended without a reason.
        OutOfMemoryElsewhere: another process ran out of memory.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(done, when_stuck), name="failures of other processes", daemon=True)
    watcher.start()
    reported = None
    try:
        yield
    except BaseException as error:
        if isinstance(error, CommonFailure):
            _report(error)
            raise
        reported = _reported(wait=is_of_exchange(error))
        if reported is None and is_of_exchange(error):
            reported = _ended()
        elif reported is None:
            _report(error)
        if reported is None:
            raise
        log.debug("ended by another process", exc_info=error)
    finally:
        done.set()
    if reported is not None:  # outside of the handler: the frames of the error here hold memory
        raise reported


def _ended() -> RunError:
    from qlora_helpers.training.processes import several_machines

    if several_machines():
        return RunError(
            "another machine of this training was lost, or its process ended",
            next_step="Start it on all machines again: it goes on from its last checkpoint.",
        )
    return RunError(
        "another process of this training ended",
        next_step="Train again: the run goes on from its last good checkpoint. Its log may say what ended it.",
    )


def _store() -> Any:
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.distributed_c10d._get_default_store()


def _report(error: BaseException) -> None:
    found: dict[str, Any] = {"rank": int(os.environ["RANK"])}
    if is_out_of_memory(error):
        found["failure"] = asdict(failure_of(error))
    elif isinstance(error, UserError):
        found["problem"] = str(error)
    else:
        found["problem"] = f"{type(error).__name__}: {error}"
    with contextlib.suppress(Exception):  # the store is gone with the process that held it
        if (store := _store()) is not None and not store.check([KEY]):
            store.set(KEY, json.dumps(found))


def _reported(*, wait: bool) -> Exception | None:
    until = time.monotonic() + (ARRIVES_S if wait else 0)
    while True:
        with contextlib.suppress(Exception):
            if (store := _store()) is not None and store.check([KEY]):
                found = json.loads(store.get(KEY))
                return None if found["rank"] == int(os.environ["RANK"]) else _error(found)
        if time.monotonic() >= until:
            return None
        time.sleep(0.1)


def _error(found: dict[str, Any]) -> Exception:
    who = f"process {found['rank'] + 1} of {os.environ['WORLD_SIZE']}"
    if "failure" in found:
        values = found["failure"]
        return OutOfMemoryElsewhere(Failure(**values | {"where": f"{who}, {values['where']}"}))
    return RunError(f"{who} failed: {found['problem']}")


def is_of_exchange(error: BaseException | None) -> bool:
    """Whether an error, or one that it was made from, comes from an exchange between processes, and so perhaps from another's end.

    What is tried on a model, a proof before training above all, explains errors in its own words: the first cause counts.
    """
    from torch import distributed

    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        of_torch = isinstance(error, RuntimeError | ValueError) and not isinstance(error, UserError)
        if isinstance(error, distributed.DistError) or (of_torch and any(word in str(error) for word in _WORDS)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _watch(done: threading.Event, when_stuck: Callable[[Exception], None]) -> None:
    """Looks for a reason in the store until the block is left; then aborts what a GPU waits for, or ends the process."""
    while not done.wait(LOOK_S):
        reported = _reported(wait=False)
        if reported is None:
            continue
        if not _abort_nccl() or done.wait(STUCK_S):
            return
        log.error("%s", reported)
        with contextlib.suppress(Exception):
            when_stuck(reported)
        os._exit(EXIT_CODE)


def _abort_nccl() -> bool:
    """Aborts the exchanges that a GPU waits for inside NCCL; returns whether there are such. gloo's end with the other process.

    PyTorch has no public call for it and names its own experimental. Where that is missing or fails, a process that waits ends
    itself a little later, as `_watch` says; a thread of its own keeps a call that blocks from preventing that.
    """
    from torch import distributed

    if distributed.get_backend() != "nccl":
        return False
    abort = getattr(distributed.distributed_c10d, "_abort_process_group", None)
    if abort is None:
        log.warning("this PyTorch can't abort an exchange: a process that waits in one ends in %.0f s", STUCK_S)
        return True

    def aborted() -> None:
        try:
            abort()
        except Exception as error:
            log.warning("the exchange was not aborted, a process that waits in it ends in %.0f s: %s", STUCK_S, error)

    threading.Thread(target=aborted, name="abort of exchanges", daemon=True).start()
    return True
