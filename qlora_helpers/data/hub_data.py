"""Loads data sets from the Hugging Face hub, from its cache or the network, without running code of theirs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.base.text import brief
from qlora_helpers.data.known import DATA_LICENCES
from qlora_helpers.data.rows import Part, Row, Source, listed
from qlora_helpers.data.splits import named_splits
from qlora_helpers.data.tables import BATCH_ROWS, limit, needed_columns, table_rows, unusable_columns

SAMSUM = "knkarthick/samsum"
SCRIPT_ONLY = ("samsum", "Samsung/samsum")  # datasets 5 runs no loading scripts; the same rows are at SAMSUM
HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
WITHOUT = "To do without, set data.source to embedded or to a file of your own."


def from_hub(config: DataConfig) -> Source:
    """Loads a data set's splits.

    Args:
        config: its name, configuration, split and revision.

    Raises:
        DataError: unreachable, unknown, private, gated, not readable without running code, too large, or not a data set's name.
    """
    name, notes = config.source, list[str]()
    if name in SCRIPT_ONLY:
        notes = [
            f"{name} is a loading script, which datasets no longer runs; {SAMSUM}, the same rows, was read instead"
        ]
        name = SAMSUM
    tables = _tables(name, config)
    if config.hub_split is not None:
        tables = {config.hub_split: tables}
        splits = {"train": [_part(tables[config.hub_split], f"{name} {config.hub_split}")]}
    else:
        named = {split: [_part(table, f"{name} {split}")] for split, table in tables.items()}
        splits, more = named_splits(name, named)
        notes += more
    return Source(name, DATA_LICENCES.get(name, "see the data set's card on the hub"), splits, notes)


def _part(dataset: Any, name: str) -> Part:
    table = dataset.data.table
    limit(name, rows=table.num_rows, size=table.nbytes)
    kinds = unusable_columns(table.schema)

    def rows(columns: Collection[str] | None) -> Iterator[Row]:
        needed = needed_columns(table.column_names, columns, kinds)
        yield from table_rows(table.select(needed).to_batches(BATCH_ROWS), table.column_names, name)

    return Part(name, rows, kinds)


def _tables(name: str, config: DataConfig) -> Any:
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as readers

    if name in readers:  # `datasets` would read the files of the folder that the process runs in
        raise DataError(
            f"{name!r} is a kind of file and not a data set", next_step="Name a data file, or a data set of the hub."
        )
    try:
        return datasets.load_dataset(name, config.hub_config, split=config.hub_split, revision=config.revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        gated = "is a gated dataset" in str(error)
        problem = (
            f"the hub data set {name!r} is gated" if gated else f"the hub has no data set {name!r}, or it is private"
        )
        step = "Accept its terms on the hub and log in with `hf auth login`." if gated else "Check the name."
        raise DataError(problem, next_step=f"{step} {WITHOUT}") from error
    except ConnectionError as error:
        raise DataError(
            f"the hub data set {name!r} can't be reached, and no copy is in the cache ({brief(error)})",
            next_step=f"Check the network, and that HF_HUB_OFFLINE is not set. {WITHOUT}",
        ) from error
    except Exception as error:  # datasets passes on whatever its HTTP clients and parsers raise
        raise _other(error, name, config) from error


def _other(error: Exception, name: str, config: DataConfig) -> DataError:
    listing = re.search(r"\[('[^\]]*')\]", str(error))
    choices = re.findall(r"'([^']{1,80})'", listing[1]) if listing else []
    if "onfig" in str(error) and choices:
        return DataError(
            f"the hub data set {name!r} has several configurations"
            if config.hub_config is None
            else f"the hub data set {name!r} has no configuration {config.hub_config!r}",
            expected=listed(choices),
            next_step="Name one: data.hub_config.",
        )
    if "split" in str(error).lower() and config.hub_split is not None and choices:
        return DataError(
            f"the hub data set {name!r} has no split {config.hub_split!r}",
            expected=listed(choices),
            next_step="Name one: data.hub_split.",
        )
    reason = "no data files were found" if isinstance(error, FileNotFoundError) else brief(error.__cause__ or error)
    return DataError(f"the hub data set {name!r} can't be read ({reason})", next_step=WITHOUT)
