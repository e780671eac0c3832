"""What users of one machine show each other: who trains on which GPU, as small files in a folder that all of them write in.

A lock that another user could open, that user could also hold, and so keep a trainer waiting. So nobody's lock is opened here: each
trainer writes a file of its own, which only its owner and root can change or delete, and looks at the files of the others. The
operating system says whose a file is, and whether the process that it names is that user's and still runs. A file whose process has
ended counts as nothing, whoever forgot to delete it.

The folder is one that root owns and that has the sticky bit: nobody but root can exchange it, or delete or rename a file of another
user. What a user can still do is to say that a GPU is in use which is not. The message then names that user, and `QLORA_CLAIMS=off`
passes over what others say.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_helpers.base.text import plain

FOLDERS = (Path("/run/lock"), Path("/dev/shm"), Path("/tmp"))
"""Where they may lie; the first that root owns, that everybody writes in and that has the sticky bit is taken."""
PREFIX = "qlora-gpu."
OFF = "QLORA_CLAIMS"
"""The environment variable that, set to `off`, makes no claims and passes over those of others."""
FRESH_S = 90.0
"""How long a claim counts whose process can't be seen from here, as from another container; its owner touches it every 30 s."""
TOUCH_S = 30.0
MOST_BYTES, MOST_FILES = 4096, 1000
SAME_START_S = 2.0  # between two readings of when a process began
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claim:
    """That somebody trains on a GPU.

    Attributes:
        gpu: its unique id.
        run: the run's name, as its owner gives it.
        pid: the process that trains.
        began: when that process began, seconds since 1970.
        namespace: of its process, as `_namespace` gives it.
        user: whose file it is, by the operating system.
    """

    gpu: str
    run: str
    pid: int
    began: float
    namespace: str
    user: int

    def __str__(self) -> str:
        whose = "" if self.user == os.geteuid() else f" of the user {_name(self.user)}"
        return f"the run {plain(self.run)[:100]!r}{whose} (process {self.pid})"


def folder() -> Path | None:
    """Returns the folder that all users of this machine share; None where there is none, or claims are switched off."""
    if os.environ.get(OFF, "").lower() == "off" or not hasattr(os, "geteuid"):
        return None
    return next((each for each in FOLDERS if _is_common(each)), None)


def _is_common(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    everybody = stat.S_ISVTX | stat.S_IWOTH
    return stat.S_ISDIR(found.st_mode) and found.st_uid == 0 and found.st_mode & everybody == everybody


@contextlib.contextmanager
def claimed(run: str, gpus: tuple[str, ...]) -> Iterator[Claim | None]:
    """Claims GPUs during the block, unless another process has claimed one of them.

    Yields:
        The claim of another, which then stays alone; None where the GPUs are ours. Of two that claim at the same moment each may
        yield the other's, but never neither.
    """
    where = folder()
    if where is None or not gpus:
        yield None
        return
    _remove_left_over(where)
    written: list[Path] = []
    try:
        for gpu in gpus:
            with contextlib.suppress(OSError):  # a full or closed folder: we are then not seen, but see others
                written.append(_write(where, gpu, run))
        # Looked for after our own were written: of two, at least the later one sees the other.
        other = next((claim for gpu in gpus if (claim := claim_on(gpu, not_of=os.getpid()))), None)
        if other is not None:
            _delete(written)
        yield other
    finally:
        _delete(written)


def touch(where: Path | None = None) -> None:
    """Shows those who can't see this process that its claims still hold."""
    where = where or folder()
    if where is None:
        return
    for path, claim in _claims(where):
        if claim.user == os.geteuid() and claim.pid == os.getpid():
            with contextlib.suppress(OSError):
                os.utime(path, follow_symlinks=False)


def claim_on(gpu: str, *, not_of: int | None = None) -> Claim | None:
    """Returns the claim that holds on a GPU, if any.

    Args:
        gpu: its unique id.
        not_of: a process whose claims don't count.
    """
    where = folder()
    if where is None:
        return None
    for path, claim in _claims(where):
        if claim.gpu == gpu and not (claim.pid == not_of and claim.user == os.geteuid()) and _holds(path, claim):
            return claim
    return None


def _write(where: Path, gpu: str, run: str) -> Path:
    path = where / f"{PREFIX}{secrets.token_hex(8)}"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    with open(handle, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o644)  # whatever the umask: the others must read it
        began = _began(os.getpid()) or time.time()
        json.dump({"gpu": gpu, "run": run, "pid": os.getpid(), "began": began, "namespace": _namespace()}, file)
    return path


def _claims(where: Path) -> Iterator[tuple[Path, Claim]]:
    """Yields what can be read as a claim; whatever else lies there is passed over."""
    with contextlib.suppress(OSError), os.scandir(where) as entries:
        names = (entry.name for entry in entries if entry.name.startswith(PREFIX))
        for _, name in zip(range(MOST_FILES), names, strict=False):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                yield where / name, _read(where / name)


def _read(path: Path) -> Claim:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a regular file")
        values = json.loads(file.read(MOST_BYTES))
    gpu, run, pid, began = values["gpu"], values["run"], values["pid"], values["began"]
    if not (isinstance(gpu, str) and isinstance(run, str) and type(pid) is int and pid > 0):
        raise ValueError("not a claim")
    return Claim(gpu, run, pid, float(began), str(values.get("namespace", "")), found.st_uid)


def _holds(path: Path, claim: Claim) -> bool:
    """Whether a claim's process still runs and is its owner's; where it can't be seen, whether it was touched lately."""
    began = _began(claim.pid)
    if began is not None and claim.namespace == _namespace():
        return abs(began - claim.began) < SAME_START_S and _user_of(claim.pid) == claim.user
    if claim.namespace == _namespace() and (claim.user == os.geteuid() or _user_of(1) is not None):
        return False  # it would be seen
    try:
        age = time.time() - path.lstat().st_mtime
    except OSError:
        return False
    return -FRESH_S < age < FRESH_S


def _namespace() -> str:
    """Returns what tells the processes that can be seen from here from those of another container; empty where all can be."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _began(pid: int) -> float | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _user_of(pid: int) -> int | None:
    import psutil

    try:
        return int(psutil.Process(pid).uids().real)
    except psutil.Error:
        return None


def _remove_left_over(where: Path) -> None:
    """Deletes this user's claims whose processes have ended; those of others can't be deleted, and don't count."""
    for path, claim in list(_claims(where)):
        if claim.user == os.geteuid() and not _holds(path, claim):
            _delete([path])


def _delete(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
    paths.clear()


def _name(user: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(user).pw_name
    except (ImportError, KeyError):
        return str(user)
