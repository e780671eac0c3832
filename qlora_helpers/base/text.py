"""Preparing texts for a terminal or a page: control characters, short forms, sizes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from qlora_helpers.base.addresses import redacted
from qlora_helpers.base.units import BYTES_IN_GIB

_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours and cursor movements
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # window titles and links
    r"|\x1b[ -/]*[0-~]"
)


# Never part of what a person writes: C0 except \t and \n, DEL, C1, overrides of the writing direction
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


SURROGATES = re.compile(r"[\ud800-\udfff]")  # half a character, which UTF-8 can't encode


def plain(text: str) -> str:
    """Returns a text from elsewhere without terminal escape codes and control characters; line ends and tabs stay."""
    return SURROGATES.sub("", CONTROLS.sub("", _ESCAPES.sub("", text)))


def brief(error: BaseException) -> str:
    """Returns the first line of a library's message without control characters, at most 200 characters long."""
    line = redacted((str(error).strip().splitlines() or [type(error).__name__])[0])
    return "".join(char if char.isprintable() else " " for char in line)[:200].rstrip(" .")


def size_text(size: int) -> str:
    """Returns a number of bytes in the largest unit that fits, such as `1.5 GiB`."""
    for unit, factor in (("GiB", BYTES_IN_GIB), ("MiB", 1024**2), ("KiB", 1024)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def short_name(name: str, *, keep_owner: bool = False) -> str:
    """Returns the name of a model or data set without folders of this machine; `keep_owner` keeps the owner of a hub id."""
    path = Path(name).expanduser()
    return name if keep_owner and not (path.is_absolute() or path.exists()) else path.name


Say = Callable[[str], None]
