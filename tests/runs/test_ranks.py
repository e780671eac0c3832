"""Processes of one training that meet in a private file: only the loopback interface listens, and they end together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from two_users import as_other_user, needs_root

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.python import python_environment
from qlora_helpers.runs import ranks

JOINED = """
import os, sys, time
from qlora_helpers.training.processes import join
join(on_cpu=True)
import torch
from torch import distributed
total = torch.tensor([distributed.get_rank() + 1.0])
distributed.all_reduce(total)
open(sys.argv[1] + os.environ["RANK"], "w").write(f"{total.item()} {os.environ['QLORA_STORE']}")
"""
WAIT = "\ntime.sleep(120)"


@pytest.fixture
def start(tmp_path):
    """Starts `run_ranks` of some code in a process of its own; whatever is left of it is killed after the test."""
    started = []

    def start(code: str, processes: int = 2) -> subprocess.Popen:
        command = [sys.executable, "-c", code, str(tmp_path / "rank-")]
        supervise = (
            f"import sys; from qlora_helpers.runs.ranks import run_ranks; sys.exit(run_ranks({command!r}, {processes}))"
        )
        started.append(subprocess.Popen([sys.executable, "-c", supervise], env=python_environment()))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                each.kill()
            process.wait()


def until(true, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def ranks_of(tmp_path: Path, process: subprocess.Popen) -> list[str]:
    """What each of two processes wrote once it had joined."""

    def both() -> list[str]:
        assert process.poll() is None
        return [path.read_text() for path in sorted(tmp_path.glob("rank-*")) if path.read_text()]

    return until(lambda: found if len(found := both()) == 2 else [])


def listening_addresses(pids: set[int]) -> set[str]:
    return {
        each.laddr.ip for pid in pids for each in psutil.Process(pid).net_connections("inet") if each.status == "LISTEN"
    }


def test_they_meet_in_a_private_file_and_listen_on_loopback_alone(start, tmp_path, monkeypatch):
    # Where a machine's own name leads to the loopback interface, gloo would bind to it anyway: so another one is asked for.
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family == socket.AF_INET and each.address != ranks.LOOPBACK for each in addresses):
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
    process = start(JOINED + WAIT)
    said = ranks_of(tmp_path, process)
    store = Path(said[0].split()[1])
    assert said == [f"3.0 {store}"] * 2
    children = {each.pid for each in psutil.Process(process.pid).children(recursive=True)}
    assert len(children) == 2
    assert listening_addresses(children | {process.pid}) <= {"127.0.0.1", "::1"}
    assert store.parent.stat().st_mode & 0o777 == 0o700 and store.exists()
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not store.parent.exists()
    assert not any(map(psutil.pid_exists, children))


@needs_root
def test_another_user_can_not_read_or_write_the_store(start, tmp_path):
    process = start(JOINED + WAIT)
    store = ranks_of(tmp_path, process)[0].split()[1]
    for mode in ("rb", "r+b"):
        done = as_other_user("import sys; open(sys.argv[1], sys.argv[2])", store, mode)
        assert "PermissionError" in done.stderr
    process.terminate()
    process.wait(30)


def test_one_that_fails_ends_the_others_and_its_exit_code_counts(start, tmp_path, monkeypatch):
    code = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(120)"
    monkeypatch.setattr(ranks, "NOTICE_S", 0.2)
    begun = time.monotonic()
    assert ranks.run_ranks([sys.executable, "-c", code], 2) == 3
    assert time.monotonic() - begun < 60  # it did not wait for the other


def test_a_signal_that_kills_one_is_an_exit_code_too(monkeypatch):
    monkeypatch.setattr(ranks, "NOTICE_S", 0.2)
    code = "import os, time\nif os.environ['RANK'] == '0': os.kill(os.getpid(), 9)\ntime.sleep(120)"
    assert ranks.run_ranks([sys.executable, "-c", code], 2) == 128 + signal.SIGKILL


def test_sigterm_lets_each_end_in_its_own_time(start, tmp_path):
    code = """
import os, signal, sys, time
def saves(*_):
    time.sleep(0.5)
    open(sys.argv[1] + "saved-" + os.environ["RANK"], "w")
    sys.exit(143)
signal.signal(signal.SIGTERM, saves)
open(sys.argv[1] + os.environ["RANK"], "w").write("ready")
time.sleep(120)
"""
    process = start(code)
    ranks_of(tmp_path, process)
    process.terminate()
    assert process.wait(60) == 143
    assert sorted(path.name for path in tmp_path.glob("rank-saved-*")) == ["rank-saved-0", "rank-saved-1"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that the one that started it has ended")
def test_they_end_when_the_one_that_started_them_is_killed(start, tmp_path):
    process = start(JOINED + WAIT)
    ranks_of(tmp_path, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert psutil.wait_procs(children, 30)[1] == []


def test_the_loopback_interface_is_found_by_its_address():
    address = psutil.net_if_addrs()[ranks.loopback_interface()]
    assert "127.0.0.1" in {each.address for each in address}


def test_a_machine_without_a_loopback_interface_is_refused(monkeypatch):
    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    with pytest.raises(UserError, match="got no interface. Train in one process"):
        ranks.run_ranks(["false"], 2)
    with pytest.raises(UserError, match="at least 1; got 0"):
        ranks.run_ranks(["false"], 0)


def test_a_thread_count_that_the_person_set_is_kept(monkeypatch, tmp_path):
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['OMP_NUM_THREADS'])"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    ranks.run_ranks([sys.executable, "-c", code, str(tmp_path / "set")], 1)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(ranks, "cpu_cores", lambda: 6)
    ranks.run_ranks([sys.executable, "-c", code, str(tmp_path / "unset")], 1)
    assert [(tmp_path / name).read_text() for name in ("set", "unset")] == ["5", "6"]


def test_processes_that_meet_at_a_port_are_warned(monkeypatch, caplog):
    from qlora_helpers.training import processes

    monkeypatch.delenv(ranks.STORE, raising=False)
    processes.join(on_cpu=True)
    assert "at a port without a password" in caplog.text and "--processes N" in caplog.text
    assert os.environ.get(ranks.STORE) is None
