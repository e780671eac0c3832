"""Writes files and folders whole or not at all, so that a killed process or a full disk leaves the old content intact."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import hashlib
import itertools
import json
import os
import re
import secrets
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.folders import open_regular, opened_parent, remove, rename

RESTORE = "Delete it, or restore it from a copy."
MOST_JSON_BYTES = 512 * 1024**2  # far more than a run's largest file; a file with a hole takes no disk space


def write_text(path: Path, text: str, *, root: Path | None = None) -> None:
    """Writes a file whole or not at all: under a temporary name, with fsync, and then renamed.

    A new file gets the rights that the person's umask leaves; one that is replaced keeps its own.

    Args:
        path: the file.
        text: its new content.
        root: a folder that it lies below; no folder between them may be a link. Without it, the file's folder may be one.

    Raises:
        RunError: the disk is full or the folder can't be written; the old file is intact.
    """
    temporary = f".{path.name}.{secrets.token_hex(6)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with opened_parent(path, root or path.parent) as (parent, name):
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=parent)
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    _keep_mode(path, file.fileno())
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=parent)
                raise
    except OSError as error:
        raise not_written(path, error) from error


def _keep_mode(path: Path, handle: int) -> None:
    """Gives an open file or folder the rights of the one that it will replace, if there is one."""
    with contextlib.suppress(OSError):
        old = path.lstat()
        if not stat.S_ISLNK(old.st_mode):
            os.fchmod(handle, stat.S_IMODE(old.st_mode))


def write_json(path: Path, value: Any, *, root: Path | None = None) -> None:
    """Writes a value as indented JSON, whole or not at all; a dataclass becomes an object. `root` is as for `write_text`."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    write_text(path, json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n", root=root)


def read_json(path: Path, *, next_step: str = RESTORE) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        next_step: what a person should do about a damaged file.

    Raises:
        RunError: the file is missing, can't be read, or is not valid JSON.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MOST_JSON_BYTES + 1)
        if len(content) > MOST_JSON_BYTES:
            raise ValueError(f"it is larger than {MOST_JSON_BYTES // 1024**2} MiB")
        return json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path.name} is not in {path.parent}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"{path} can't be read ({reason})", next_step="Check what it is and who owns it.") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error})", next_step=next_step) from error


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Writes a folder whole or not at all: yields a temporary folder, which replaces `path` if the block raises nothing.

    What a person puts into `path` during the block is not lost: a new entry moves into the new folder, and where something else
    has changed, or the name is taken, the old folder is kept beside it as `NAME.kept-N`, with a warning.

    Raises:
        RunError: the disk is full, or the folder may not be written there; what was there before is intact.
    """
    root = path.parent
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        _keep_folder_mode(path, temporary)
    except OSError as error:
        raise not_written(path, error) from error
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    before = _listing(path)
    try:
        try:
            yield temporary
        except Exception as error:
            if (reason := _refused_by_the_disk(error)) is not None:
                raise not_written(path, reason) from error
            raise
        if path.exists():
            rename(path, old, root=root)
        try:
            rename(temporary, path, root=root)
        except OSError:
            if old.exists() and not path.exists():
                rename(old, path, root=root)
            raise
        if os.path.lexists(old):
            _rescue_changes(old, path, before)
    finally:
        for left in (temporary, old):
            with contextlib.suppress(OSError):
                remove(left, root=root)


def _keep_folder_mode(path: Path, new: Path) -> None:
    handle = os.open(new, os.O_RDONLY)
    try:
        _keep_mode(path, handle)
    finally:
        os.close(handle)


def _listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Returns what tells the entries of a folder, at any depth, from changed ones: inode, size and time of the last change."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(parent, name)
            seen = os.lstat(path)
            is_folder = stat.S_ISDIR(seen.st_mode)
            mark = (seen.st_ino, 0, 0) if is_folder else (seen.st_ino, seen.st_size, seen.st_mtime_ns)
            found[os.path.relpath(path, folder)] = mark
    return found


def _rescue_changes(old: Path, path: Path, before: dict[str, tuple[int, int, int]]) -> None:
    """Moves what is new at the top of `old` into `path`, and keeps `old` beside it where anything else was changed."""
    for name in sorted(os.listdir(old)):
        if name not in before and not os.path.lexists(path / name):
            rename(old / name, path / name, root=old.parent)
    if all(before.get(name) == mark for name, mark in _listing(old).items()):
        return
    kept = next(
        place for number in itertools.count(1) if not (place := path.with_name(f"{path.name}.kept-{number}")).exists()
    )
    rename(old, kept, root=old.parent)
    warnings.warn(
        f"{path.name}/ was changed while it was written anew; its old content is in {kept.name}/", stacklevel=4
    )


def make_once(folder: Path, proof: str, make: Callable[[], None]) -> None:
    """Calls `make` unless the folder holds the file `proof`; processes that start together wait for the first."""
    from filelock import FileLock

    if (folder / proof).exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not (folder / proof).exists():
            make()


def content_digest(source: str) -> str | None:
    """Returns a digest (SHA-256) of a file's content, wherever it lies and whatever its name is.

    Args:
        source: a file; or a folder or pattern, of which the names and contents of all files count, without hidden ones.

    Returns:
        The digest; None where there is no such file, or it can't be read.
    """
    try:
        path = Path(source).expanduser()
        if path.is_file():
            return _file_digest(path)
        if path.is_dir():
            files = [each for each in path.iterdir() if each.is_file()]
        else:
            files = [Path(each) for each in glob.glob(str(path), recursive=True)] if glob.has_magic(source) else []
            files = [each for each in files if each.is_file()]
        files = sorted(each for each in files if not each.name.startswith("."))
        digests = "".join(f"{each.name} {_file_digest(each)}\n" for each in files)
    except (OSError, ValueError, RuntimeError):
        return None
    return hashlib.sha256(digests.encode("utf-8", "surrogateescape")).hexdigest() if files else None


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def not_written(path: Path, error: OSError) -> RunError:
    """Returns the error for a file that could not be written: which one, why, and what to do."""
    next_step = NEXT_STEPS.get(error.errno or 0, "Free some space and try again.")
    return RunError(f"{path.name[:100]} could not be written ({error.strerror or error})", next_step=next_step)


NEXT_STEPS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space and try again."),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "Check who may write there, or give a folder that you may write."
    ),
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.ENOTDIR: "Give a folder: a part of the path is a file.",
}
"""What a person can do about what the operating system refuses, by its number; other numbers are faults."""


def _refused_by_the_disk(error: BaseException) -> OSError | None:
    """The system's refusal behind an error, where a person can do something about it; Rust's libraries have it in their text."""
    if isinstance(error, OSError):
        return error if error.errno in NEXT_STEPS else None
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = int(found[1]) if found else 0
    return OSError(number, os.strerror(number)) if number in NEXT_STEPS else None


def cache_root() -> Path:
    """Returns `$QLORA_CACHE`, else `$HF_HOME/qlora_helpers`, else `~/.cache/qlora_helpers`, which need not exist yet.

    A hub cache is often shared: a folder there that another user of the machine owns, or that everybody may write in, is passed
    over, since whoever writes in it decides which weights are used. `$QLORA_CACHE` is a person's own choice and taken as it is.
    """
    if os.environ.get("QLORA_CACHE"):
        return Path(os.environ["QLORA_CACHE"]).expanduser()
    if os.environ.get("HF_HOME"):
        shared = Path(os.environ["HF_HOME"]).expanduser() / "qlora_helpers"
        if _is_private(shared):
            return shared
    return Path.home() / ".cache" / "qlora_helpers"


def _is_private(folder: Path) -> bool:
    """Whether a folder is one's own or root's and not everybody's, or does not exist yet."""
    try:
        found = folder.lstat()
    except OSError:
        return True
    is_ours = not hasattr(os, "geteuid") or found.st_uid in (os.geteuid(), 0)
    return is_ours and (stat.S_ISLNK(found.st_mode) or not found.st_mode & stat.S_IWOTH)
