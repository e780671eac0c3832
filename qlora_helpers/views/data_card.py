"""The data card of a run: how many rows and tokens, how long rows are, what was cut or left out and why, scripts, and the verdict.

It reads nothing but the run's folder. Shown in a notebook, as text, and on the report page. Imports no torch.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.style import inline
from qlora_helpers.base.tables import AS_TEXT, Table, Tabular, html_table
from qlora_helpers.base.text import plain
from qlora_helpers.data.label_report import LabelReport
from qlora_helpers.data.outcome import left_out
from qlora_helpers.data.prepared_file import PreparedFile, read_prepared_file
from qlora_helpers.data.scripts import counted
from qlora_helpers.data.stored_lengths import stored_lengths
from qlora_helpers.runs.folder import Run

BARS = 24
BAR_PX = 90  # the highest bar


@dataclass(frozen=True, repr=False)
class DataCard(Tabular):
    """What a run's prepared data are.

    Attributes:
        source: name and licence of the data.
        rows: rows for training, for the evaluation loss, and held out.
        report: label report of the training rows.
        seq_len_tokens: length of a sequence.
        lengths: tokens of each training row, ascending.
        left_out: reason -> rows of the source that are not used.
        scripts: script -> rows, of the sample that `scripts_of` names.
        scripts_of: which rows the scripts were counted in.
    """

    source: str
    rows: tuple[int, int, int]
    report: LabelReport
    seq_len_tokens: int
    lengths: tuple[int, ...]
    left_out: dict[str, int]
    scripts: dict[str, int]
    scripts_of: str

    def facts(self) -> list[tuple[str, str]]:
        """Returns the card as pairs of a name and a value."""
        report, (train, evaluation, test) = self.report, self.rows
        share = report.trained_tokens / max(1, report.tokens)
        cut = f"{len(report.trimmed):,} rows" + (
            f", {report.trimmed_tokens:,} tokens in all" if report.trimmed_tokens else ""
        )
        left = "; ".join(f"{count:,} x {plain(kind)}" for kind, count in self.left_out.items()) or "none"
        total = max(1, sum(self.scripts.values()))
        scripts = ", ".join(f"{name} {count / total:.0%}" for name, count in self.scripts.items())
        return [
            ("rows", f"{train:,} for training, {evaluation:,} for the evaluation loss, {test:,} held out"),
            (
                "tokens",
                f"{report.tokens:,} in the training rows, {report.trained_tokens:,} of them trained ({share:.0%})",
            ),
            ("length of a row", self.length_text()),
            ("cut to fit", cut if report.trimmed else "none"),
            ("left out", left),
            ("scripts", f"{scripts} ({self.scripts_of})" if scripts else "not counted"),
        ]

    def length_text(self) -> str:
        """Returns how long rows are, in a sentence: what the histogram shows, for those who can't see it."""
        if not self.lengths:
            return "not known: the sequences are not in the run's folder"
        return (
            f"half of the rows have at most {_quantile(self.lengths, 0.5):,} tokens, 95 % at most "
            f"{_quantile(self.lengths, 0.95):,}, the longest {self.lengths[-1]:,}; a sequence holds {self.seq_len_tokens:,}"
        )

    def verdict(self) -> tuple[str, list[str]]:
        """Returns the label report's `PASS` or `FAIL`, and its reasons."""
        report = self.report
        if not report.passed:
            return "FAIL", list(report.problems)
        whole = "every row trains exactly its answers" if report.loss_on != "all" else "every token is trained"
        return "PASS", [whole, "every row learns where to stop"]

    def bars(self) -> list[tuple[int, int, int]]:
        """Returns the histogram: first and last length of each bar, and its rows; the bars reach to the sequence's length."""
        most = max(self.seq_len_tokens, *self.lengths[-1:], 1)
        width = max(1, -(-most // BARS))
        counts = [0] * -(-most // width)
        for length in self.lengths:
            counts[min(max(0, length - 1) // width, len(counts) - 1)] += 1
        return [(number * width + 1, min((number + 1) * width, most), count) for number, count in enumerate(counts)]

    def table(self) -> Table:
        """Returns the card as a table, with the histogram as text."""
        word, reasons = self.verdict()
        bars = self.bars()
        highest = max((count for *_, count in bars), default=0)
        notes = [f"label report: {word}: {'; '.join(reasons)}"]
        notes += [
            f"{first:>7,}-{last:<7,} {'#' * -(-30 * count // max(1, highest))} {count:,}"
            for first, last, count in bars
            if count
        ]
        return Table((), self.facts(), caption=f"The data: {self.source}", notes=notes)

    def histogram_html(self) -> str:
        """Returns the histogram as HTML without a picture or a script: its colours are readable in light and dark themes."""
        bars = self.bars()
        highest = max((count for *_, count in bars), default=0)
        if not highest:
            return ""
        drawn = "".join(
            f'<span title="{first:,} to {last:,} tokens: {count:,} rows" '
            f'style="{inline("bar")};height:{max(1 if count else 0, round(BAR_PX * count / highest))}px"></span>'
            for first, last, count in bars
        )
        whole = ", a whole sequence" if bars[-1][1] == self.seq_len_tokens else ""
        label = html.escape(f"Histogram: {self.length_text()}")
        return (
            f'<div role="img" aria-label="{label}"><div style="{inline("bars")}">{drawn}</div></div>'
            f'<div style="{inline("ends")}" aria-hidden="true"><span>1 token</span><span>{bars[-1][1]:,} tokens{whole}</span></div>'
        )

    def badge_html(self) -> str:
        """Returns the verdict as a badge with its reasons."""
        word, reasons = self.verdict()
        look = inline("badge", "ok" if word == "PASS" else "failure")
        return f'<p style="{inline("note")}"><span style="{look}">labels: {word}</span> {html.escape("; ".join(reasons))}.</p>'

    def _repr_html_(self) -> str:
        caption = f"The data: {self.source}"
        table = html_table((), [[name, value] for name, value in self.facts()], caption=caption)
        return f"<div {AS_TEXT}>{table}{self.badge_html()}{self.histogram_html()}</div>"


def _quantile(lengths: Sequence[int], share: float) -> int:
    return lengths[min(len(lengths) - 1, int(share * len(lengths)))]


def data_card(run: Run) -> DataCard:
    """Returns the data card of a run whose data are prepared.

    Raises:
        RunError: they are not, or a file is damaged.
    """
    prepared = read_prepared_file(run.data_dir)
    if prepared is None:
        raise RunError(
            f"the data of the run {run.name!r} are not prepared yet",
            next_step="Run notebook 03_prepare_data, or `ql.prepare_data(run, tokenizer)`.",
        )
    return card_of(run, prepared)


def card_of(run: Run, prepared: PreparedFile) -> DataCard:
    """Returns the data card of a run.

    Args:
        run: the run.
        prepared: its `prepared.json`.

    Raises:
        RunError: the sequences are damaged.
    """
    folder = run.data_dir / "train"  # a run may have been copied without its sequences
    lengths = tuple(stored_lengths(folder).tolist()) if folder.is_dir() else ()
    scripts, of = prepared.scripts, f"in {sum(prepared.scripts.values()):,} training rows"
    if not scripts:  # prepared by an earlier version
        scripts, of = counted(prepared.test), f"in the {len(prepared.test):,} held-out rows"
    return DataCard(
        prepared.source,
        (prepared.report.rows, prepared.eval_report.rows, len(prepared.test)),
        prepared.report,
        prepared.seq_len_tokens,
        lengths,
        left_out(prepared.notes).kinds(),
        scripts,
        of,
    )
