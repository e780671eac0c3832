"""Recognises the encoding of a text file, and reads it line by line within the limits.

A byte order mark is believed, then UTF-8 where the whole file is valid; only a table (CSV) is guessed further, by
charset-normalizer, and the guess is said. A file that is UTF-8 but for a few bytes is damaged, and is refused with the place.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import re
from collections.abc import Iterator
from typing import BinaryIO

from qlora_helpers.base.errors import DataError
from qlora_helpers.base.text import size_text

MAX_LINE_BYTES = 10 * 1024**2
_AS_UTF8 = "Save the file as UTF-8 and try again, or name its encoding, such as data.encoding=cp1252."
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_GUESSED = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "koi8_r", "mac_roman"),
    *("cp932", "shift_jis", "euc_jp", "gb18030", "big5", "euc_kr", "cp949"),
)
_CHUNK = 1024**2
_SAMPLE_BYTES = 64 * 1024


def encoding_of(file: BinaryIO, name: str, asked: str | None, notes: list[str], *, guess: bool) -> str:
    """Returns the encoding of a file, which is at its beginning before and after.

    Args:
        file: the bytes, seekable.
        name: the file's name, for messages.
        asked: the encoding that the settings name, or None.
        notes: gets a line where the encoding is not UTF-8.
        guess: whether bytes that are not UTF-8 may be guessed.

    Raises:
        DataError: there is no such encoding; or, with `guess`, none fits.
    """
    if asked is not None:
        return _known(asked)
    start = file.read(4096)
    file.seek(0)
    mark = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), None)
    if mark == "utf-8-sig":
        return "utf-8"  # its mark is dropped where it is read
    found = mark or _without_mark(start)
    if found is None and (not guess or _decodes(file, "utf-8")):
        return "utf-8"
    if found is None:
        found = _guessed(file, name)
        if found == "utf-8":
            return found
    note = f"{name}: read as {found.upper() if found.startswith('utf') else found}"
    if found in _GUESSED:
        note += f", guessed from its bytes ({_words(file, found)}); data.encoding chooses otherwise"
    if note not in notes:
        notes.append(note)
    return found


def numbered_lines(file: BinaryIO, name: str, encoding: str) -> Iterator[tuple[int, str]]:
    """Yields numbered lines with their line ends. Only \\n ends a line: a text may hold U+2028 and the like.

    Raises:
        DataError: a line is too long, holds a NUL, or is not of this encoding; the message names it.
    """
    if encoding == "utf-8":
        yield from _utf8_lines(file, name)
        return
    text = io.TextIOWrapper(file, encoding=encoding, newline="\n")
    number = 0
    try:
        while line := text.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise _too_long(name, number)
            if "\0" in line:
                raise DataError(f"{name} line {number} holds a NUL character", expected="text", next_step=_AS_UTF8)
            yield number, line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeError as error:
        raise DataError(
            f"{name} line {number + 1} or soon after is not {encoding}",
            expected=f"text in {encoding}",
            next_step=_AS_UTF8,
        ) from error
    finally:
        text.detach()


def whole_text(file: BinaryIO, name: str, encoding: str) -> str:
    """Returns all of a file's text.

    Raises:
        DataError: it is not of this encoding, or holds a NUL.
    """
    data = file.read()
    if encoding == "utf-8":
        return decoded(data, name, line=1, offset=0)
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeError as error:
        raise DataError(f"{name} is not {encoding}", expected=f"text in {encoding}", next_step=_AS_UTF8) from error


def decoded(data: bytes, name: str, line: int, offset: int) -> str:
    """Decodes UTF-8 `data`, which starts at `line` and at byte `offset` of the file; a byte order mark is dropped.

    Raises:
        DataError: it holds a NUL byte, or is not UTF-8; the message names the line and the byte.
    """
    nul = data.find(b"\0")
    if nul >= 0:
        raise DataError(
            f"{name} line {line + data.count(bytes([10]), 0, nul)} holds a NUL byte (byte {offset + nul})",
            expected="text in UTF-8",
            next_step=_AS_UTF8,
        )
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        at = error.start + (3 if offset == 0 and data.startswith(b"\xef\xbb\xbf") else 0)
        raise DataError(
            f"{name} line {line + data.count(bytes([10]), 0, at)} is not UTF-8 (byte 0x{data[at]:02x} at {offset + at})",
            expected="text in UTF-8",
            next_step=_AS_UTF8,
        ) from error


def _utf8_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    number = offset = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise _too_long(name, number)
        yield number, decoded(line, name, number, offset)
        offset += len(line)


def _too_long(name: str, number: int) -> DataError:
    return DataError(
        f"{name} line {number} is too long",
        expected=f"{size_text(MAX_LINE_BYTES)} at most",
        next_step="Check that each row is on a line of its own.",
    )


def _known(asked: str) -> str:
    try:
        "".encode(asked)  # refuses codecs that give no text
        found = codecs.lookup(asked).name
    except (LookupError, ValueError):
        raise DataError(
            f"there is no encoding {asked[:60]!r}", expected="a name such as utf-8, utf-16, cp1252 or shift_jis"
        ) from None
    return "utf-8" if found == "utf-8-sig" else found


def _without_mark(start: bytes) -> str | None:
    """Recognises UTF-16 without a mark by its NULs: every second byte of most characters."""
    if len(start) < 4:
        return None
    even, odd = start[0::2].count(0) / len(start[0::2]), start[1::2].count(0) / len(start[1::2])
    if odd > 0.4 and even < 0.02:
        return "utf-16-le"
    return "utf-16-be" if even > 0.4 and odd < 0.02 else None


def _guessed(file: BinaryIO, name: str) -> str:
    """Returns the likeliest encoding; `utf-8` for a damaged file of it, which is refused where it is read."""
    from charset_normalizer import from_bytes

    sample = _beyond_ascii(file)
    shown = sample.decode("utf-8", "replace")
    if sum(char > "\x7f" and char != "\ufffd" for char in shown) >= shown.count("\ufffd"):
        return "utf-8"
    results = list(from_bytes(sample, cp_isolation=list(_GUESSED)))
    if not results:
        return "utf-8"
    clean = [each for each in results if each.chaos <= min(other.chaos for other in results) + 0.01]
    best = max(clean, key=lambda each: each.coherence)
    # Several fit as well where the bytes decide nothing; then the most common one is the likeliest.
    same = [each.encoding for each in clean if each.coherence >= best.coherence - 0.005]
    with contextlib.suppress(UnicodeError):
        if "cp1252" in same or sample.decode("cp1252") == str(best):
            return "cp1252" if _decodes(file, "cp1252") else "utf-8"
    return best.encoding if _decodes(file, best.encoding) else "utf-8"


def _beyond_ascii(file: BinaryIO) -> bytes:
    """Returns the first lines that hold more than ASCII, each shortened around such bytes."""
    found, size = [], 0
    for line in iter(lambda: file.readline(_CHUNK), b""):
        if not line.isascii():
            found.append(b" ".join(re.findall(rb"[^,;\t\"\n]{0,60}[\x80-\xff][^,;\t\"\n]{0,60}", line)))
            size += len(found[-1])
            if size > _SAMPLE_BYTES:
                break
    file.seek(0)
    return b"\n".join(found)[:_SAMPLE_BYTES]


def _decodes(file: BinaryIO, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        while chunk := file.read(_CHUNK):
            decoder.decode(chunk)
        decoder.decode(b"", final=True)
        return True
    except UnicodeError:
        return False
    finally:
        file.seek(0)


def _words(file: BinaryIO, encoding: str) -> str:
    text = _beyond_ascii(file).decode(encoding, "replace")
    words = dict.fromkeys(word for word in re.findall(r"\w+", text) if not word.isascii())
    return ", ".join(repr(word[:20]) for word in list(words)[:3]) or "no words"
