"""Opens data files, also compressed ones, within limits: a file of kilobytes may unpack without end."""

from __future__ import annotations

import contextlib
import gzip
import io
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from qlora_helpers.base.errors import DataError
from qlora_helpers.base.text import brief, size_text
from qlora_helpers.base.units import BYTES_IN_GIB

MAX_FILE_BYTES = 2 * BYTES_IN_GIB
COMPRESSED = (".gz", ".zst")
_CHUNK = 1024**2


def data_suffix(path: Path) -> str:
    """Returns the suffix that says what a file holds, such as `.jsonl` of `rows.jsonl.gz`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


def open_file(path: Path, most: int | None = None) -> BinaryIO:
    """Opens a plain file of 1 to `most` bytes (`MAX_FILE_BYTES` where it is None).

    Raises:
        DataError: it is empty, larger, not a plain file, or may not be read.
    """
    most = MAX_FILE_BYTES if most is None else most
    try:
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "not a plain file"
            raise DataError(f"{path.name} is {kind}", expected="a file", next_step="Name the data file itself.")
        file = path.open("rb")
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
    except OSError as error:
        raise DataError(f"{path.name} can't be read ({error.strerror})", next_step="Check its permissions.") from error
    if 0 < size <= most:
        return file
    file.close()
    if size == 0:
        raise DataError(f"{path.name} is empty (0 bytes)", next_step="Check that it was written or copied whole.")
    raise DataError(
        f"{path.name} is too large to be held in memory",
        expected=f"{size_text(most)} at most",
        got=size_text(size),
        next_step="Take a part of it, or unpack what you need, and name that file.",
    )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a data file; a compressed one is unpacked into a temporary file, which is deleted when the context ends.

    Raises:
        DataError: as for `open_file`; or it is damaged, or unpacks to more than `MAX_FILE_BYTES`.
    """
    with open_file(path) as file:
        if path.suffix.lower() not in COMPRESSED:
            yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            _unpack(file, unpacked, path)
            unpacked.seek(0)
            yield cast(BinaryIO, unpacked)


def _unpack(file: BinaryIO, unpacked: IO[bytes], path: Path) -> None:
    size = 0
    try:
        stream = _stream(file, path.suffix.lower())
        while chunk := stream.read(_CHUNK):
            size += len(chunk)
            if size > MAX_FILE_BYTES:
                raise DataError(
                    f"{path.name} unpacks to more than can be held in memory",
                    expected=f"{size_text(MAX_FILE_BYTES)} at most",
                    next_step="Unpack the part you need, and name that file.",
                )
            unpacked.write(chunk)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno == 28:
            raise DataError(
                f"{path.name} can't be unpacked: no space is left for temporary files",
                next_step="Free some, or set TMPDIR to a folder on a larger disk.",
            ) from error
        raise DataError(
            f"{path.name} is not a complete {path.suffix.lower()} file ({brief(error)})",
            next_step="Download or copy it again.",
        ) from error
    if not size:
        raise DataError(f"{path.name} is empty once unpacked", next_step="Check that it was written or copied whole.")


def _stream(file: BinaryIO, suffix: str) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
