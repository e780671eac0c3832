"""How long the rows of prepared data are, counted over the sequences in a run's folder. Knows nothing of how they are shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qlora_helpers.data.prepared_tables import read_sequences


def stored_lengths(folder: Path) -> np.ndarray:
    """Returns the tokens of each row of prepared sequences, `(rows,)`, ascending.

    Args:
        folder: `data/train` or `data/eval` of a run.

    Raises:
        RunError: they are missing or damaged.
    """
    found = [np.zeros(0, dtype=np.int64)]
    for chunk in read_sequences(folder).data.column("segment_ids").chunks:
        segments = chunk.flatten().to_numpy(zero_copy_only=False)
        starts = np.concatenate([[0], np.cumsum(chunk.value_lengths().to_numpy(zero_copy_only=False))])
        changes = np.flatnonzero(segments[1:] != segments[:-1]) + 1
        bounds = np.union1d(starts, changes)
        first = bounds[:-1][bounds[:-1] < len(segments)]
        lengths = np.diff(bounds)[: len(first)]
        found.append(lengths[segments[first] > 0])  # 0 is padding
    return np.sort(np.concatenate(found))
