"""Writes files and folders whole or not at all, so that a killed process or a full disk leaves the old content intact."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import RunError

RESTORE = "Delete it, or restore it from a copy."


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: under a temporary name, with fsync, and then renamed.

    Raises:
        RunError: the disk is full or the folder can't be written; the old file is intact.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, whole or not at all; a dataclass becomes an object."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    write_text(path, json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, *, next_step: str = RESTORE) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        next_step: what a person should do about a damaged file.

    Raises:
        RunError: the file is missing, can't be read, or is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path.name} is not in {path.parent}") from None
    except OSError as error:
        raise RunError(f"{path} can't be read ({error.strerror})", next_step="Check who owns the file.") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error})", next_step=next_step) from error


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Writes a folder whole or not at all: yields a temporary folder, which replaces `path` if the block raises nothing.

    Raises:
        RunError: the disk is full, or the folder may not be written there; what was there before is intact.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        os.chmod(temporary, 0o755)
    except OSError as error:
        raise not_written(path, error) from error
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    try:
        try:
            yield temporary
        except Exception as error:
            if (reason := _refused_by_the_disk(error)) is not None:
                raise not_written(path, reason) from error
            raise
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


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
    """Returns `$QLORA_CACHE`, else `$HF_HOME/qlora_helpers`, else `~/.cache/qlora_helpers`, which need not exist yet."""
    if os.environ.get("QLORA_CACHE"):
        return Path(os.environ["QLORA_CACHE"]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "qlora_helpers"
    return Path.home() / ".cache" / "qlora_helpers"
