"""Reads examples from a data source: the embedded corpus, a local file, SAMSum's archive, or a hub data set.

Owns the choice of the reader by the source's name. Formats are in `readers`, archives in `archives`, cleaning in
`dialogues`, splits in `splits`. Knows nothing of tokens, labels and models, and imports no torch.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.base.text import brief, size_text
from qlora_helpers.data.archives import MAX_ARCHIVE_BYTES, downloaded, read_archive, url_name
from qlora_helpers.data.dialogues import (
    Corpus,
    Row,
    SkippedRows,
    Source,
    cleaned,
    listed,
    need_columns,
    need_rows,
)
from qlora_helpers.data.duplicates import without_repeats
from qlora_helpers.data.examples import Example
from qlora_helpers.data.known import DATA_LICENCES
from qlora_helpers.data.readers import (
    FILE_SUFFIXES,
    MAX_FILE_BYTES,
    header_only,
    needed_columns,
    open_file,
    read_file,
    read_json,
)
from qlora_helpers.data.splits import cut_missing, kept_apart, named_splits, sampled

__all__ = ["Corpus", "Example", "read_corpus"]

EMBEDDED = "embedded"
SAMSUM = "knkarthick/samsum"
SCRIPT_ONLY = ("samsum", "Samsung/samsum")  # datasets 5 runs no loading scripts; the same rows are at SAMSUM
SUFFIXES = (*FILE_SUFFIXES, ".7z")
_NO_DATA_SUFFIXES = (".txt", ".tsv", ".ndjson", ".gz", ".zip", ".xlsx", ".arrow", ".py")
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_WITHOUT = "To do without, set data.source to embedded or to a .json, .jsonl, .csv, .parquet or .7z file."


def read_corpus(config: DataConfig, progress: Callable[..., Any] | None = None) -> Corpus:
    """Reads `config.source` into clean examples in three splits.

    The source's own splits are kept, and missing ones are cut from them. A prompt that is in two splits stays in test,
    else in eval. The same source, settings and seed give the same corpus.

    Args:
        config: source, columns, rows per split, seed.
        progress: shows a download; called like `tqdm.tqdm(total=bytes, unit="B", ...)`; None shows nothing.

    Returns:
        The corpus; its `notes` name the rows that were skipped, and say how splits were made.

    Raises:
        DataError: the source can't be read or used; the message names the file and the line, and says what to do.
    """
    source = _source(config, progress)
    need_columns(source, config)
    notes, skipped = list(source.notes), SkippedRows()
    splits = cleaned(source, config, notes, skipped)
    splits = {split: without_repeats(rows, skipped) for split, rows in splits.items()}
    need_rows(source.name, splits, skipped)
    splits = kept_apart(cut_missing(source.name, splits, config, notes), skipped)
    need_rows(source.name, splits, skipped, each=True)
    limits = {"train": config.train_rows, "eval": config.eval_rows, "test": config.test_rows}
    chosen = {split: sampled(rows, limits[split], f"{config.seed}/{split}") for split, rows in splits.items()}
    return Corpus(source.name, source.licence, notes=(*notes, *skipped.notes()), **chosen)


def _source(config: DataConfig, progress: Callable[..., Any] | None) -> Source:
    name = config.source
    if name == EMBEDDED:
        return _embedded()
    if re.match(r"[a-z][a-z0-9+.-]*://", name, re.IGNORECASE):
        return _from_url(name, progress)
    path = _local_path(name)
    if path is None:
        return _from_hub(name, config)
    if path.suffix.lower() == ".7z":
        with open_file(path, MAX_ARCHIVE_BYTES) as file:
            return _from_archive(file, path.name)
    splits, notes = read_file(path, _columns(config))
    return Source(path.name, "not stated (a local file)", splits, notes)


def _embedded() -> Source:
    resource = importlib.resources.files("qlora_helpers.data") / "corpus" / "dialogues.jsonl"
    with importlib.resources.as_file(resource) as path:
        rows = read_file(path, ())[0]["train"]
    splits: dict[str, list[Row]] = {}
    for row in rows:
        splits.setdefault(row.values["split"], []).append(row)
    return Source(EMBEDDED, DATA_LICENCES[EMBEDDED], splits)


def _from_archive(file: BinaryIO, name: str) -> Source:
    parts: dict[str, list[Row]] = {}
    for member, data in read_archive(file, name).items():
        place = f"{name}/{member}"
        if not data:
            raise DataError(f"{place} is empty (0 bytes)", next_step="Check how the archive was made.")
        splits, _ = read_json(io.BytesIO(data), place)
        if set(splits) != {"train"}:
            raise DataError(
                f"{place} has splits of its own", expected="a list of objects", next_step="Unpack it first."
            )
        parts[member.removesuffix(".json")] = splits["train"]
    splits, notes = named_splits(name, parts)
    return Source(name, f"not stated in the archive (SAMSum's is {DATA_LICENCES[SAMSUM]})", splits, notes)


def _from_url(url: str, progress: Callable[..., Any] | None) -> Source:
    name = url_name(url)
    if not name.lower().endswith(".7z"):
        raise DataError(
            f"{name or 'that address'} can't be read from the web",
            expected="an https:// address of a .7z archive",
            next_step="Download the file and set data.source to it.",
        )
    with downloaded(url, progress) as file:
        return _from_archive(file, name)


def _local_path(name: str) -> Path | None:
    """Returns the file that a source names, or None where it names a hub data set.

    Raises:
        DataError: there is no such file, or it is of a kind that can't be read.
    """
    try:
        path = Path(name).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, or the home of an unknown user
        raise DataError(
            f"{name[:100]!r} is not a usable path ({brief(error)})", next_step="Name a data file."
        ) from error
    suffix = path.suffix.lower()
    if exists and (suffix in SUFFIXES or path.is_dir()):
        return path  # a folder is refused where it is opened: the hub's loader would read it as a data set
    if exists:
        raise DataError(
            f"{path.name} is of an unknown kind",
            expected=" or ".join(SUFFIXES),
            next_step="Convert the file to one of these.",
        )
    if suffix in SUFFIXES + _NO_DATA_SUFFIXES or name[0] in "./~" or not _HUB_ID.fullmatch(name):
        raise _no_such_file(name, path)
    return None


def _no_such_file(name: str, path: Path) -> DataError:
    folder = path.parent
    if not folder.is_dir():
        return DataError(
            f"no such file: {name}", next_step=f"There is no folder {str(folder)!r} either: check the path."
        )
    with contextlib.suppress(OSError):  # a folder that we may not list
        there = sorted(item.name for item in folder.iterdir() if item.suffix.lower() in SUFFIXES)
        found = listed(there) if there else f"no {', '.join(SUFFIXES)} file"
        return DataError(f"no such file: {name}", next_step=f"The folder {str(folder)!r} holds {found}.")
    return DataError(f"no such file: {name}", next_step="Check the path.")


def _from_hub(name: str, config: DataConfig) -> Source:
    notes = []
    if name in SCRIPT_ONLY:
        notes = [
            f"{name} is a loading script, which datasets no longer runs; {SAMSUM}, the same rows, was read instead"
        ]
        name = SAMSUM
    columns = _columns(config)
    parts = {split: _table_rows(table, f"{name} {split}", columns) for split, table in _hub_tables(name).items()}
    splits, more = named_splits(name, parts)
    return Source(name, DATA_LICENCES.get(name, "see the data set's card on the hub"), splits, notes + more)


def _columns(config: DataConfig) -> tuple[str, str]:
    return (config.dialogue_column, config.summary_column)


def _table_rows(table: Any, name: str, columns: tuple[str, str]) -> list[Row]:
    needed = needed_columns(table.column_names, columns)
    if not needed:
        return header_only(table.column_names, name)
    table = table.select_columns(needed)
    if table.data.nbytes > MAX_FILE_BYTES:
        raise DataError(
            f"{name} is too large to be held in memory",
            expected=f"{size_text(MAX_FILE_BYTES)} at most",
            got=size_text(table.data.nbytes),
            next_step="Save the part you need as a local .jsonl file.",
        )
    return [Row(f"{name} row {number}", row) for number, row in enumerate(table, start=1)]


def _hub_tables(name: str) -> Any:
    """Loads the hub data set's tables by split, from its cache or the network.

    Raises:
        DataError: unreachable, unknown, private, gated, or not readable without running code.
    """
    import datasets

    try:
        return datasets.load_dataset(name)
    except datasets.exceptions.DatasetNotFoundError as error:
        gated = "is a gated dataset" in str(error)
        problem = (
            f"the hub data set {name!r} is gated" if gated else f"the hub has no data set {name!r}, or it is private"
        )
        step = "Accept its terms on the hub and log in with `hf auth login`." if gated else "Check the name."
        raise DataError(problem, next_step=f"{step} {_WITHOUT}") from error
    except ConnectionError as error:
        raise DataError(
            f"the hub data set {name!r} can't be reached, and no copy is in the cache ({brief(error)})",
            next_step=f"Check the network, and that HF_HUB_OFFLINE is not set. {_WITHOUT}",
        ) from error
    except Exception as error:  # datasets passes on whatever its HTTP clients and parsers raise
        reason = "no data files were found" if isinstance(error, FileNotFoundError) else brief(error.__cause__ or error)
        raise DataError(f"the hub data set {name!r} can't be read ({reason})", next_step=_WITHOUT) from error
