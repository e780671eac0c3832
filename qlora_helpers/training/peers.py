"""Several machines that train together: they agree on what they train, see whether the others are alive, and end together.

Each machine's first process puts a sign of life into the store of torchrun's rendezvous every few seconds, with its GPUs' readings.
The first machine's process writes these into the run folder, so a machine whose folder is a copy needs no way back. A machine that
falls silent ends the training on all others; it goes on from its last checkpoint when it is started again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from qlora_helpers.base.errors import RunError
from qlora_helpers.runs import heartbeat, locks, sigterm
from qlora_helpers.runs.folder import FIXED, Run
from qlora_helpers.runs.plan_file import read_plan
from qlora_helpers.training import checkpoints as saved
from qlora_helpers.training.processes import is_main_process, join, several_machines

EVERY_S = 3.0
SILENT_S = 60.0
"""After so long without a sign of life a machine counts as lost; a connection that breaks is noticed at once."""
ANSWER_S = 20.0  # how long the store may take
LOST_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
_NEXT = "Start it on all machines again: it goes on from its last checkpoint."
log = logging.getLogger(__name__)


@contextlib.contextmanager
def joined(run: Run) -> Iterator[None]:
    """Joins the processes of the other machines, and watches over them during the block.

    Raises:
        RunError: the machines hold different settings or checkpoints, another run uses these GPUs, or another machine has ended.
    """
    import torch

    on_cpu = run.config().model.device_map == "cpu" or not torch.cuda.is_available()
    leads = int(os.environ.get("LOCAL_RANK", "0")) == 0
    with contextlib.ExitStack() as stack, _ended_elsewhere():
        if leads and not is_main_process() and not on_cpu:  # the first machine's session holds its own
            stack.enter_context(locks.gpu_locks(run, locks.visible_gpus()))
        join(on_cpu=on_cpu)
        _agree(run, leads)
        if leads:
            stack.enter_context(_watching(run))
        yield


def _agree(run: Run, leads: bool) -> None:
    """Makes sure that all machines train the same run from the same checkpoint, with the first one's settings of the training.

    Raises:
        RunError: they don't; every process raises it.
    """
    from torch import distributed

    config, launched = run.config().to_dict(), read_plan(run).launched
    first: list[Any] = [None]
    if is_main_process():
        first = [{"config": config, "step": saved.last_good_step(run.checkpoints_dir)}]
        planned = launched.processes if launched else None
        if planned is not None and planned != distributed.get_world_size():
            first[0]["wrong"] = f"{distributed.get_world_size()} processes have joined, and {planned} were planned for"
    distributed.broadcast_object_list(first, src=0)
    theirs = first[0]
    wrong = [theirs["wrong"]] if "wrong" in theirs and is_main_process() else []
    wrong += [
        f"{section}: {key}" for section in FIXED for key in _different(theirs["config"][section], config[section])
    ]
    step = saved.last_good_step(run.checkpoints_dir)
    if step != theirs["step"]:
        wrong.append(f"its last checkpoint is of step {step}, the first machine's of {theirs['step']}")
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, (socket.gethostname(), wrong))
    differing = {host: why for host, why in found if why}
    if differing:
        raise RunError(
            "the machines don't hold the same run",
            expected="the same settings and checkpoints on all of them, or a run folder that they share",
            got="; ".join(f"{host}: {', '.join(why)}" for host, why in differing.items())[:1500],
            next_step="Copy the run folder from the first machine to the others, and give all the same --gpus.",
        )
    if leads and config != theirs["config"]:  # a copy of the folder
        from qlora_helpers.base.config import config_from_dict

        run.save_config(config_from_dict(theirs["config"]))
    distributed.barrier()


def _different(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    return [key for key in theirs if key in ours and theirs[key] != ours[key]]


@contextlib.contextmanager
def _ended_elsewhere() -> Iterator[None]:
    """Says so where an exchange fails because another process has ended."""
    from torch import distributed

    try:
        yield
    except RuntimeError as error:
        text = str(error)
        broken = isinstance(error, distributed.DistError) or any(
            each in text for each in ("Connection closed by peer", "Connection reset", "gloo", "NCCL", "Broken pipe")
        )
        if isinstance(error, RunError) or not broken:
            raise
        raise RunError(
            "another machine of this training has ended", got=text.splitlines()[0][:200], next_step=_NEXT
        ) from error


@contextlib.contextmanager
def _watching(run: Run) -> Iterator[None]:
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(run, ended), name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=2 * EVERY_S)
        heartbeat.elsewhere.clear()


class _Signs:
    """What this machine receives from the others.

    Args:
        node, nodes: this machine's number, and how many there are.
    """

    def __init__(self, node: int, nodes: int) -> None:
        self.node = node
        self.others = [each for each in range(nodes) if each != node] if node == 0 else [0]
        self.last = dict.fromkeys(self.others, ("", time.monotonic()))
        self.received: dict[int, dict[str, Any]] = {}

    def read(self, store: Any) -> None:
        """Reads the others' signs."""
        for other in self.others:
            if not store.check([_key(other)]):
                continue
            text = store.get(_key(other)).decode()
            if text != self.last[other][0]:
                self.last[other] = (text, time.monotonic())
                self.received[other] = json.loads(text)

    def silent(self) -> str:
        """Returns what is said of a machine that has fallen silent; empty where there is none."""
        for other, (_, at) in self.last.items():
            if time.monotonic() - at > SILENT_S:
                host = self.received.get(other, {}).get("host", f"number {other}")
                return f"the machine {host} has given no sign of life for {SILENT_S:.0f} s"
        return ""


def _watch(run: Run, ended: threading.Event) -> None:
    node, nodes, count = int(os.environ["GROUP_RANK"]), several_machines(), 0
    signs = _Signs(node, nodes)
    try:
        store = _store()
        while not ended.wait(EVERY_S):
            count += 1
            sign = {"count": count, "host": socket.gethostname(), "sigterm": sigterm.received()}
            store.set(_key(node), json.dumps(sign | heartbeat.readings()))
            signs.read(store)
            if node == 0:
                heartbeat.elsewhere[:] = [signs.received[each] for each in sorted(signs.received)]
                if any(each.get("sigterm") for each in signs.received.values()) and not sigterm.received():
                    log.warning("another machine received SIGTERM: all save and end")
                    sigterm.pass_on()
            if silent := signs.silent():
                _end(run, silent)
    except RuntimeError as error:  # the store, which the first machine's torchrun holds
        if not ended.is_set():
            _end(run, f"the first machine can't be reached any more ({str(error).splitlines()[0][:200]})")


def _store() -> Any:
    """Opens a connection of its own to the store at which the processes have met."""
    from torch import distributed

    return distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=ANSWER_S),
    )


def _key(node: int) -> str:
    return f"qlora/sign of life/{node}"


def _end(run: Run, why: str) -> None:
    """Ends this process: an exchange with a machine that is gone would wait for half an hour."""
    log.error("training ended: %s", why)
    if is_main_process():
        with contextlib.suppress(RunError):
            run.set_status(state="failed", exit_reason="a machine was lost", last_error=f"{why}. {_NEXT}")
            run.requests.acknowledge_all("the training failed first")
    os._exit(LOST_EXIT_CODE)
