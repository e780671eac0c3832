"""Locks that keep two trainers off one run, two trainers or servers off one GPU, and two threads off one model.

A run's lock is a file in its folder, a GPU's a file in this user's cache. The operating system releases both when their process
ends, however it ends. What other users of the machine train on is in `claims`.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import cache_root, write_json
from qlora_helpers.base.records import read_record
from qlora_helpers.machine import telemetry
from qlora_helpers.runs import claims
from qlora_helpers.runs.folder import Run

# Switching adapters or modes changes the model itself, so a panel's thread has to wait for its turn.
MODEL_IN_USE = threading.RLock()


@dataclass(frozen=True)
class Holder:
    """Who holds a GPU's lock: the run's name and its process."""

    run: str
    pid: int


@contextlib.contextmanager
def run_lock(run: Run) -> Iterator[None]:
    """Holds a run's lock during the block.

    Raises:
        RunError: another process holds it.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with _tried(_run_lock_path(run)) as acquired:
        if not acquired:
            raise RunError(
                f"another process is training {run.name!r}", next_step="Wait for it, or stop it; then try again."
            )
        yield


def is_locked(run: Run) -> bool:
    """Whether a process on this machine holds the run's lock."""
    return _is_locked(_run_lock_path(run))


@contextlib.contextmanager
def evaluation_lock(run: Run) -> Iterator[None]:
    """Holds the lock of a run's evaluation during the block; it keeps no trainer off.

    Raises:
        RunError: another process evaluates the run.
    """
    with _tried(_evaluation_lock_path(run)) as acquired:
        if not acquired:
            raise RunError(
                f"another process is evaluating {run.name!r}",
                next_step="Wait for it; ql.evaluation_panel(run) shows how far it is.",
            )
        yield


def is_being_evaluated(run: Run) -> bool:
    """Whether a process on this machine holds the lock of the run's evaluation."""
    return _is_locked(_evaluation_lock_path(run))


@contextlib.contextmanager
def gpu_locks(run: Run, gpus: Sequence[str]) -> Iterator[None]:
    """Holds the locks of some GPUs during the block.

    Args:
        run: the run that uses them; the message to whoever is refused names it.
        gpus: as `visible_gpus` names them.

    Raises:
        RunError: another trainer or server uses one of them, of this user or of another; no lock is held then.
    """
    with contextlib.ExitStack() as held:
        for gpu in sorted(gpus):
            path = _gpu_lock_path(gpu)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not held.enter_context(_tried(path)):
                raise _busy(gpu)
            write_json(path.with_suffix(".json"), Holder(run.name, os.getpid()))
        if (other := held.enter_context(claims.claimed(run.name, tuple(sorted(gpus))))) is not None:
            raise _claimed(other)
        yield


def refuse_busy_gpus(gpus: Sequence[str]) -> None:
    """Refuses GPUs of which another trainer or server uses one, and holds no lock.

    Raises:
        RunError: another trainer or server uses one of them, of this user or of another.
    """
    for gpu in gpus:
        if _is_locked(_gpu_lock_path(gpu)):
            raise _busy(gpu)
        if (claim := claims.claim_on(gpu)) is not None:
            raise _claimed(claim)


def unlocked_gpus(gpus: Sequence[str]) -> tuple[str, ...]:
    """Returns the GPUs that no trainer uses, of this user or of another."""
    return tuple(gpu for gpu in gpus if not _is_locked(_gpu_lock_path(gpu)) and claims.claim_on(gpu) is None)


def visible_gpus(nvml: Any = None) -> tuple[str, ...]:
    """Returns the unique ids of the GPUs that a process started from this one may use; empty where there are none.

    It reads `CUDA_VISIBLE_DEVICES` as CUDA does: numbers or ids; an entry that does not exist ends the list, and an entry that
    is repeated before that hides every GPU (the driver's cuInit then fails with CUDA_ERROR_INVALID_DEVICE).

    Args:
        nvml: is used in place of the module `pynvml`.
    """
    installed = telemetry.gpu_ids(nvml)
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return tuple(installed)
    found: dict[str, str] = {}
    for name in map(str.strip, chosen.split(",")):
        if name in found:
            return ()
        if name.isdigit() and int(name) < len(installed):
            found[name] = installed[int(name)]
        elif name.startswith(("GPU-", "MIG-")) and installed:
            found[name] = next((gpu for gpu in installed if gpu.startswith(name)), name)
        else:
            break
    return tuple(dict.fromkeys(found.values()))


def _busy(gpu: str) -> RunError:
    try:
        holder = read_record(_gpu_lock_path(gpu).with_suffix(".json"), Holder)
        user = f"the run {holder.run!r} (process {holder.pid})"
    except RunError:
        user = "another run"
    return RunError(
        f"{user} is already using {gpu}",
        next_step="Wait for it or stop it, or choose another GPU with CUDA_VISIBLE_DEVICES.",
    )


def _claimed(claim: claims.Claim) -> RunError:
    next_step = "Wait for it, or choose another GPU with CUDA_VISIBLE_DEVICES."
    if hasattr(os, "geteuid") and claim.user != os.geteuid():
        next_step += f" If that user does not train there after all, {claims.OFF}=off passes over what others say."
    return RunError(f"{claim} is already training on {claim.gpu}", next_step=next_step)


def _run_lock_path(run: Run) -> Path:
    return run.folder / ".lock"


def _evaluation_lock_path(run: Run) -> Path:
    return run.folder / ".evaluation.lock"


def _gpu_lock_path(gpu: str) -> Path:
    return cache_root() / "locks" / f"{gpu.replace(os.sep, '-')}.lock"


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with _tried(path) as acquired:
        return not acquired


def _lock_mode(folder: Path) -> int:
    """Returns who may hold a lock: who may write in its folder. Everybody who can open the file can keep a trainer waiting."""
    mode = folder.stat().st_mode
    return 0o600 | (0o060 if mode & stat.S_IWGRP else 0) | (0o006 if mode & stat.S_IWOTH else 0)


def _take_rights_back(path: Path, mode: int) -> None:
    """Corrects the rights of a lock of one's own that an earlier version left open to everybody."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if stat.S_IMODE(os.fstat(handle).st_mode) & ~mode:
                os.fchmod(handle, mode)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _tried(path: Path) -> Iterator[bool]:
    """Yields whether the lock could be acquired; if so, it is held during the block."""
    from filelock import FileLock, Timeout

    mode = _lock_mode(path.parent)
    _take_rights_back(path, mode)
    lock = FileLock(path, mode=mode)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    except PermissionError:
        raise RunError(
            f"{path.parent.name}/{path.name} belongs to another account",
            next_step="Have its owner let your group write in that folder, or copy the run to a place of your own.",
        ) from None
    try:
        yield True
    finally:
        lock.release()
