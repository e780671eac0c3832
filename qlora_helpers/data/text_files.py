"""Reads plain text and Markdown as documents: pieces of whole paragraphs, so that a single file can be divided into splits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qlora_helpers.data.compressed import opened
from qlora_helpers.data.encodings import numbered_lines
from qlora_helpers.data.rows import Row

PIECES = 30  # as many a file is cut into, within the limits of a piece
SHORTEST, LONGEST = 1_000, 8_000  # characters of a piece; a paragraph is never cut


def text_rows(path: Path, name: str, encoding: str, size_bytes: int, notes: list[str]) -> Iterator[Row]:
    """Yields a text file's documents, each of the paragraphs (divided by blank lines) that fit into a piece.

    Args:
        path: the file.
        name: its name, for messages.
        encoding: of its text.
        size_bytes: of the text; decides how long a piece is.
        notes: gets a line on how the file is cut.
    """
    longest = max(SHORTEST, min(LONGEST, size_bytes // PIECES))
    note = f"{name}: cut into documents of whole paragraphs of up to {longest:,} characters"
    if note not in notes:
        notes.append(note)
    piece: list[str] = []
    start, length = 1, 0
    with opened(path) as file:
        for number, paragraph in _paragraphs(numbered_lines(file, name, encoding)):
            if piece and length + len(paragraph) > longest:
                yield Row(f"{name} line {start}", "\n\n".join(piece))
                piece, length = [], 0
            start = start if piece else number
            piece.append(paragraph)
            length += len(paragraph)
    if piece:
        yield Row(f"{name} line {start}", "\n\n".join(piece))


def _paragraphs(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Yields paragraphs with the numbers of their first lines."""
    found: list[str] = []
    start = 1
    for number, line in lines:
        if line.strip():
            start = start if found else number
            found.append(line.rstrip("\r\n"))
        elif found:
            yield start, "\n".join(found)
            found = []
    if found:
        yield start, "\n".join(found)
