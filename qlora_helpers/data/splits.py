"""Makes three splits that share no prompt: the source's own splits, and those that are missing cut from them.

Owns the names that splits have elsewhere, their sizes and the seeded choice of rows: the same rows, settings and seed
give the same splits. Knows nothing of where rows come from and what is in them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from qlora_helpers.base.config import DataConfig
from qlora_helpers.data.duplicates import RowKey
from qlora_helpers.data.rows import SPLITS, Part, SkippedRows, listed

SPLIT_NAMES = {
    "train": "train",
    "val": "eval",
    "valid": "eval",
    "validation": "eval",
    "dev": "eval",
    "eval": "eval",
    "test": "test",
}
DEFAULT_SHARE = 0.1  # of the rows for test, and as much for eval, where the settings give no number


def named_splits(name: str, parts: Mapping[str, list[Part]]) -> tuple[dict[str, list[Part]], list[str]]:
    """Maps a source's own split names (train, val, validation, dev, test, ...) to ours.

    Args:
        name: the source's name, for notes.
        parts: the parts by the source's names.

    Returns:
        The parts by our names, and notes. Those with unknown names are skipped with a note; where no name is known, all
        rows are taken together as train.
    """
    known = {part: SPLIT_NAMES[part.lower()] for part in parts if part.lower() in SPLIT_NAMES}
    unknown = [part for part in parts if part not in known]
    if not known:
        together = [part for several in parts.values() for part in several]
        return {"train": together}, [
            f"{name}: no split is called train, val or test, so {listed(unknown)} are cut anew"
        ]
    splits: dict[str, list[Part]] = {}
    for part, split in known.items():
        splits.setdefault(split, []).extend(parts[part])
    return splits, [f"{name}: skipped {part!r}, which is not train, val or test" for part in unknown]


def cut_missing(
    name: str, splits: dict[str, list[RowKey]], config: DataConfig, notes: list[str]
) -> dict[str, list[RowKey]]:
    """Cuts the splits that are missing or empty from train, or where there is no train, from eval, else from test.

    Test is cut first, then eval; the rest is train, at least half of the rows where there are four or more.

    Args:
        name: the source's name, for notes.
        splits: the rows by split; at least one split has some.
        config: rows per split, and the seed.
        notes: gets a line on what was cut, and one where fewer rows could be cut than the settings ask for.
    """
    present = [split for split in SPLITS if splits.get(split)]
    missing = [split for split in SPLITS if split not in present]
    if not missing:
        return splits
    donor = present[0]
    rows = splits[donor]
    sizes = _sizes(name, len(rows), [split for split in ("test", "eval") if split in (*missing, donor)], config, notes)
    order = list(range(len(rows)))
    random.Random(f"{config.seed}/cut").shuffle(order)
    cut: dict[str, list[RowKey]] = {}
    for split, size in (*sizes.items(), ("train", len(rows))):
        cut[split], order = [rows[i] for i in sorted(order[:size])], order[size:]
    counts = ", ".join(f"{len(cut[split])} {split}" for split in SPLITS if split in cut)
    notes.append(
        f"{name}: no {' or '.join(missing)} split, so its {donor} rows were cut with seed {config.seed}: {counts}"
    )
    return splits | cut


def _sizes(name: str, count: int, wanted: list[str], config: DataConfig, notes: list[str]) -> dict[str, int]:
    asked = {"test": config.test_rows, "eval": config.eval_rows}
    share = max(1, round(DEFAULT_SHARE * count))
    sizes = {split: asked[split] or share for split in wanted}
    total, half = sum(sizes.values()), count // 2
    if total <= half:
        return sizes
    scaled = {split: max(1, size * half // total) for split, size in sizes.items()}
    notes.append(
        f"{name}: {total} rows asked for {' and '.join(sizes)} are more than half of {count}; "
        f"scaled down to {' and '.join(map(str, scaled.values()))}"
    )
    return scaled


def kept_apart(splits: dict[str, list[RowKey]], skipped: SkippedRows) -> dict[str, list[RowKey]]:
    """Skips training rows whose prompt is in test or eval too, and eval rows whose prompt is in test too, ignoring white space."""
    seen: dict[bytes, tuple[str, str]] = {}
    apart: dict[str, list[RowKey]] = {}
    for split in ("test", "eval", "train"):
        apart[split] = []
        for row in splits[split]:
            other, where = seen.setdefault(row.prompt, (split, row.where))
            if other == split:
                apart[split].append(row)
            else:
                skipped.add(row.where, f"its prompt is in {other} too", f" ({where})")
    return apart


def sampled(rows: list[RowKey], limit: int | None, seed: str) -> list[RowKey]:
    """Draws at most `limit` rows, in their order; a smaller sample is part of every larger one with the same seed."""
    if limit is None or len(rows) <= limit:
        return rows
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[i] for i in sorted(order[:limit])]
