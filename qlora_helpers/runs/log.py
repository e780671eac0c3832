"""A run's `log.txt`: the messages that the package and transformers log while it trains, each once."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from qlora_helpers.base.addresses import redacted
from qlora_helpers.base.text import plain
from qlora_helpers.runs.guard import open_to_append


class _Redacting(logging.Formatter):
    """Writes no credentials, whatever a library logs, and no codes that a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(redacted(super().format(record)))


@contextlib.contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Appends what is logged during the block to a file, in addition to where it goes already."""
    # transformers also prints its warnings: where its output goes into the same file, they are there already.
    names = ("qlora_helpers",) if prints_into(path) else ("qlora_helpers", "transformers")
    file = open_to_append(path, "a", encoding="utf-8")
    handler = logging.StreamHandler(file)
    handler.setFormatter(_Redacting("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in names:
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("qlora_helpers").setLevel(logging.INFO)
    try:
        yield
    finally:
        handler.close()
        file.close()
        for name in names:
            logging.getLogger(name).removeHandler(handler)


def prints_into(path: Path) -> bool:
    """Whether this process's output goes into that file, as a background process's does."""
    try:
        return os.path.samestat(os.fstat(2), path.stat())
    except OSError:
        return False
