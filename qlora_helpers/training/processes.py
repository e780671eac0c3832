"""The processes of one training: torchrun starts several, and the first of them writes for all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def is_main_process() -> bool:
    """Whether this is the first process of a torchrun job, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def main_process_first(*, on_cpu: bool) -> Iterator[None]:
    """Under torchrun, lets the first process run the block before the others, so that they find what it wrote.

    Args:
        on_cpu: whether the model is on the CPU.
    """
    if "RANK" not in os.environ:
        yield
        return
    from accelerate import PartialState

    with PartialState(cpu=on_cpu).main_process_first():
        yield
