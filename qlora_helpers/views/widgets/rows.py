"""A browser for prepared rows: the turns of each, its tokens coloured by what happens to them, and the rows that are left out.

It shows what the trainer will see; a person can search and jump. `tokens` decides kinds and texts of the tokens, `row_turns` finds
the turns; everything from a row is escaped.
"""

from __future__ import annotations

import html
from collections import Counter
from typing import TYPE_CHECKING, Any

import ipywidgets

from qlora_helpers.base.errors import DataError
from qlora_helpers.data.outcome import left_out
from qlora_helpers.views.token_html import framed, key, spans
from qlora_helpers.views.tokens import TokenView, token_kind, token_texts
from qlora_helpers.views.widgets.panel import Panel, add_classes, button, error_html, styled, success_html
from qlora_helpers.views.widgets.row_turns import RowTurns, left_out_html, left_out_table, left_out_title

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.data.rows import Corpus

LEFT_OUT = "left out"


def row_browser(
    data: PreparedData, tokenizer: PreTrainedTokenizerBase, *, split: str = "train", corpus: Corpus | None = None
) -> RowBrowser:
    """Makes a browser for prepared rows.

    Args:
        data: the result of `workflow.prepare_data`.
        tokenizer: the model's tokenizer.
        split: the split to begin with, `train` or `eval`.
        corpus: the rows as they were read, whose turns are shown; None reads the source again, a large one when asked.

    Raises:
        DataError: there is no such split, or it is empty.
    """
    return RowBrowser(data, tokenizer, split=split, corpus=corpus)


class RowBrowser(Panel):
    """Shows one row at a time, or the packed sequence that it is part of; the arguments are those of `row_browser`.

    Attributes:
        split: the split that is shown.
        index: the row that is shown, from 0.
        matches: the rows that contain the text searched for; empty without a search.
    """

    def __init__(
        self,
        data: PreparedData,
        tokenizer: PreTrainedTokenizerBase,
        *,
        split: str = "train",
        corpus: Corpus | None = None,
    ) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._sources = RowTurns(data, tokenizer, corpus)
        self._left_out = left_out(data.notes)
        self.split, self.index, self._query = split, 0, ""
        self.matches: tuple[int, ...] = ()
        self._texts: dict[str, list[str]] = {}
        self._rows = self._row_places(split)
        self._quiet = False
        self.box = self._layout()
        self._draw()

    def _row_places(self, split: str) -> list[tuple[int, int, str]]:
        """Returns the packed sequence, the number in it (from 1) and the id of each row."""
        if split not in ("train", "eval"):
            raise DataError("there is no such split", expected="train or eval", got=repr(split))
        sequences = getattr(self._data, split)["row_ids"]
        rows = [
            (sequence, number, row) for sequence, ids in enumerate(sequences) for number, row in enumerate(ids, start=1)
        ]
        if not rows:
            raise DataError(f"the split {split} has no rows")
        return rows

    # what a person does

    def show(self, index: int) -> None:
        """Goes to a row, counted from 0; after the last row comes the first."""
        self.index = index % len(self._rows)
        self._draw()

    def next(self, step: int = 1) -> None:
        """Goes to the next row, or with -1 to the one before; during a search it skips rows without the text."""
        if not self.matches:
            return self.show(self.index + step)
        later = [row for row in self.matches if (row - self.index) * step > 0]
        wrapped = self.matches[0 if step > 0 else -1]
        return self.show((later[0] if step > 0 else later[-1]) if later else wrapped)

    def search(self, text: str) -> int:
        """Goes to the next row that contains a text, ignoring case; an empty text ends the search.

        Returns:
            The number of rows that contain it.
        """
        self._query = text.strip()
        wanted = self._query.casefold()
        self.matches = tuple(
            number for number, row in enumerate(self._row_texts()) if wanted and wanted in row.casefold()
        )
        if self.matches and self.index not in self.matches:
            self.next()
        else:
            self._draw()
        return len(self.matches)

    # what it looks like

    def _layout(self) -> ipywidgets.VBox:
        narrow = {"width": "auto"}
        self._split = ipywidgets.ToggleButtons(
            options=("train", "eval", LEFT_OUT), value=self.split, layout=narrow, tooltip="Which rows are shown"
        )
        self._split.style.button_width = "auto"
        previous = button(
            "Previous", "The row before; during a search, the one before with the text", lambda: self.next(-1)
        )
        following = button("Next", "The next row; during a search, the next one with the text", self.next)
        self._number = ipywidgets.Text(
            "1",
            description="row",
            layout={"width": "120px"},
            style={"description_width": "30px"},
            continuous_update=False,
        )
        self._search = ipywidgets.Text(
            placeholder="text in a row, then Enter",
            description="search",
            continuous_update=False,
            layout={"width": "290px", "max_width": "100%"},
            style={"description_width": "48px"},
        )
        self._whole = ipywidgets.Checkbox(False, description="whole sequence", indent=False, layout={"width": "140px"})
        self._head, self._found, self._tokens, self._turns = (ipywidgets.HTML() for _ in range(4))
        self._read = button("Show the turns", "Reads the source again, whole", self.read_turns)
        for each, name in (
            (previous, "qlora-previous"),
            (following, "qlora-next"),
            (self._number, "qlora-row-number"),
            (self._search, "qlora-search"),
            (self._whole, "qlora-whole-sequence"),
            (self._tokens, "qlora-row-tokens"),
            (self._turns, "qlora-row-turns"),
            (self._read, "qlora-read-turns"),
        ):
            add_classes(each, name)
        self._number.observe(self._on_number, names="value")
        self._search.observe(lambda change: self.search(change["new"]), names="value")
        self._whole.observe(lambda _: self._draw(), names="value")
        self._split.observe(self._on_split, names="value")
        wrapped = {"flex_flow": "row wrap", "align_items": "center", "overflow": "visible", "max_width": "100%"}
        self._moves = ipywidgets.HBox([previous, self._number, following, self._search, self._whole], layout=wrapped)
        line = ipywidgets.HBox([self._split, self._moves], layout=wrapped)
        panel = ipywidgets.VBox([line, self._found, self._head, self._turns, self._read, self._tokens])
        return styled([add_classes(panel, "qlora-card")], "qlora-rows")

    def _on_number(self, change: dict[str, Any]) -> None:
        if self._quiet:
            return
        typed = str(change["new"]).strip()
        if typed.isdecimal() and len(typed) < 12 and 1 <= int(typed) <= len(self._rows):
            self.show(int(typed) - 1)
        else:
            self._found.value = error_html(
                f"The rows are numbered 1 to {len(self._rows)}; row {self.index + 1} is still shown."
            )

    def _on_split(self, change: dict[str, Any]) -> None:
        is_left_out = change["new"] == LEFT_OUT
        self._moves.layout.display = "none" if is_left_out else ""
        if is_left_out:
            self._found.value = self._turns.value = ""
            self._read.layout.display = "none"
            self._head.value = f"<b>{html.escape(left_out_title(self._left_out))}</b>"
            self._tokens.value = left_out_html(self._left_out)
            return
        try:
            self._rows = self._row_places(change["new"])
        except DataError as error:
            self._found.value = error_html(str(error))
            return
        self.split, self.index = change["new"], 0
        self.search(self._query)

    def _draw(self) -> None:
        self.still_changed()
        self._quiet = True
        self._number.value = str(self.index + 1)
        self._quiet = False
        count = len(self.matches)
        self._found.value = ""
        if self._query and not count:
            self._found.value = error_html(f"No row of {self.split} contains “{self._query}”.")
        elif self._query:
            place = f"{self.matches.index(self.index) + 1} of " if self.index in self.matches else ""
            self._found.value = success_html(
                f"{place}{count} row{'s' * (count != 1)} with “{self._query}”; Next goes to the next one"
            )
        self._head.value = f"<b>{html.escape(self._title())}</b>"
        self._draw_turns()
        self._tokens.value = self._tokens_html(whole=self._whole.value)

    def read_turns(self) -> None:
        """Reads the source again and shows the turns of its rows; a small source is read without being asked."""
        self._sources.read()
        self._draw_turns()

    def _draw_turns(self) -> None:
        sequence, number, row = self._rows[self.index]
        ids, _ = _row_tokens(getattr(self._data, self.split)[sequence], number)
        self._turns.value = self._sources.html(row, ids)
        self._read.layout.display = "none" if self._sources.is_read else ""

    def _title(self) -> str:
        sequence, number, row = self._rows[self.index]
        count = sum(each[0] == sequence for each in self._rows)
        where = f"row {number} of {count} in sequence {sequence + 1} of {self._rows[-1][0] + 1}"
        report = self._data.report if self.split == "train" else self._data.eval_report
        trimmed = ", prompt cut to fit" if row in report.trimmed else ""
        return f"{self.split} row {self.index + 1} of {len(self._rows)}: {row} ({where}{trimmed})"

    def _tokens_html(self, *, whole: bool) -> str:
        sequence_index, here, _ = self._rows[self.index]
        sequence = getattr(self._data, self.split)[sequence_index]
        segments, parts = sequence["segment_ids"], []
        counts: Counter[str] = Counter()
        for number in sorted(set(segments) - {0}) if whole else [here]:
            ids, labels = _row_tokens(sequence, number)
            if whole:
                mark = " here" if number == here else ""
                name = html.escape(f"row {number}: {sequence['row_ids'][number - 1]}, {len(ids)} tokens")
                parts.append(f'<div class="qlora-bound{mark}">{name}</div>')
            kinds = [
                token_kind(token, label, number, self._tokenizer.eos_token_id)
                for token, label in zip(ids, labels, strict=True)
            ]
            counts.update(kinds)
            parts.append(spans(token_texts(ids, self._tokenizer), kinds, ids=ids, query=self._query))
        padding = self._data.seq_len_tokens - len(segments) + segments.count(0) if self._data.packed else 0
        if whole and padding > 0:
            counts["padding"] = padding
            parts.append(f'<div class="qlora-bound">padding</div><span class="k-padding">{padding} tokens</span>')
        return framed("".join(parts), "the row's tokens") + key(counts)

    def _row_texts(self) -> list[str]:
        """Returns the text of each row of the split, decoded once."""
        if self.split not in self._texts:
            sequences = getattr(self._data, self.split)
            rows = [
                _row_tokens(sequence, number)[0]
                for sequence in sequences
                for number in range(1, len(sequence["row_ids"]) + 1)
            ]
            self._texts[self.split] = self._tokenizer.batch_decode(rows)
        return self._texts[self.split]

    # where there are no widgets

    def _still(self) -> TokenView:
        sequence, number, _ = self._rows[self.index]
        ids, labels = _row_tokens(getattr(self._data, self.split)[sequence], number)
        return TokenView({"input_ids": ids, "labels": labels}, self._tokenizer)

    def still_text(self) -> str:
        """Returns the row with its trained tokens in brackets, and how many rows are left out."""
        rest = f"\n{left_out_title(self._left_out)}" if self._left_out.count else ""
        return f"{self._title()}\n{self._still()!r}{rest}"

    def still_html(self) -> str:
        """Returns the row in colours, and the rows that are left out."""
        rest = left_out_table(self._left_out)._repr_html_() if self._left_out.count else ""
        return f"<b>{html.escape(self._title())}</b>{self._still()._repr_html_()}{rest}"


def _row_tokens(sequence: dict[str, Any], number: int) -> tuple[list[int], list[int]]:
    """Returns tokens and labels of one row of a packed sequence, counted from 1."""
    where = [place for place, segment in enumerate(sequence["segment_ids"]) if segment == number]
    return [sequence["input_ids"][place] for place in where], [sequence["labels"][place] for place in where]
