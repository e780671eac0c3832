"""One machine's part of a training on several: starts torchrun, which starts a process for each GPU, and ends them together.

torchrun's processes meet at a port of the first machine, without a password, and whoever reaches it can run code as its user
(https://github.com/pytorch/pytorch/issues/173909). So the address must lie in a private network, and gloo and NCCL are bound to the
network interface that leads to it. This module imports no torch; `training.peers` watches over the machines during the training.
"""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.python import python_command, python_environment
from qlora_helpers.machine.telemetry import cpu_cores
from qlora_helpers.runs import sigterm

PORT = 29400
RESOLVE_S = 300.0
"""How long a machine's name may take to be known, as in a cluster whose machines start one after another."""
END_S = 70.0
"""How long torchrun has to end its processes where this one ends early; it gives them 30 seconds."""
PRIVATE = "QLORA_PRIVATE_NETWORK"
"""The environment variable that says that the address at which the processes meet was looked at."""
_POLL_S = 0.2


@dataclass(frozen=True)
class Node:
    """One machine's place among several.

    Attributes:
        nodes: how many machines.
        rank: this one's number, from 0; the first one writes the run folder.
        address: name or address of the first one.
        port: at which the processes meet there.
    """

    nodes: int
    rank: int
    address: str
    port: int = PORT

    def __post_init__(self) -> None:
        expected = f"--nodes 2 or more, and --node-rank from 0 to {max(self.nodes, 2) - 1}"
        if self.nodes < 2 or not 0 <= self.rank < self.nodes or not self.address or not 0 < self.port < 65536:
            raise UserError(
                "this is not a machine's place among several",
                expected=f"{expected}, --address HOST of the first machine, --port 1 to 65535",
                got=f"--nodes {self.nodes} --node-rank {self.rank} --address {self.address!r} --port {self.port}",
                next_step="Give each machine the same number and address, and a rank of its own.",
            )


def private_address(node: Node, *, patience_s: float = RESOLVE_S) -> str:
    """Returns the first machine's address as a number, once its name is known.

    Raises:
        UserError: the name stays unknown, or the address is one of the open internet.
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            found = socket.getaddrinfo(node.address, node.port, socket.AF_INET, socket.SOCK_STREAM)
            address = str(found[0][4][0])
            break
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    "the first machine's name is not known here",
                    expected="a name or an address in a private network",
                    got=f"{node.address} ({error.strerror or error})",
                    next_step="Give its address, such as --address 10.0.0.4.",
                ) from error
            time.sleep(1.0)
    if ipaddress.ip_address(address).is_global:
        raise UserError(
            "the processes would meet at an address of the open internet, where anybody could join them",
            expected="an address in a private network, such as 10.0.0.4",
            got=f"{node.address} ({address})",
            next_step="Give the first machine's address in the network that the machines share, or connect them by a VPN.",
        )
    return address


def interface_to(address: str) -> str:
    """Returns the name of the network interface over which an address is reached.

    Raises:
        UserError: there is none.
    """
    import psutil

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with contextlib.suppress(OSError):  # sends nothing: it only asks for the way
            probe.connect((address, 9))
        mine = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == mine for each in addresses):
            return name
    raise UserError(
        "no network interface leads to the first machine",
        expected="an interface in its network",
        got=f"{address}; interfaces: {', '.join(psutil.net_if_addrs())}",
        next_step="Check --address, and that the machines share a network.",
    )


def torchrun_command(command: Sequence[str], node: Node, address: str, processes: int) -> list[str]:
    """Returns the command that starts this machine's processes.

    Args:
        command: of each process.
        node: this machine's place.
        address: of the first machine.
        processes: on this machine.
    """
    options = {
        "nnodes": node.nodes,
        "node-rank": node.rank,
        "nproc-per-node": processes,
        "master-addr": address,
        "master-port": node.port,
        "max-restarts": 0,  # a training that lost a machine is started again by a person, from its last checkpoint
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return python_command("torch.distributed.run", *flags, "--no-python", *command)


def run_node(command: Sequence[str], node: Node, processes: int, *, environment: dict[str, str] | None = None) -> int:
    """Runs a command in this machine's processes, which join those of the other machines, and returns when they have ended.

    SIGTERM is passed on to the processes, so that they can save.

    Args:
        command: of each process.
        node: this machine's place.
        processes: on this machine.
        environment: variables beside this process's own.

    Returns:
        0 if all succeeded, `sigterm.EXIT_CODE` after a SIGTERM, else torchrun's exit code.

    Raises:
        UserError: the first machine's address can't be used.
    """
    address = private_address(node)
    interface = interface_to(address)
    network = {PRIVATE: address, "GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    threads = {"OMP_NUM_THREADS": str(max(1, cpu_cores() // processes))}  # a value that the person has set is kept
    started: list[subprocess.Popen[bytes]] = []
    forwarder = _SigtermToWorkers(started)
    before = signal.signal(signal.SIGTERM, forwarder.handle)
    try:
        started.append(
            subprocess.Popen(
                torchrun_command(command, node, address, processes),
                env=threads | network | python_environment() | (environment or {}),
            )
        )
        if forwarder.received:
            forwarder.pass_on()
        while (code := started[0].poll()) is None:
            time.sleep(_POLL_S)
        return sigterm.EXIT_CODE if forwarder.received else code if code >= 0 else 128 - code
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(END_S)
        signal.signal(signal.SIGTERM, before)


class _SigtermToWorkers:
    """Passes SIGTERM on to torchrun's processes; torchrun itself would kill them after a time and report an error."""

    def __init__(self, started: list[subprocess.Popen[bytes]]) -> None:
        self.started, self.received = started, False

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self.pass_on()

    def pass_on(self) -> None:
        for process in self.started:
            workers = _children(process.pid)
            for worker in workers:
                with contextlib.suppress(OSError):
                    worker.terminate()
            if not workers and process.poll() is None:
                process.terminate()


def _children(pid: int) -> list[Any]:
    import psutil

    try:
        return psutil.Process(pid).children()
    except psutil.Error:
        return []
