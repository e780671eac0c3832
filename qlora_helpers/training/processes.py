"""The processes of one training: `runs.ranks` or torchrun starts several, and the first of them writes for all."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from qlora_helpers.runs.nodes import PRIVATE
from qlora_helpers.runs.ranks import STORE, machines

Value = TypeVar("Value")
PATIENCE = datetime.timedelta(minutes=30)
"""How long a process waits for another, such as for the first that prepares the data."""
log = logging.getLogger(__name__)


def is_main_process() -> bool:
    """Whether this is the first of several processes, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


def several_machines() -> int:
    """Returns how many machines train together, where torchrun has started them; 0 for one."""
    count = machines()
    return count if count > 1 else 0


def files_to_first(folder: Path, rank: int) -> None:
    """Gives the first process the files that each process has written in its own folder, where it does not see them.

    Args:
        folder: of a checkpoint; the name of each process's files ends in its number.
        rank: this process's number.
    """
    from torch import distributed

    mine = {path.name: path.read_bytes() for path in folder.glob(f"*_{rank}.*")} if rank else {}
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, mine)
    for name, content in (item for each in found for item in each.items() if rank == 0):
        if not (folder / name).exists():
            (folder / name).write_bytes(content)


@contextlib.contextmanager
def main_process_first(*, on_cpu: bool) -> Iterator[None]:
    """Of several processes, lets the first run the block before the others, so that they find what it wrote.

    Args:
        on_cpu: whether the model is on the CPU.
    """
    if "RANK" not in os.environ:
        yield
        return
    from accelerate import PartialState

    join(on_cpu=on_cpu)
    state = PartialState(cpu=on_cpu)
    if not several_machines():
        with state.main_process_first():
            yield
        return
    # The folder of another machine may be a copy, without what the first one wrote: its own first process then goes first.
    turn = 0 if is_main_process() else 1 if state.is_local_main_process else 2
    for _ in range(turn):
        state.wait_for_everyone()
    yield
    for _ in range(2 - turn):
        state.wait_for_everyone()


def join(*, on_cpu: bool) -> None:
    """Joins the other processes by the file that `runs.ranks` named, so that accelerate opens no port of its own to do so.

    Processes that torchrun or `accelerate launch` started meet at a port; this is logged as a warning.
    """
    import torch
    from torch import distributed

    if distributed.is_initialized():
        return
    store = os.environ.get(STORE)
    if store is None:
        if is_main_process() and PRIVATE not in os.environ:
            log.warning(
                "these processes meet at a port without a password: whoever reaches it can run code as you. On one machine "
                "use `train RUN --processes N` instead; across machines `launch RUN --nodes N`, in a private network."
            )
        if several_machines():
            _end_with_parent()
            if not on_cpu:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            distributed.init_process_group("gloo" if on_cpu else "nccl", init_method="env://", timeout=PATIENCE)
        return
    _end_with_parent()
    rank = int(os.environ["RANK"])
    if not on_cpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(
        "gloo" if on_cpu else "nccl",
        init_method=f"file://{store}",
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=PATIENCE,
    )


def values_of_all(value: Value) -> list[Value]:
    """Returns what each process handed in, in their order; all of them call this together. Alone, a list of the value."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


def from_first(make: Callable[[], Value]) -> Value:
    """Returns what the first process makes, in every process; all of them call this together.

    Raises:
        RuntimeError: making it failed in the first process, which raises its own error.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return make()
    sent: list[Any] = [None, None]
    failure: Exception | None = None
    if is_main_process():
        try:
            sent[0] = make()
        except Exception as error:
            sent[1], failure = f"{type(error).__name__}: {error}", error
    distributed.broadcast_object_list(sent, src=0)
    if failure is not None:
        raise failure
    if sent[1] is not None:
        raise RuntimeError(f"in the first process: {sent[1]}")
    return sent[0]


def _end_with_parent() -> None:
    """On Linux, has the kernel send this process SIGTERM when the one that started it is killed."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGTERM))
