"""Counts what a function does, so that a test of how a cost grows does not depend on the machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = str(Path(__file__).parent.parent / "qlora_helpers")


def lines_run(function: Callable[[], Any]) -> int:
    """Calls the function and counts the lines of this package that run, each pass of a loop or comprehension as one."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def growth(work: Callable[[int], Callable[[], Any]], size: int) -> float:
    """How many times as much is done for four times the input: 4 where the cost is linear, 16 where it is quadratic.

    Args:
        work: makes the input of a size and returns what is counted.
        size: of the smaller input.
    """
    return lines_run(work(4 * size)) / lines_run(work(size))
