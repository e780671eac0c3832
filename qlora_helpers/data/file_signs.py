"""Knows by a file's first bytes what its name does not say: an archive, a page of HTML, a file that was never downloaded."""

from __future__ import annotations

from typing import BinaryIO

from qlora_helpers.base.errors import DataError

# Published signatures: RFC 1952 (gzip), RFC 8878 (zstd), PKWARE's APPNOTE (zip), Apache Parquet and Arrow, 7-Zip's 7zFormat.txt,
# ISO 32000 (PDF), SQLite's file format. What such a file is called, or what else to do with it.
_CALLED = {
    b"\x1f\x8b": ("a gzip file", "Add .gz to its name."),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "Add .zst to its name."),
    b"PAR1": ("a Parquet file", "Call it .parquet."),
    b"ARROW1": ("an Arrow file", "Call it .arrow."),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "Call it .7z."),
    b"PK\x03\x04": (
        "a zip archive, as Excel files are",
        "Call it .xlsx if it is one; else unpack it, and name a file in it.",
    ),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an old Excel or Word file", "Save it as .xlsx."),
    b"%PDF": ("a PDF", "Save its text as .txt."),
    b"SQLite format 3": ("an SQLite database", "Export the table as CSV."),
}
_OWN = {".parquet": b"PAR1", ".arrow": b"ARROW1", ".feather": b"ARROW1", ".xlsx": b"PK\x03\x04"}
_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html")


def refuse_other_content(file: BinaryIO, name: str, suffix: str) -> None:
    """Refuses a file whose first bytes say that it holds something else than its name.

    Args:
        file: at its start, where it is left.
        name: the file's name, for messages.
        suffix: what the name says, such as `.csv`.

    Raises:
        DataError: it is a file of another kind, an error page, or Git LFS's pointer to a file.
    """
    start = file.read(64)
    file.seek(0)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(_GIT_LFS):
        raise DataError(
            f"{name} is Git LFS's pointer to a file, not the file",
            next_step="Fetch it: `git lfs pull` in its repository, or download it anew.",
        )
    if text.lower().startswith(_PAGES):
        raise DataError(
            f"{name} holds a page of HTML, as servers answer where a download fails",
            next_step="Open it in a browser to read what it says, and download the file anew.",
        )
    if suffix in (".txt", ".md") and text.startswith((b'{"', b'[{"')):
        raise DataError(
            f"{name} holds JSON",
            expected="prose",
            next_step="Call it .jsonl (an object on each line) or .json (a list of them).",
        )
    if suffix in _OWN and start.startswith(_OWN[suffix]):
        return
    binary = any(byte < 9 for byte in start)  # a CSV file may begin with a column that is called PAR1
    for sign, (kind, next_step) in _CALLED.items():
        if start.startswith(sign) and (binary or not sign.isalnum()):
            raise DataError(f"{name} is {kind}", expected=f"what its name says ({suffix})", next_step=next_step)
