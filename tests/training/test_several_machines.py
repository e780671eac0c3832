"""Two machines that train one run: two torchrun agents on loopback, of which the second has a copy of the run folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.python import python_environment
from qlora_helpers.runs import heartbeat, nodes, sigterm
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.nodes import Node
from qlora_helpers.runs.opening import open_run
from qlora_helpers.runs.plan_file import read_plan
from qlora_helpers.training import peers, processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Machines:
    """Two machines: each has a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.first, self.second = (Run(root / name / "runs" / "mine") for name in ("first", "second"))
        self.started: list[subprocess.Popen[str]] = []

    def copy(self) -> None:
        """Gives the second machine what a job's storage would: a copy of the run folder."""
        shutil.rmtree(self.second.folder, ignore_errors=True)
        shutil.copytree(self.first.folder, self.second.folder)

    def start(self, *options: str) -> None:
        place = ["--nodes", "2", "--address", "127.0.0.1", "--port", str(free_port()), "--gpus", "1"]
        self.started = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "qlora_helpers",
                    "launch",
                    str(run.folder),
                    *place,
                    "--node-rank",
                    str(rank),
                    *more,
                ],
                env=python_environment() | {"CUDA_VISIBLE_DEVICES": ""},
                stdout=subprocess.DEVNULL,
                stderr=open(self.root / f"errors-{rank}", "w"),  # noqa: SIM115 - the process holds it
                text=True,
            )
            for rank, (run, more) in enumerate(((self.first, options), (self.second, ())))
        ]

    def until(self, true, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            ended = [process.poll() for process in self.started]
            assert time.monotonic() < deadline and ended == [None, None], self.errors()
            time.sleep(0.1)

    def ends(self) -> list[int]:
        try:
            return [process.wait(120) for process in self.started]
        except subprocess.TimeoutExpired:
            raise AssertionError(self.errors()) from None

    def errors(self) -> str:
        told = {path.name: path.read_text().splitlines() for path in sorted(self.root.glob("errors-*"))}
        return "\n".join(f"{name}: {line[:1000]}" for name, lines in told.items() for line in lines if "rror" in line)


@pytest.fixture
def machines(tmp_path) -> Iterator[Machines]:
    found = Machines(tmp_path)
    settings = ["train.tensorboard=off", "train.eval_steps=500", "train.save_steps=3", "model.device_map=cpu"]
    settings += ["train.fast_step=false", "data.embedded_train_rows=8"]  # what they prove takes its time
    open_run("mine", profile="tiny", settings=settings, root=found.first.folder.parent)
    yield found
    for process in found.started:
        if process.poll() is None:
            kill_all(process.pid)
            process.wait()


def kill_all(pid: int) -> None:
    """What losing a machine does to its processes."""
    for each in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
        each.kill()


def lose_the_second(machines: Machines) -> list[int]:
    """Trains on two machines until the second is lost, and returns how the trainers ended."""
    first = machines.first
    machines.copy()
    machines.start("--set", "train.max_steps=500")
    machines.until(lambda: first.status().step >= 4)
    launched = read_plan(first).launched
    assert (launched.share, launched.processes) == ("copies", 2)
    train = first.config().train
    assert (train.share, train.micro_batch_size, train.gradient_accumulation_steps) == (
        "copies",
        1,
        1,
    )  # of two sequences
    machines.until(lambda: len((first.status().readings or {}).get("processes", ())) == 2)
    assert {each["host"] for each in first.status().readings["processes"]} == {socket.gethostname()}
    kill_all(machines.started[1].pid)
    return machines.ends()


def test_two_machines_train_one_run_and_the_loss_of_one_ends_it_cleanly(machines):
    codes = lose_the_second(machines)
    first, second = machines.first, machines.second
    status = first.status()
    assert codes[0] not in (0, None) and status.state == "failed", machines.errors()
    assert "machine" in status.last_error and "it goes on from its last checkpoint" in status.last_error
    # The first machine alone has written the run; the other's copy holds what it needs itself.
    assert not any((second.folder / name).exists() for name in ("status.json", "progress.jsonl", "log.txt", "adapter"))
    assert second.config() == first.config()


@pytest.mark.only_slow
def test_what_has_lost_a_machine_goes_on_and_a_signal_to_one_ends_both(machines):
    lose_the_second(machines)
    first = machines.first
    machines.start()  # the second machine's copy is of before: it would train something else
    assert machines.ends()[0] != 0
    assert "its last checkpoint is of step 0" in first.status().last_error

    machines.copy()
    saved = max(int(path.name.split("-")[1]) for path in first.checkpoints_dir.glob("checkpoint-*"))
    checkpoint = first.checkpoints_dir / f"checkpoint-{saved}"
    assert {path.name for path in checkpoint.glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    machines.start()
    machines.until(lambda: first.status().state == "running" and first.status().step >= saved + 2)
    machines.started[1].send_signal(signal.SIGTERM)  # a spot interruption of one machine
    codes = machines.ends()
    status = first.status()
    assert (status.state, status.exit_reason) == ("stopped", sigterm.REASON), machines.errors()
    assert codes[1] == sigterm.EXIT_CODE
    steps = [record["step"] for record in first.progress() if "loss" in record]
    assert steps == list(range(1, status.step + 1)) and (first.checkpoints_dir / f"checkpoint-{status.step}").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((1, 0, "10.0.0.4"), "--nodes 1"),
        ((2, 2, "10.0.0.4"), "--node-rank 2"),
        ((2, 0, ""), "--address HOST"),
        ((2, 0, "10.0.0.4", 0), "--port 0"),
    ],
)
def test_a_place_that_can_not_be_is_refused(place, message):
    with pytest.raises(UserError, match="not a machine's place among several") as caught:
        Node(*place)
    assert message in str(caught.value)


def test_machines_meet_in_a_private_network_alone():
    assert nodes.private_address(Node(2, 0, "localhost")) == "127.0.0.1"
    with pytest.raises(UserError, match=r"open internet.*got 8\.8\.8\.8"):
        nodes.private_address(Node(2, 0, "8.8.8.8"))
    with pytest.raises(UserError, match=r"first machine's name is not known here.*algo-1\.invalid"):
        nodes.private_address(Node(2, 0, "algo-1.invalid"), patience_s=0)
    assert "127.0.0.1" in {each.address for each in psutil.net_if_addrs()[nodes.interface_to("127.0.0.1")]}


def test_torchrun_gets_the_place_and_restarts_nothing():
    command = nodes.torchrun_command(["python", "train"], Node(3, 1, "algo-1"), "10.0.0.4", 8)
    assert command[1:4] == ["-P", "-m", "torch.distributed.run"] and command[-3:] == ["--no-python", "python", "train"]
    expected = {"--nnodes=3", "--node-rank=1", "--nproc-per-node=8", "--master-addr=10.0.0.4", "--max-restarts=0"}
    assert expected <= set(command)
    from torch.distributed.run import parse_args

    read = parse_args(command[4:])
    assert (read.nnodes, read.node_rank, read.training_script, read.rdzv_backend) == ("3", 1, "python", "static")


class Store(dict):
    """What `TCPStore` does here, without a port."""

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        return self[key].encode()


def test_a_machine_that_falls_silent_is_noticed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(peers.time, "monotonic", lambda: now[0])
    first, second, store = peers._Signs(0, 3), peers._Signs(2, 3), Store()
    assert first.others == [1, 2] and second.others == [0]
    for count in range(3):
        now[0] = 40.0 * count
        store[peers._key(2)] = json.dumps({"count": count, "host": "algo-3", "gpus": []})
        if count == 0:
            store[peers._key(1)] = json.dumps({"count": 0, "host": "algo-2"})
        first.read(store)
        said = first.silent()
    assert said == "the machine algo-2 has given no sign of life for 60 s"
    assert first.received[2]["count"] == 2
    assert second.silent() == "the machine number 0 has given no sign of life for 60 s"


def test_the_readings_of_all_machines_stand_side_by_side(monkeypatch):
    from qlora_helpers.views.readings import named_gpus, named_processes

    card = {"name": "A10G", "memory_used_gib": 3.0, "memory_total_gib": 24.0, "load": 97.0}
    monkeypatch.setattr(heartbeat, "readings", lambda: {"gpus": [card, card]})
    monkeypatch.setattr(heartbeat, "elsewhere", [])
    assert [name for name, _ in named_gpus(heartbeat.readings_everywhere())] == ["GPU 0", "GPU 1"]
    monkeypatch.setattr(heartbeat, "elsewhere", [{"host": "algo-2", "count": 3, "gpus": [card, card]}])
    monkeypatch.setattr(heartbeat.socket, "gethostname", lambda: "algo-1")
    found = heartbeat.readings_everywhere()
    assert [name for name, _ in named_gpus(found)] == [f"{host} GPU {i}" for host in ("algo-1", "algo-2") for i in "01"]
    monkeypatch.setattr(heartbeat, "readings", lambda: {"process": {"rss_gib": 1.0}})
    monkeypatch.setattr(heartbeat, "elsewhere", [{"host": "algo-2", "process": {"rss_gib": 2.0}}])
    both = named_processes(heartbeat.readings_everywhere())
    assert [(name, each["rss_gib"]) for name, each in both] == [("algo-1 process 0", 1.0), ("algo-2 process 0", 2.0)]


def test_an_exchange_that_fails_names_the_other_machine():
    with (
        pytest.raises(RunError, match="another machine of this training has ended; got .*Connection closed by peer"),
        peers._ended_elsewhere(),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:20384")
    with pytest.raises(RuntimeError, match="shape"), peers._ended_elsewhere():
        raise RuntimeError("shape mismatch")


def test_one_machine_is_not_several(monkeypatch):
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    assert processes.several_machines() == 0
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert processes.several_machines() == 0
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    assert processes.several_machines() == 3 and os.environ["GROUP_WORLD_SIZE"] == "3"
