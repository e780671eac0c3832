"""Finds the files that a source names on this machine: one, those of a folder, or those that fit a pattern."""

from __future__ import annotations

import contextlib
import glob
import re
from pathlib import Path

from qlora_helpers.base.errors import DataError
from qlora_helpers.base.text import brief, size_text
from qlora_helpers.data import compressed
from qlora_helpers.data.hub_data import HUB_ID
from qlora_helpers.data.readers import FILE_SUFFIXES, TEXT_SUFFIXES, is_data_file
from qlora_helpers.data.rows import listed
from qlora_helpers.data.splits import SPLIT_NAMES

SUFFIXES = (*FILE_SUFFIXES, ".7z")
MAX_FILES = 10_000
_NO_DATA_SUFFIXES = (".zip", ".xls", ".ods", ".py", ".pdf", ".docx", *compressed.COMPRESSED)
_SPLIT = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?![a-z])", re.IGNORECASE)


def local_files(source: str) -> list[Path] | None:
    """Returns the files that a source names, in the order of their names; None where it names a hub data set.

    Raises:
        DataError: there is no such file, it is of a kind that can't be read, or there are too many or too large files.
    """
    try:
        path = Path(source).expanduser()
        exists = path.exists()
        matches = [] if exists or not glob.has_magic(source) else _matches(path)
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, or the home of an unknown user
        raise DataError(
            f"{source[:100]!r} is not a usable path ({brief(error)})", next_step="Name a data file."
        ) from error
    if exists and path.is_dir():
        matches = _in_folder(path)
    elif exists and (is_data_file(path.name) or path.suffix.lower() == ".7z"):
        return [path]
    elif exists:
        raise DataError(
            f"{path.name} is of an unknown kind",
            expected=" or ".join(SUFFIXES),
            next_step="Convert the file to one of these.",
        )
    elif not glob.has_magic(source):
        known = is_data_file(path.name) or path.suffix.lower() in (".7z", *_NO_DATA_SUFFIXES)
        if known or source[0] in "./~" or not HUB_ID.fullmatch(source):
            raise _no_such_file(source, path)
        return None
    return _checked(matches, source)


def split_of(path: Path) -> str:
    """Returns the split that a file's name begins with, such as `train` of `train-00000-of-00002.parquet`; empty without one."""
    found = _SPLIT.match(path.name)
    return found[1].lower() if found else ""


def _in_folder(path: Path) -> list[Path]:
    found = [item for item in sorted(path.iterdir()) if item.is_file() and is_data_file(item.name)]
    found = [item for item in found if not item.name.startswith(".")]
    rows = [item for item in found if compressed.data_suffix(item) not in TEXT_SUFFIXES]
    found = rows or found  # a README beside data files is none
    if not found:
        raise DataError(
            f"{path.name or path} is a folder without a data file",
            expected=" or ".join(FILE_SUFFIXES),
            next_step="Name the data file itself, or a folder that holds some.",
        )
    return found


def _matches(path: Path) -> list[Path]:
    found = []
    for name in glob.iglob(str(path), recursive=True):
        if is_data_file(name) and Path(name).is_file():
            found.append(Path(name))
        if len(found) > MAX_FILES:
            break
    return sorted(found)


def _checked(files: list[Path], source: str) -> list[Path]:
    if not files:
        raise DataError(
            f"no data file fits {source[:100]!r}", expected=" or ".join(FILE_SUFFIXES), next_step="Check the pattern."
        )
    size = sum(file.stat().st_size for file in files)
    if len(files) > MAX_FILES or size > compressed.MAX_FILE_BYTES:
        raise DataError(
            f"{source[:100]!r} names too much",
            expected=f"{MAX_FILES:,} files and {size_text(compressed.MAX_FILE_BYTES)} at most",
            got=f"{len(files):,} files, {size_text(size)}",
            next_step="Name fewer of them.",
        )
    return files


def _no_such_file(name: str, path: Path) -> DataError:
    folder = path.parent
    if not folder.is_dir():
        return DataError(
            f"no such file: {name}", next_step=f"There is no folder {str(folder)!r} either: check the path."
        )
    with contextlib.suppress(OSError):  # a folder that we may not list
        there = sorted(item.name for item in folder.iterdir() if is_data_file(item.name) or item.suffix == ".7z")
        found = listed(there) if there else f"no {', '.join(SUFFIXES)} file"
        return DataError(f"no such file: {name}", next_step=f"The folder {str(folder)!r} holds {found}.")
    return DataError(f"no such file: {name}", next_step="Check the path.")
