"""Reads prepared sequences back by what they are: whole numbers and names. Nothing that a stranger's folder declares is followed.

`datasets.load_from_disk` takes a column's kind from the folder: one declared as an image would be fetched from the address that it
holds, and its list of files may lead elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.text import brief
from qlora_helpers.data.arrow_messages import unpacked_bytes
from qlora_helpers.data.compressed import MAX_FILE_BYTES

if TYPE_CHECKING:
    from datasets import Dataset

NEEDED = ("input_ids", "labels", "segment_ids", "row_ids")


def read_sequences(folder: Path) -> Dataset:
    """Reads the sequences that `Dataset.save_to_disk` wrote into a folder, mapped into memory.

    Raises:
        RunError: a file is missing or damaged, or a column holds something other than numbers and texts.
    """
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable

    files = sorted(path for path in folder.glob("data-*.arrow") if path.is_file() and not path.is_symlink())
    try:
        unpacked = [unpacked_bytes(pyarrow.memory_map(str(file))) for file in files]
        if max(unpacked, default=0) > MAX_FILE_BYTES:
            raise ValueError("they unpack to more than can be held in memory")
        tables = [pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all() for file in files]
        table = pyarrow.concat_tables([each.replace_schema_metadata(None) for each in tables])
        table.validate(full=True)  # Arrow would follow a damaged offset anywhere
        wrong = [field.name for field in table.schema if not _is_plain(field.type)]
    except (pyarrow.ArrowException, OSError, MemoryError, ValueError) as error:
        raise _damaged(folder, brief(error)) from error
    missing = [name for name in NEEDED if name not in table.column_names]
    if wrong or missing:
        found = f"{wrong[0][:60]!r} holds other things than numbers" if wrong else f"{missing[0]!r} is missing"
        raise _damaged(folder, f"the column {found}")
    size = sum(file.stat().st_size for file in files)
    return Dataset(InMemoryTable(table), fingerprint=f"{folder.name}-{table.num_rows}-{size}")


def _is_plain(kind: Any) -> bool:
    import pyarrow.types as kinds

    while kinds.is_list(kind) or kinds.is_large_list(kind):
        kind = kind.value_type
    return any(test(kind) for test in (kinds.is_integer, kinds.is_boolean, kinds.is_floating, kinds.is_string))


def _damaged(folder: Path, why: str) -> RunError:
    return RunError(
        f"the prepared data in {folder.parent.name}/{folder.name} are damaged ({why})",
        next_step=f"Delete the folder {folder.parent.name}/; it is prepared again.",
    )
