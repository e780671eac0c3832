"""Reads rows from a sheet of an Excel file (.xlsx), streamed by openpyxl, within limits on what it unpacks to."""

from __future__ import annotations

import datetime
import io
import re
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.base.text import brief, size_text
from qlora_helpers.data.compressed import opened
from qlora_helpers.data.headers import checked_header, without_a_row_as_header
from qlora_helpers.data.rows import Part, Row, listed
from qlora_helpers.data.texts import Unreadable

MAX_SHEET_ROWS = 1_048_576  # Excel's own limit
MAX_SHEET_CELLS = 50_000_000
MAX_UNZIPPED_BYTES = 1024**3
MAX_GROWTH, GROWTH_BYTES = 200, 16 * 1024**2  # times that a file may grow; counts beyond so many bytes
MAX_WHOLE_TAGS = 500_000  # of a part that is parsed as a whole, such as the styles; each takes a kilobyte
_DIVIDE = "Cut it into smaller files and name one of them."


def excel_part(path: Path, file: BinaryIO, name: str, config: DataConfig, notes: list[str]) -> Part:
    """Opens an Excel file (.xlsx); see `readers.read_file`. Formulas count with the values that Excel saved.

    Raises:
        DataError: it is damaged or encrypted, unpacks to more than the limits, or has no such sheet.
    """
    _check_zip(file, name)
    with _workbook(file, name) as book:
        sheets = [sheet.title for sheet in book.worksheets]
        chosen = config.sheet
        if chosen is None:
            seen_first = sorted(book.worksheets, key=lambda sheet: sheet.sheet_state != "visible")
            chosen = next((sheet.title for sheet in seen_first if any(_filled_rows(sheet, name))), None)
        unsaved = _unsaved_formulas(book, chosen) if chosen is not None and chosen in sheets else []
    if chosen not in sheets:
        raise DataError(
            f"{name} has no sheet {config.sheet!r}" if config.sheet else f"{name} holds no rows",
            got=f"the sheets {listed(sheets)}",
            next_step="Name one: data.sheet.",
        )
    if len(sheets) > 1 and config.sheet is None:
        notes.append(f"{name}: read the sheet {chosen!r} of {listed(sheets)}; data.sheet chooses another")

    if unsaved:
        notes.append(
            f"{name}: formulas without a saved value: {len(unsaved)}, the first in {unsaved[0]}; rows that need them are left out; "
            "open the file in Excel or LibreOffice and save it, which calculates them"
        )

    def rows(columns: Collection[str] | None) -> Iterator[Row]:
        with opened(path) as again, _workbook(again, name) as book:
            yield from without_a_row_as_header(
                _sheet_rows(book[chosen], name, frozenset(unsaved)), f"{name} row 1", config
            )

    return Part(name, rows)


def _sheet_rows(sheet: Any, name: str, unsaved: Collection[str]) -> Iterator[Row]:
    from openpyxl.utils import get_column_letter

    header: list[str] = []
    empty = True
    for number, cells in _filled_rows(sheet, name):
        if not header:
            header = ["" if cell is None else str(cell).strip() for cell in cells]
            while header and not header[-1]:
                header.pop()
            checked_header(header, f"{name} row {number}")
            continue
        empty = False
        if any(cell not in (None, "") for cell in cells[len(header) :]):
            raise DataError(
                f"{name} row {number} has cells beyond its columns",
                expected=f"{len(header)} ({listed(header)})",
                next_step="Give each column a name in the first row, and remove a title above the names.",
            )
        values = [_plain(cell) for cell in cells[: len(header)]]
        values += [None] * (len(header) - len(values))
        if unsaved:
            places = [f"{get_column_letter(column)}{number}" for column in range(1, len(header) + 1)]
            values = [_UNSAVED_VALUE if place in unsaved else cell for place, cell in zip(places, values, strict=True)]
        yield Row(f"{name} row {number}", dict(zip(header, values, strict=True)))
    if empty:
        raise DataError(
            f"{name} holds no rows", next_step="Its first row holds the columns' names, and each other one a row."
        )


def _filled_rows(sheet: Any, name: str) -> Iterator[tuple[int, tuple[Any, ...]]]:
    sheet.reset_dimensions()  # a sheet's own word on its size may be wrong, and would cut rows off
    cells = 0
    for number, row in enumerate(sheet.iter_rows(values_only=True), start=1):
        cells += len(row)
        if number > MAX_SHEET_ROWS or cells > MAX_SHEET_CELLS:
            raise DataError(
                f"{name} has too many cells",
                expected=f"{MAX_SHEET_ROWS:,} rows and {MAX_SHEET_CELLS:,} cells at most",
                next_step=_DIVIDE,
            )
        if any(cell not in (None, "") for cell in row):
            yield number, row


def _unsaved_formulas(book: Any, sheet: str) -> list[str]:
    """Returns the places of formulas without a value, as programs write them that don't calculate; openpyxl gives None for both."""
    found, rest = [], b""
    with book._archive.open(book[sheet]._worksheet_path) as part:
        while piece := part.read(1024**2):
            text = rest + piece
            end = 0
            for match in _UNSAVED.finditer(text):
                found.append(match["place"].decode("ascii", "replace"))
                end = match.end()
            rest = text[max(end, len(text) - _LONGEST_CELL) :]
    return found


def _plain(cell: Any) -> Any:
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 2**53:
        return int(cell)  # Excel knows no whole numbers
    if isinstance(cell, datetime.datetime) and cell.time() == datetime.time():
        return cell.date()  # nor days without a time
    if isinstance(cell, str) and cell.startswith("#") and cell in _ERRORS:
        return None
    return cell


_UNSAVED_VALUE = Unreadable("a formula without a saved value (save the file in Excel or LibreOffice)")
_LONGEST_CELL = 64 * 1024  # bytes of a formula, of 8,192 characters at most, and what is around it
_UNSAVED = re.compile(
    rb'<c\b(?![^>]*\bt="str")[^>]*?\br="(?P<place>[A-Z]{1,3}[0-9]{1,7})"[^>]*>\s*'
    rb"<f\b(?:[^>]*/>|[^>]*>[^<]*</f>)\s*(?:<v\s*/>|<v>\s*</v>|</c>)"
)
_ERRORS = ("#N/A", "#REF!", "#VALUE!", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!")


class _workbook:
    """Opens a workbook for reading; what openpyxl raises on damaged files becomes one error."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name

    def __enter__(self) -> Any:
        from openpyxl.reader.excel import ExcelReader

        try:
            # As `load_workbook` does, from an archive with limits.
            reader = ExcelReader(self._file, read_only=True, data_only=True, keep_links=False)
            reader.archive = _Archive(self._file)
            reader.archive.book_name = self._name
            reader.read()
            self._book = reader.wb
        except DataError:
            raise
        except Exception as error:  # whatever its parsers run into
            raise self._damaged(error) from error
        return self._book

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._book.close()
        if isinstance(error, Exception) and not isinstance(error, DataError):
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> DataError:
        return DataError(
            f"{self._name} is not a complete Excel file ({brief(error)})",
            next_step="Save it as .xlsx again, without a password, or as .csv.",
        )


class _Archive(zipfile.ZipFile):
    """An archive of which sheets and texts are streamed, and no part with many tags is read as a whole."""

    book_name = ""

    def open(self, *arguments: Any, **options: Any) -> Any:
        """Opens a part; reading it as a whole raises a `DataError` where it would take far more memory than a workbook does."""
        part = super().open(*arguments, **options)
        read = part.read

        def limited(size: int | None = -1) -> bytes:
            if size is not None and size >= 0:
                return read(size)
            pieces: list[bytes] = []
            tags = 0
            while piece := read(1024**2):
                tags += piece.count(b"<")
                if tags > MAX_WHOLE_TAGS:
                    raise DataError(
                        f"{self.book_name} unpacks to more than can be held in memory",
                        expected=f"{MAX_WHOLE_TAGS:,} entries in {part.name[:60]} at most",
                        next_step="Copy its rows into a new workbook, or save them as .csv.",
                    )
                pieces.append(piece)
            return b"".join(pieces)

        part.read = limited  # type: ignore[method-assign]
        return part


def _check_zip(file: BinaryIO, name: str) -> None:
    """Refuses an Excel file whose parts unpack to too much; Python's zipfile reads no more of a part than it declares."""
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(part.file_size for part in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"{name} is not a complete Excel file ({brief(error)})",
            next_step="Save it as .xlsx again, without a password, or as .csv.",
        ) from error
    packed = file.seek(0, io.SEEK_END)
    file.seek(0)
    most = min(MAX_UNZIPPED_BYTES, max(GROWTH_BYTES, MAX_GROWTH * packed))
    if size > most:
        raise DataError(
            f"{name} unpacks to more than can be held in memory",
            expected=f"{size_text(most)} at most",
            got=size_text(size),
            next_step=_DIVIDE,
        )
