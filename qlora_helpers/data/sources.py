"""Reads examples from a data source: the embedded corpora, local files, SAMSum's archive, or a hub data set.

Owns the choice of the reader by the source's name, and the way from rows to three splits. Files are found in `local_files` and
read in `readers`, archives in `archives`, the hub in `hub_data`; forms are recognised in `forms`, rows become examples in
`conversion`, splits are cut in `splits`. Knows nothing of tokens, labels and models, and imports no torch.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.data import encodings
from qlora_helpers.data.archives import MAX_ARCHIVE_BYTES, downloaded, read_archive, url_name
from qlora_helpers.data.compressed import open_file
from qlora_helpers.data.conversion import Conversion, first_values
from qlora_helpers.data.duplicates import RowKey, row_key, without_repeats
from qlora_helpers.data.examples import Example, characters_of
from qlora_helpers.data.forms import Form, recognised
from qlora_helpers.data.hub_data import SAMSUM, from_hub
from qlora_helpers.data.known import DATA_LICENCES
from qlora_helpers.data.local_files import local_files, split_of
from qlora_helpers.data.readers import json_parts, read_file
from qlora_helpers.data.rows import Corpus, Part, Row, SkippedRows, Source, need_rows
from qlora_helpers.data.splits import cut_missing, kept_apart, named_splits, sampled
from qlora_helpers.data.spool import Spool, rows_of

__all__ = ["Corpus", "Example", "read_corpus"]

# name -> file, and what is asked and answered where the settings say nothing
EMBEDDED: dict[str, tuple[str, str | None, str | None]] = {
    "embedded": ("dialogues.jsonl", None, None),
    "embedded:tickets": ("tickets.jsonl", "{subject}\n\n{body}", "{reply}"),
}
BAR_ROWS = 500
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def read_corpus(config: DataConfig, progress: Callable[..., Any] | None = None) -> Corpus:
    """Reads `config.source` into clean examples in three splits.

    The source's own splits are kept, and missing ones are cut from them. A prompt that is in two splits stays in test,
    else in eval. The same source, settings and seed give the same corpus.

    Args:
        config: source, form, columns, rows per split, seed.
        progress: shows a download, and the rows that are read; called like `tqdm.tqdm(total=..., unit=...)`; None shows nothing.

    Returns:
        The corpus; its `notes` say what the rows were recognised as, name those that were skipped, and say how splits were made.

    Raises:
        DataError: the source can't be read or used; the message names the file and the line, and says what to do.
    """
    if config.source in EMBEDDED and config.prompt is None and config.answer is None:
        _, prompt, answer = EMBEDDED[config.source]
        config = replace(config, prompt=prompt, answer=answer)
    source = open_source(config, progress)
    notes, skipped = source.notes, SkippedRows()
    spool: Spool[Example] = Spool()
    splits, form = _examples(source, config, skipped, progress, spool)
    if config.bad_rows == "refuse":
        skipped.refuse(source.name)
    splits = {split: without_repeats(rows, skipped) for split, rows in splits.items()}
    need_rows(source.name, splits, skipped)
    splits = kept_apart(cut_missing(source.name, splits, config, notes), skipped)
    need_rows(source.name, splits, skipped, each=True)
    drawn = {split: sampled(rows, config.most_rows(split), f"{config.seed}/{split}") for split, rows in splits.items()}
    chosen = {split: rows_of(spool, [row.number for row in rows]) for split, rows in drawn.items()}
    return Corpus(source.name, source.licence, notes=(*dict.fromkeys(notes), *skipped.notes()), form=form, **chosen)


def _examples(
    source: Source,
    config: DataConfig,
    skipped: SkippedRows,
    progress: Callable[..., Any] | None,
    spool: Spool[Example],
) -> tuple[dict[str, list[RowKey]], str]:
    """Recognises the form and puts all rows as examples into the spool; returns their keys by split, and the form's name."""
    parts = [part for several in source.splits.values() for part in several]
    kinds = {column: kind for part in parts for column, kind in part.kinds.items()}
    columns = first_values(parts)
    said: list[str] = []
    form = recognised(source.name, columns, kinds, config, said) if columns else Form("dialogue", NO_COLUMNS)
    source.notes += said if config.source not in EMBEDDED else []
    conversion = Conversion(form, config, skipped)
    needed = {*form.needed, "id"}
    splits: dict[str, list[RowKey]] = {}
    with contextlib.closing(progress(unit=" rows", desc="reading")) if progress else contextlib.nullcontext() as bar:
        for split, several in source.splits.items():
            splits[split] = []
            for part in several:
                for number, example in enumerate(conversion.examples(part.rows(needed)), start=1):
                    splits[split].append(row_key(spool.add(example, characters_of(example)), example))
                    if bar is not None and number % BAR_ROWS == 0:
                        bar.update(BAR_ROWS)
    source.notes += conversion.notes(source.name)
    return splits, form.name


def open_source(config: DataConfig, progress: Callable[..., Any] | None = None) -> Source:
    """Opens a source; its rows are read when they are asked for.

    Raises:
        DataError: as for `read_corpus`.
    """
    name = config.source
    if name in EMBEDDED:
        return _embedded(config)
    if _ADDRESS.match(name):
        return _from_url(name, progress)
    files = local_files(name)
    if files is None:
        return from_hub(config)
    if files[0].suffix.lower() == ".7z":
        with open_file(files[0], MAX_ARCHIVE_BYTES) as file:
            return _from_archive(file, files[0].name)
    notes: list[str] = []
    if len(files) == 1:
        return Source(files[0].name, _LOCAL, read_file(files[0], files[0].name, config, notes), notes)
    return _from_files(Path(name).expanduser().name or name, files, config, notes)


NO_COLUMNS = {"prompt": "dialogue", "answer": "summary"}  # of a source whose rows are no objects: none can be used
_LOCAL = "not stated (a local file)"


def _from_files(name: str, files: list[Path], config: DataConfig, notes: list[str]) -> Source:
    """Reads several files as one source; their names say which splits they are, where they begin with one."""
    parts: dict[str, list[Part]] = {}
    for file in files:
        found = read_file(file, file.name, config, notes)
        for split, several in found.items():
            own = split_of(file) if set(found) == {"train"} else split
            parts.setdefault(own or "rows", []).extend(several)
    notes.append(f"{name}: {len(files)} files were read")
    if set(parts) == {"rows"}:
        return Source(name, _LOCAL, {"train": parts["rows"]}, notes)
    splits, more = named_splits(name, parts)
    return Source(name, _LOCAL, splits, notes + more)


def _embedded(config: DataConfig) -> Source:
    resource = importlib.resources.files("qlora_helpers.data") / "corpus" / EMBEDDED[config.source][0]
    with importlib.resources.as_file(resource) as path:
        parts = read_file(path, path.name, DataConfig(), [])["train"]
        rows = [row for part in parts for row in part.rows(None)]
    splits: dict[str, list[Row]] = {}
    for row in rows:
        splits.setdefault(row.values["split"], []).append(row)
    return Source(
        config.source, DATA_LICENCES[config.source], {split: [_held(split, found)] for split, found in splits.items()}
    )


def _held(name: str, rows: list[Row]) -> Part:
    return Part(name, lambda columns: iter(rows))


def _from_archive(file: BinaryIO, name: str) -> Source:
    parts: dict[str, list[Part]] = {}
    notes: list[str] = []
    for member, data in read_archive(file, name).items():
        place = f"{name}/{member}"
        if not data:
            raise DataError(f"{place} is empty (0 bytes)", next_step="Check how the archive was made.")
        splits = json_parts(encodings.decoded(data, place, line=1, offset=0), place, [])
        if set(splits) != {"train"}:
            raise DataError(
                f"{place} has splits of its own", expected="a list of objects", next_step="Unpack it first."
            )
        parts[member.removesuffix(".json")] = splits["train"]
    splits, more = named_splits(name, parts)
    return Source(name, f"not stated in the archive (SAMSum's is {DATA_LICENCES[SAMSUM]})", splits, notes + more)


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
