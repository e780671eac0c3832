"""The turns of prepared rows, found in their source again and proved to be those rows, and the rows that are left out.

Prepared data hold tokens alone. A row's turns are shown only where writing them again gives the very tokens that were prepared:
otherwise the source has changed since, and a note says so instead.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.tables import AS_TEXT, Table
from qlora_helpers.base.text import plain
from qlora_helpers.data.examples import Example
from qlora_helpers.data.local_files import local_files
from qlora_helpers.data.outcome import LeftOut
from qlora_helpers.data.sources import read_corpus
from qlora_helpers.views.turns import turns_html

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.data.row_view import SeenRow
    from qlora_helpers.data.rows import Corpus

AT_ONCE_BYTES = 8 << 20
"""Sources up to this size are read again without being asked."""
_PART = re.compile(r" part \d+\Z")


class RowTurns:
    """The rows of prepared data as their source has them.

    Args:
        data: the prepared data.
        tokenizer: the model's.
        corpus: the rows as they were read; None reads them again.
    """

    def __init__(self, data: PreparedData, tokenizer: PreTrainedTokenizerBase, corpus: Corpus | None) -> None:
        self._data, self._config, self._tokenizer, self._corpus = data, data.config, tokenizer, corpus
        self._see: Callable[[Example], SeenRow] | None = None
        self._rows: dict[str, Example] | None = None
        self._trouble = "" if data.config is not None else "these data don't say how they were prepared"

    @property
    def is_read(self) -> bool:
        """Whether there is nothing to be read any more."""
        return self._rows is not None or bool(self._trouble)

    def read(self) -> None:
        """Reads the source again; what keeps it from being read is shown in place of the turns."""
        if self._config is None:
            return
        try:
            corpus = self._corpus or read_corpus(self._config)
            self._rows = {row.id: row for rows in (corpus.train, corpus.eval) for row in rows}
        except UserError as error:
            self._trouble = str(error).removesuffix(error.next_step).strip()

    def html(self, row_id: str, ids: Sequence[int]) -> str:
        """Returns a row's turns, or why they are not shown.

        Args:
            row_id: of the prepared row.
            ids: its tokens.
        """
        if not self.is_read and self._config is not None and self._is_small(self._config):
            self.read()
        if self._trouble:
            return _muted(f"The turns are not shown: {self._trouble}")
        if self._rows is None or self._config is None:
            return ""
        example = self._rows.get(row_id) or self._rows.get(_PART.sub("", row_id))
        if example is None:
            return _muted("The turns are not shown: the source no longer has this row.")
        try:
            self._see = self._see or self._data.seen_by(self._tokenizer)
        except UserError as error:
            return _muted(f"The turns are not shown: {error.problem}")
        seen = self._see(example)
        if not any(row.id == row_id and row.input_ids == list(ids) for row in seen.rows):
            return _muted("The turns are not shown: the source has changed since these rows were prepared.")
        notes = "".join(map(_muted, seen.notes))
        where = "" if example.where == row_id else _muted(example.where)
        return f"{where}{turns_html(example, seen.trained, seen.masked)}{notes}"

    def _is_small(self, config: DataConfig) -> bool:
        if self._corpus is not None or config.source.startswith("embedded"):
            return True
        try:
            files = None if "://" in config.source else local_files(config.source)
        except UserError as error:
            self._trouble = str(error).removesuffix(error.next_step).strip()
            return False
        return files is not None and sum(file.stat().st_size for file in files) <= AT_ONCE_BYTES


def _muted(text: str) -> str:
    return f'<div class="muted">{html.escape(plain(text))}</div>'


def left_out_title(rows: LeftOut) -> str:
    """Returns how many rows are left out, and why, in a sentence."""
    if not rows.count:
        return "No row is left out: every row of the source is used"
    kinds = "; ".join(f"{count:,} x {kind}" for kind, count in rows.kinds().items())
    return f"{rows.count:,} row{'s are' if rows.count != 1 else ' is'} left out: {kinds}"


def left_out_table(rows: LeftOut) -> Table:
    """Returns the rows that are left out with their places and reasons; of many, the first ones, and counts of the rest."""
    lines = [[plain(where), plain(why)] for where, why in rows.named]
    lines += [[f"{count:,} more rows", plain(kind)] for kind, count in rows.more.items()]
    return Table(["row", "why it is left out"], lines, caption=left_out_title(rows))


def left_out_html(rows: LeftOut) -> str:
    """Returns the same for a panel."""
    if not rows.count:
        return ""
    table = left_out_table(rows)
    body = "".join(
        f'<tr><th scope="row">{html.escape(where)}</th><td>{html.escape(why)}</td></tr>' for where, why in table.rows
    )
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)
    return (
        f'<div class="qlora-text" tabindex="0" role="region" aria-label="rows that are left out"><table {AS_TEXT[:-1]} '
        f'qlora-left-out"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
