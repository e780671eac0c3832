"""Refuses rows whose columns say that they are something else than they would be read as, with the settings that end the doubt.

Knows nothing of files and of forms.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from qlora_helpers.base.errors import DataError
from qlora_helpers.data.conversations import ROLE_KEYS, ROLE_NAMES, has_broken_turns
from qlora_helpers.data.rows import listed

MARKS = ("label", "kto_tag", "desirable", "is_desirable", "is_preferred")
"""Columns in which preference data without pairs (TRL's and LLaMA-Factory's for KTO) say whether an answer is a good one."""
_YES_OR_NO = ("true", "false")


def refuse_broken_turns(name: str, columns: Mapping[str, Sequence[object]], read: Collection[str]) -> None:
    """Refuses texts that were lists of turns before somebody printed them, where they would be read as something else."""
    for column in columns:
        if column in read and any(map(has_broken_turns, columns[column])):
            raise DataError(
                f"the column {column!r} of {name} holds turns that can't be parsed",
                expected='JSON, such as [{"role": "user", "content": "..."}, ...]',
                got=f"{str(next(filter(has_broken_turns, columns[column])))[:80]!r}...",
                next_step="Write the rows as JSON Lines or Parquet, which keep lists; or `--set data.format=text` for documents.",
            )


def refuse_single_turns(name: str, columns: Mapping[str, Sequence[object]]) -> None:
    """Refuses rows that are one turn each, which would be learned as documents that nobody asked for."""
    for column, values in columns.items():
        roles = [ROLE_NAMES.get(value.strip().lower()) for value in values if isinstance(value, str)]
        if column.strip().lower() in ROLE_KEYS and roles and all(roles):
            raise DataError(
                f"each row of {name} is one turn of a conversation, by its column {column!r}",
                expected="a row for each conversation, with its turns in one list",
                got=f"the columns {listed(columns)}",
                next_step="Put a conversation's turns into one list under `messages`; or `--set data.format=text` for documents.",
            )


def refuse_marked_answers(name: str, columns: Mapping[str, Sequence[object]], read: Collection[str], form: str) -> None:
    """Refuses answers beside a column of yes and no that is not read: the bad ones would be learned like the good ones."""
    for column, values in columns.items():
        if column in read or column.strip().lower() not in MARKS or not values:
            continue
        if all(str(value).strip().lower() in _YES_OR_NO for value in values):
            raise DataError(
                f"the column {column!r} of {name} says which answers are good ones",
                expected="answers that are all to be learned",
                got=f"a column of true and false beside {listed(read)}",
                next_step=f"Remove the rows with false, and the column; or learn all of them: `--set data.format={form}`.",
            )
