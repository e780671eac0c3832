"""Builds the sequences that the trainer takes from labelled rows, in columns of the Arrow format, a part at a time.

Rows wait in a file while their lengths are packed, so that a data set never has to fit into memory as Python lists. Knows nothing
of templates, tokenizers or runs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_helpers.base.phases import bar, current
from qlora_helpers.data.labels import IGNORED, LabelledRow

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

TOKENS_IN_MEMORY = 4_000_000  # more wait in a file
_BATCH_TOKENS = 1_000_000  # of sequences that are written at once
MOVED = ("train.arrow", "eval.arrow")  # files of sequences that are moved where they are saved


class WaitingRows:
    """Labelled rows that wait to be packed: their lengths in memory, their tokens there or, where they are many, in a file."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.lengths: list[int] = []
        self.trained: list[tuple[tuple[int, int], ...]] = []
        self._starts: list[int] = []
        self._parts: list[np.ndarray] = []
        self._held = self._written = 0
        self._folder: tempfile.TemporaryDirectory | None = None
        self._tokens: np.ndarray | None = None

    def add(self, row: LabelledRow) -> None:
        """Takes a row."""
        self.ids.append(row.id)
        self.lengths.append(len(row))
        self.trained.append(row.trained)
        self._starts.append(self._written + self._held)
        self._parts.append(row.ids)
        self._held += len(row)
        if self._held >= TOKENS_IN_MEMORY:
            self._write()

    def _write(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="qlora-rows-")
        with open(Path(self._folder.name) / "tokens", "ab") as file:
            np.concatenate(self._parts).astype(np.int32).tofile(file)
        self._written += self._held
        self._parts, self._held = [], 0

    def close(self) -> None:
        """Ends the taking of rows: their tokens can be read now."""
        if self._folder is None:
            self._tokens = np.concatenate(self._parts) if self._parts else np.empty(0, np.int32)
        else:
            if self._parts:
                self._write()
            self._tokens = np.memmap(Path(self._folder.name) / "tokens", dtype=np.int32, mode="r")
        self._parts = []

    def tokens(self, number: int) -> np.ndarray:
        """Returns a row's tokens, `(tokens,)`."""
        assert self._tokens is not None
        start = self._starts[number]
        return self._tokens[start : start + self.lengths[number]]

    def release(self) -> None:
        """Deletes the file, if there is one."""
        self._tokens = None
        if self._folder is not None:
            self._folder.cleanup()


def sequence_dataset(rows: WaitingRows, groups: Sequence[Sequence[int]], file: Path | None) -> Dataset:
    """Builds sequences with `input_ids`, `labels`, `segment_ids` (`(tokens,)` each) and `row_ids`.

    Args:
        rows: the labelled rows, closed.
        groups: numbers of the rows in each sequence.
        file: where the sequences are written, to be read from there; None keeps them in memory.
    """
    import pyarrow as pa
    from datasets import Dataset

    batches = _batches(rows, groups)
    if file is None:
        return Dataset(pa.Table.from_batches(list(batches), schema=_schema()))
    from datasets.utils.logging import is_progress_bar_enabled

    hidden = not (is_progress_bar_enabled() or current().is_own)
    shown = bar("packing", total=len(groups), unit=" sequences", disable=hidden)
    with shown, pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, _schema()) as writer:
        for batch in batches:
            writer.write_batch(batch)
            shown.update(len(batch))
    return Dataset.from_file(str(file))


def save_sequences(sequences: Dataset, folder: Path) -> None:
    """Saves sequences as `Dataset.save_to_disk` does; those that are in a file of their own (`sequence_dataset`) are moved there.

    Args:
        sequences: made by `sequence_dataset`; where they were in a file, that is gone afterwards.
        folder: gets the files.
    """
    files = [Path(file["filename"]) for file in sequences.cache_files]
    if len(files) != 1 or files[0].name not in MOVED or not files[0].is_file() or not len(sequences):
        sequences.save_to_disk(folder)
        return
    from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        sequences.select(range(1)).save_to_disk(folder)  # for the files beside the data that describe them
    finally:
        if shown:
            enable_progress_bars()
    (saved,) = folder.glob("data-*.arrow")
    os.replace(files[0], saved)


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    numbers = pa.list_(pa.int32())
    return pa.schema(
        [("input_ids", numbers), ("labels", numbers), ("segment_ids", numbers), ("row_ids", pa.list_(pa.string()))]
    )


def _batches(rows: WaitingRows, groups: Sequence[Sequence[int]]) -> Iterator[pyarrow.RecordBatch]:
    waiting: list[Sequence[int]] = []
    tokens = 0
    for group in groups:
        waiting.append(group)
        tokens += sum(rows.lengths[number] for number in group)
        if tokens >= _BATCH_TOKENS:
            yield _batch(rows, waiting)
            waiting, tokens = [], 0
    if waiting:
        yield _batch(rows, waiting)


def _batch(rows: WaitingRows, groups: Sequence[Sequence[int]]) -> pyarrow.RecordBatch:
    import pyarrow as pa

    order = [number for group in groups for number in group]
    lengths = np.array([rows.lengths[number] for number in order], dtype=np.int64)
    ids = np.concatenate([rows.tokens(number) for number in order])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    labels = np.full(len(ids), IGNORED, dtype=np.int32)
    for start, number in zip(starts.tolist(), order, strict=False):
        for first, behind in rows.trained[number]:
            labels[start + first : start + behind] = ids[start + first : start + behind]
    places = np.concatenate([np.arange(1, len(group) + 1, dtype=np.int32) for group in groups])
    segments = np.repeat(places, lengths)
    counts = np.array([len(group) for group in groups])
    row_offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    offsets = pa.array(starts[row_offsets].astype(np.int32))
    columns = [
        *(pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (ids, labels, segments)),
        pa.ListArray.from_arrays(pa.array(row_offsets), pa.array([rows.ids[number] for number in order], pa.string())),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_schema())


def numpy_sequences(sequences: Dataset) -> Iterator[dict[str, Any]]:
    """Yields sequences with their columns of numbers as numpy arrays."""
    for table in sequences.with_format("arrow").iter(batch_size=256):
        columns = {}
        for name in ("input_ids", "labels", "segment_ids"):
            column = table.column(name).combine_chunks()
            offsets = column.offsets.to_numpy()
            columns[name] = np.split(column.values.to_numpy()[offsets[0] : offsets[-1]], offsets[1:-1] - offsets[0])
        names = table.column("row_ids").to_pylist()
        for number, row_ids in enumerate(names):
            yield {name: parts[number] for name, parts in columns.items()} | {"row_ids": row_ids}
