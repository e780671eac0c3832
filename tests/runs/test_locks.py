"""One trainer a run and a GPU: the locks, and which GPUs a process may use."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
from fake_nvml import FakeNvml, NoDriver
from two_users import as_other_user, needs_root, open_way_to

from qlora_helpers import workflow
from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import cache_root
from qlora_helpers.runs import launch, locks, session
from qlora_helpers.runs.folder import Run


class TwoCards(FakeNvml):
    def nvmlDeviceGetUUID(self, handle):
        return ["GPU-aaaa-1", "GPU-bbbb-2"][handle]


@pytest.mark.parametrize(
    ("chosen", "gpus"),
    [
        (None, ("GPU-aaaa-1", "GPU-bbbb-2")),
        ("", ()),
        ("-1", ()),
        ("1", ("GPU-bbbb-2",)),
        ("1,0", ("GPU-bbbb-2", "GPU-aaaa-1")),
        ("1,7,0", ("GPU-bbbb-2",)),  # CUDA stops at the first that does not exist
        ("1,7,1", ("GPU-bbbb-2",)),
        ("0,0", ()),  # a repeated entry hides every GPU: cuInit fails with error 101
        ("0,1,0", ()),
        ("GPU-aaaa,GPU-aaaa", ()),
        ("0,GPU-aaaa-1", ("GPU-aaaa-1",)),  # one GPU under two names
        ("GPU-aaaa", ("GPU-aaaa-1",)),
        ("MIG-cccc", ("MIG-cccc",)),
    ],
)
def test_which_gpus_a_process_may_use(monkeypatch, chosen, gpus):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert locks.visible_gpus(TwoCards()) == gpus
    assert locks.visible_gpus(NoDriver()) == ()


HOLDER = """
import sys, time
from qlora_helpers.runs import locks
from qlora_helpers.runs.folder import Run
with locks.gpu_locks(Run(sys.argv[1]), ["GPU-held"]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that trains `runs/other` on a GPU."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "runs" / "other")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_two_trainers_do_not_share_a_gpu(holder, run):
    said = rf"the run 'other' \(process {holder.pid}\) is already using GPU-held.*CUDA_VISIBLE_DEVICES"
    with pytest.raises(RunError, match=said), locks.gpu_locks(run, ["GPU-free", "GPU-held"]):
        pass
    with locks.gpu_locks(run, ["GPU-free"]):  # it was released
        pass
    with pytest.raises(RunError, match=said), locks.gpu_locks(run, ["GPU-later", "GPU-held"]):
        pass
    # In one order for all trainers: of two that want the same GPUs one gets them.
    assert not (cache_root() / "locks" / "GPU-later.json").exists()
    holder.kill()
    holder.wait()
    locks.refuse_busy_gpus(["GPU-held"])
    with locks.gpu_locks(run, ["GPU-held"]):
        pass


def test_a_start_is_refused_while_another_run_uses_the_gpu(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "visible_gpus", lambda: ("GPU-held",))
    run = workflow.open_run("mine", profile="tiny", root=tmp_path / "runs")
    with pytest.raises(RunError, match="the run 'other' .* is already using GPU-held"):
        launch.start(run)
    assert run.status().state == "new"
    with pytest.raises(RunError, match="is already using GPU-held"):
        workflow.train(run, say=lambda text: None)
    assert run.status().state == "failed"
    assert "GPU-held" in run.status().last_error
    run = workflow.open_run("mine", settings=["model.device_map=cpu"], root=tmp_path / "runs")
    with session.training_session(run):  # takes no GPU
        pass


def test_a_run_is_locked_while_it_trains(run):
    assert not locks.is_locked(run)
    with locks.run_lock(run):
        assert locks.is_locked(run)
        with pytest.raises(RunError, match="another process is training 'mine'"), locks.run_lock(Run(run.folder)):
            pass
    assert not locks.is_locked(run)


def test_a_refused_start_names_the_process_that_trains(tmp_path):
    run = workflow.open_run("mine", profile="tiny", root=tmp_path / "runs")
    with locks.run_lock(run), pytest.raises(RunError, match="'mine' is already being trained, in another process"):
        launch.start(run)
    run.start_session(max_steps=4, resumed_from=0)
    with pytest.raises(RunError, match=r"'mine' is already being trained, in process \d+ on "):
        launch.start(run)


def lock_mode(folder_mode: int, run: Run) -> int:
    run.folder.mkdir(parents=True, exist_ok=True)
    run.folder.chmod(folder_mode)
    with locks.run_lock(run):
        return stat.S_IMODE((run.folder / ".lock").stat().st_mode)


def test_who_may_hold_a_lock_is_who_may_write_in_its_folder(tmp_path):
    modes = {0o700: 0o600, 0o755: 0o600, 0o775: 0o660, 0o2770: 0o660, 0o777: 0o666}
    found = {mode: lock_mode(mode, Run(tmp_path / f"run-{mode:o}")) for mode in modes}
    assert found == modes


def test_a_lock_that_an_earlier_version_left_open_is_closed(tmp_path):
    run = Run(tmp_path / "mine")
    run.folder.mkdir()
    (run.folder / ".lock").touch()
    (run.folder / ".lock").chmod(0o666)
    assert lock_mode(0o755, run) == 0o600


@needs_root
def test_another_user_can_not_keep_a_trainer_waiting(tmp_path):
    """Whoever can open the lock's file, for reading even, can hold the lock."""
    run = Run(tmp_path / "mine")
    lock_mode(0o755, run)
    open_way_to(run.folder)
    done = as_other_user("open(sys.argv[1]).read()", str(run.folder / ".lock"))
    assert "PermissionError" in done.stderr
    assert (
        "mine" in as_other_user("print(os.listdir(sys.argv[1]))", str(run.folder.parent)).stdout
    )  # the folder is open


@needs_root
def test_a_lock_of_another_account_is_one_message(tmp_path):
    run = Run(tmp_path / "theirs")
    run.folder.mkdir()
    (run.folder / ".lock").touch(mode=0o600)
    code = f"""
import os
from qlora_helpers.base.errors import RunError
from qlora_helpers.runs import locks
from qlora_helpers.runs.folder import Run
import filelock
os.setgid(65534); os.setuid(65534)
try:
    with locks.run_lock(Run({str(run.folder)!r})): print("held")
except RunError as error: print(error)
"""
    open_way_to(run.folder)
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert "theirs/.lock belongs to another account" in done.stdout, done.stderr
