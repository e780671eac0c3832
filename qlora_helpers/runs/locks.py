"""Locks that keep two trainers off one run, and off one GPU, and two threads off one model.

A run's lock lies in its folder, a GPU's in the cache of the machine. The system lets go of both when their process ends, however
it ends.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import cache_root, read_json, write_json
from qlora_helpers.machine import telemetry
from qlora_helpers.runs.folder import Run

# Adapters are switched and modes set on the model itself: a panel's thread must wait its turn.
MODEL_IN_USE = threading.RLock()


@contextlib.contextmanager
def run_lock(run: Run) -> Iterator[None]:
    """Holds a run's lock for the block.

    Raises:
        RunError: another process holds it.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with _held(_run_lock_path(run)) as got:
        if not got:
            raise RunError(
                f"another process is training {run.name!r}", next_step="Wait for it, or stop it; then try again."
            )
        yield


def is_locked(run: Run) -> bool:
    """Whether a trainer on this machine holds the run's lock."""
    if not _run_lock_path(run).exists():
        return False
    with _held(_run_lock_path(run)) as got:
        return not got


@contextlib.contextmanager
def gpu_locks(run: Run, gpus: Sequence[str]) -> Iterator[None]:
    """Holds the locks of some GPUs for the block.

    Args:
        run: who takes them; a later one that is refused is told its name.
        gpus: as `visible_gpus` names them.

    Raises:
        RunError: another trainer has one of them; none is held then.
    """
    with contextlib.ExitStack() as held:
        for gpu in sorted(gpus):
            path = _gpu_lock_path(gpu)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not held.enter_context(_held(path)):
                raise _taken(gpu)
            write_json(path.with_suffix(".json"), {"run": run.name, "pid": os.getpid()})
        yield


def refuse_taken_gpus(gpus: Sequence[str]) -> None:
    """Looks whether some GPUs are free.

    Raises:
        RunError: another trainer has one of them.
    """
    for gpu in gpus:
        if _gpu_lock_path(gpu).exists():
            with _held(_gpu_lock_path(gpu)) as got:
                if not got:
                    raise _taken(gpu)


def visible_gpus(nvml: Any = None) -> tuple[str, ...]:
    """The GPUs that a process started from this one may use, by their unique ids; empty where there is none.

    Goes by `CUDA_VISIBLE_DEVICES`, as CUDA does: numbers or ids, and nothing after one that does not exist.

    Args:
        nvml: stands in for the module `pynvml`.
    """
    there = telemetry.gpu_ids(nvml)
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return tuple(there)
    found: list[str] = []
    for name in map(str.strip, chosen.split(",")):
        if name.isdigit() and int(name) < len(there):
            found.append(there[int(name)])
        elif name.startswith(("GPU-", "MIG-")) and there:
            found.append(next((gpu for gpu in there if gpu.startswith(name)), name))
        else:
            break
    return tuple(dict.fromkeys(found))


def _taken(gpu: str) -> RunError:
    try:
        holder = read_json(_gpu_lock_path(gpu).with_suffix(".json"))
        by = f"the run {holder['run']!r} (process {holder['pid']})"
    except (RunError, KeyError, TypeError):
        by = "another run"
    return RunError(
        f"{by} trains on {gpu} already",
        next_step="Wait for it or stop it, or choose another GPU with CUDA_VISIBLE_DEVICES.",
    )


def _run_lock_path(run: Run) -> Path:
    return run.folder / ".lock"


def _gpu_lock_path(gpu: str) -> Path:
    return cache_root() / "locks" / f"{gpu.replace(os.sep, '-')}.lock"


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Yields whether the lock could be had; it is held for the block then."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, mode=0o666)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
