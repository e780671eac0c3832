"""A run's `log.txt`: what the package and transformers say while it trains, each line once."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Writes what is logged in the block to the end of a file, besides where it goes already."""
    # transformers prints its warnings besides: where that goes into the same file, once is enough.
    names = ("qlora_helpers",) if prints_into(path) else ("qlora_helpers", "transformers")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in names:
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("qlora_helpers").setLevel(logging.INFO)
    try:
        yield
    finally:
        handler.close()
        for name in names:
            logging.getLogger(name).removeHandler(handler)


def prints_into(path: Path) -> bool:
    """Whether what this process prints goes into a file already, as that of a background process does."""
    try:
        return os.path.samestat(os.fstat(2), path.stat())
    except OSError:
        return False
