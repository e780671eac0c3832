"""What two users of one machine see of each other's trainings: with real processes of two unprivileged users."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from two_users import NOBODY, needs_root, open_way_to

from qlora_helpers.base.errors import RunError
from qlora_helpers.runs import claims, locks
from qlora_helpers.runs.folder import Run

GPU = "GPU-of-these-tests"
OTHER = NOBODY - 1

# The package is imported as root, which may read it; then the process becomes that of an unprivileged user.
AS_USER = """
import os, sys, time, json, encodings.idna
import psutil, filelock
from pathlib import Path
from qlora_helpers.runs import claims, locks
from qlora_helpers.runs.folder import Run
uid, folder, home = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
os.setgroups([]); os.setgid(uid); os.setuid(uid); os.environ["QLORA_CACHE"] = home; os.chdir("/")
claims.FOLDERS = (folder,)
"""
HOLD = """
with locks.gpu_locks(Run(home + "/runs/theirs"), ["GPU-of-these-tests"]):
    print("held", flush=True)
    time.sleep(60)
"""
TRY = """
try:
    locks.refuse_busy_gpus(["GPU-of-these-tests"])
    with locks.gpu_locks(Run(home + "/runs/mine"), ["GPU-of-these-tests"]):
        print("free")
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def common(tmp_path, monkeypatch) -> Path:
    """A folder like /run/lock: root's, with the sticky bit, for everybody."""
    folder = tmp_path / "lock"
    folder.mkdir()
    folder.chmod(0o1777)
    open_way_to(tmp_path)
    monkeypatch.setattr(claims, "FOLDERS", (folder,))
    monkeypatch.delenv(claims.OFF)  # the suite makes none: several run on one machine
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        monkeypatch.setattr(claims, "_is_common", lambda path: path == folder)
    return folder


def command(tmp_path: Path, uid: int, code: str) -> list[str]:
    home = tmp_path / f"home-{uid}"
    home.mkdir(exist_ok=True)
    os.chown(home, uid, uid)
    home.chmod(0o700)
    return [sys.executable, "-c", AS_USER + code, str(uid), str(tmp_path / "lock"), str(home)]


def as_user(tmp_path: Path, uid: int, code: str) -> str:
    done = subprocess.run(command(tmp_path, uid, code), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def trainer(common, tmp_path) -> Iterator[subprocess.Popen]:
    """A trainer of one unprivileged user."""
    with subprocess.Popen(command(tmp_path, NOBODY, HOLD), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@needs_root
def test_two_users_see_each_others_trainings(trainer, common, tmp_path):
    told = as_user(tmp_path, OTHER, TRY)
    assert told.startswith("RunError the run 'theirs' of the user nobody")
    assert f"(process {trainer.pid}) is already training on {GPU}" in told and "QLORA_CLAIMS=off" in told
    assert list(common.iterdir()) and all(path.stat().st_uid == NOBODY for path in common.iterdir())
    trainer.kill()  # nobody can delete what it left, but the other user can train
    trainer.wait()
    assert len(list(common.iterdir())) == 1
    assert as_user(tmp_path, OTHER, TRY) == "free"
    assert as_user(tmp_path, NOBODY, TRY) == "free"
    assert not list(common.iterdir())  # its owner has cleared it away


@needs_root
def test_a_user_can_not_lift_or_take_anothers_claim(trainer, common, tmp_path):
    (claim,) = common.iterdir()
    code = f"""
claim = {str(claim)!r}
for what in (lambda: os.unlink(claim), lambda: open(claim, "r+"), lambda: os.rename(claim, claim + "x")):
    try: print("could", what())
    except OSError as error: print(type(error).__name__)
"""
    assert as_user(tmp_path, OTHER, code).split() == ["PermissionError"] * 3
    # a claim that names another user's process counts for nothing, and neither does one of a process that has ended
    forge = f"""
values = json.loads(open({str(claim)!r}).read())
values["gpu"] = "GPU-forged"
(folder / "qlora-gpu.forged").write_text(json.dumps(values))
(folder / "qlora-gpu.ended").write_text(json.dumps(values | {{"pid": os.getpid(), "began": 1.0}}))
(folder / "qlora-gpu.rubbish").write_text("[")
os.mkfifo(folder / "qlora-gpu.pipe")
os.symlink({str(claim)!r}, folder / "qlora-gpu.link")
print(claims.claim_on("GPU-forged"))
"""
    assert as_user(tmp_path, OTHER, forge) == "None"
    assert claims.claim_on("GPU-forged") is None and claims.claim_on(GPU).user == NOBODY


@needs_root
def test_a_claim_that_is_not_believed_can_be_passed_over(trainer, common, tmp_path):
    code = 'os.environ["QLORA_CLAIMS"] = "off"\n' + TRY
    assert as_user(tmp_path, OTHER, code) == "free"


def test_of_two_that_claim_at_once_never_both_go_on(common):
    """Each writes before it looks: whoever is later sees the other."""
    code = f"""
import sys, time
from pathlib import Path
from qlora_helpers.runs import claims
claims.FOLDERS = (Path({str(common)!r}),)
claims._is_common = lambda path: True
while time.time() < float(sys.argv[1]): pass
with claims.claimed("one", ({GPU!r},)) as other:
    print("taken" if other else "mine", flush=True)
    time.sleep(1)
"""
    at = str(time.time() + 1.5)
    both = [subprocess.Popen([sys.executable, "-c", code, at], stdout=subprocess.PIPE, text=True) for _ in "ab"]
    said = [process.communicate(timeout=60)[0].strip() for process in both]
    assert said.count("mine") <= 1 and set(said) <= {"mine", "taken"}


def test_a_claim_is_there_while_the_lock_is_held_and_its_own_process_is_not_in_its_way(common, tmp_path):
    run = Run(tmp_path / "runs" / "mine")
    with locks.gpu_locks(run, [GPU]):
        (path,) = common.iterdir()
        assert path.stat().st_mode & 0o777 == 0o644
        claim = claims.claim_on(GPU)
        assert (claim.run, claim.pid, claim.gpu) == ("mine", os.getpid(), GPU)
        assert claims.claim_on(GPU, not_of=os.getpid()) is None and claims.claim_on("GPU-free") is None
        assert locks.unlocked_gpus([GPU, "GPU-free"]) == ("GPU-free",)
        with pytest.raises(RunError, match="is already using"):
            locks.refuse_busy_gpus([GPU])
    assert not list(common.iterdir()) and claims.claim_on(GPU) is None


def test_what_can_not_be_seen_counts_as_long_as_it_is_touched(common, monkeypatch):
    """A trainer in another container that shares this folder."""
    with claims.claimed("there", (GPU,)):
        (path,) = common.iterdir()
        path.write_text(json.dumps(json.loads(path.read_text()) | {"namespace": "pid:[1]"}))
        assert claims.claim_on(GPU) is not None
        os.utime(path, (time.time() - claims.FRESH_S - 1,) * 2)
        assert claims.claim_on(GPU) is None
        claims.touch()
        assert claims.claim_on(GPU) is not None
        os.utime(path, (time.time() + 10 * claims.FRESH_S,) * 2)  # no claim for ever
        assert claims.claim_on(GPU) is None


def test_only_a_folder_of_roots_with_the_sticky_bit_is_trusted(tmp_path, monkeypatch):
    folder = tmp_path / "lock"
    folder.mkdir()
    for mode in (0o777, 0o1755):
        folder.chmod(mode)
        assert not claims._is_common(folder)
    (tmp_path / "link").symlink_to("/tmp")
    assert not claims._is_common(tmp_path / "link") and not claims._is_common(tmp_path / "none")
    monkeypatch.setattr(claims, "FOLDERS", (folder,))
    monkeypatch.delenv(claims.OFF)
    with claims.claimed("mine", (GPU,)) as other:
        assert other is None and not list(folder.iterdir())
