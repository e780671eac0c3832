"""A run that is killed again and again ends as one that was never killed. Real processes, real SIGKILLs, at moments drawn by seed.

The killed processes are forked from a warm one, so that torch is imported and the model loaded once.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLOW = os.environ.get("QLORA_SLOW") == "1"  # `make slow`
KILLS, STEPS = (20, 56) if SLOW else (6, 28)
pytestmark = pytest.mark.slow
SETTINGS = {
    "train.max_steps": STEPS,
    "train.learning_rate": 0.02,
    "train.logging_steps": 2,
    "train.save_steps": 3,
    "train.eval_steps": 14,
    "train.micro_batch_size": 1,
    "train.gradient_accumulation_steps": 2,
    "train.checkpoints_kept": 1,
    "train.tensorboard": "off",
    "adapter.lora_dropout": 0.1,
    "data.train_rows": 12,
    "data.eval_rows": 2,
    "data.test_rows": 1,
    "data.seq_len_tokens": 192,
}
WATCHED = ("loss", "learning_rate", "grad_norm", "eval_loss")


class Warm:
    """A process that has a model in memory and forks trainers of a run from it."""

    def __init__(self, root: Path) -> None:
        self.root, self.stderr = root, open(root / "stderr.txt", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import test_resume; test_resume.serve()", str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
            stderr=self.stderr,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        line = self.process.stdout.readline().strip()
        assert line, self.said()
        return line

    def start(self, name: str) -> int:
        """Forks a trainer and returns its process id."""
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return int(self._read())

    def ended(self) -> int:
        """Waits for the trainer and returns its exit code, negative for a signal."""
        return int(self._read())

    def said(self) -> str:
        """The end of what the trainers printed."""
        return (self.root / "stderr.txt").read_text()[-3000:]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        self.stderr.close()


def serve() -> None:
    """What the warm process does: for every name that it reads, a forked child trains the run."""
    import torch

    from qlora_helpers import workflow  # loaded once, not in every child
    from qlora_helpers.data import prepare
    from qlora_helpers.evaluation import evaluate
    from qlora_helpers.model import lora
    from qlora_helpers.training import tensorboard_events, train

    assert all((prepare, evaluate, tensorboard_events, lora, train))
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    loaded = workflow.load(workflow.open_run("warm", profile="tiny", root=root), say=lambda text: None)
    print("ready")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.close(0)
            code = 1
            try:
                sys.stdout = sys.stderr
                code = _train(line.split(), root, loaded)
            except SystemExit as end:
                code = end.code
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(child)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _train(words: list[str], root: Path, loaded: object) -> int:
    """What a forked child does: `NAME`, `NAME command` (by the command line), `NAME 1000` (no file longer than so many bytes)."""
    import resource

    from qlora_helpers import __main__, workflow
    from qlora_helpers.base.errors import UserError

    name, *how = words
    if how == ["command"]:
        return __main__.main(["train", str(root / name)])
    if how:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(how[0]), int(how[0])))
    try:
        workflow.train(workflow.open_run(name, root=root), loaded=loaded, show_progress=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def wait_for(there, *, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


@pytest.fixture(scope="module")
def warm(tmp_path_factory, cache):
    warm = Warm(tmp_path_factory.mktemp("chain"))
    yield warm
    warm.close()


def new_run(warm, name: str, **changes):
    from qlora_helpers import workflow

    return workflow.open_run(name, profile="tiny", settings=SETTINGS | changes, root=warm.root)


@pytest.fixture(scope="module")
def chain(warm):
    """Two runs of the same settings, one left alone, the other killed again and again; and where the kills fell."""
    whole, killed = (new_run(warm, name) for name in ("whole", "killed"))
    warm.start("whole")
    assert warm.ended() == 0, warm.said()
    lines = [line for line in whole.progress() if "loss" in line]
    step_s = (lines[-1]["time"] - lines[1]["time"]) / (lines[-1]["step"] - lines[1]["step"])
    draw = random.Random(20260101)
    moments = []
    for number in range(KILLS):
        session = killed.status().session
        process = warm.start("killed")
        moments.append(_kill(killed, process, session, draw, number, step_s, warm.said))
        assert warm.ended() == -signal.SIGKILL, moments
        moments[-1] |= _left_behind(killed)
    warm.start("killed")
    assert warm.ended() == 0, warm.said()
    return whole, killed, moments


PLACES = ("later", "save", "start", "save", "steps", "save", "later", "save", "steps", "later")


def _kill(run, process: int, session: int, draw: random.Random, number: int, step_s: float, said) -> dict:
    """Kills a trainer at a random moment: of its first steps, of a save, of the steps after a save, or of its start."""
    unfinished = run.checkpoints_dir / ".unfinished"
    place = PLACES[number % len(PLACES)]
    if place == "start":
        time.sleep(draw.uniform(0, 1.0))
    else:
        old = set(run.checkpoints_dir.glob("checkpoint-*"))
        assert wait_for(lambda: run.status().session > session), f"no session began: {said()}"
        if number % 4 == 0:
            run.request("save")
        if place == "save":
            assert wait_for(unfinished.exists), "nothing was saved"
            time.sleep(draw.uniform(0, 0.03))
        else:
            if place == "later":
                assert wait_for(lambda: set(run.checkpoints_dir.glob("checkpoint-*")) - old), "nothing was saved"
            time.sleep(draw.uniform(0.2, 3) * step_s)
    os.kill(process, signal.SIGKILL)
    return {"place": place}


def _left_behind(run) -> dict:
    return {"step": run.status().step, "half a checkpoint": (run.checkpoints_dir / ".unfinished").exists()}


def test_it_was_killed_many_times_also_while_saving(chain):
    _, killed, moments = chain
    assert len(moments) == KILLS
    assert sum(moment["half a checkpoint"] for moment in moments) >= KILLS // 6, moments
    assert len({moment["step"] for moment in moments}) >= KILLS // 4 + 1, moments  # it got on between the kills
    assert moments[-1]["step"] < SETTINGS["train.max_steps"], moments
    # a kill may come before its session began
    assert KILLS - 2 <= killed.status().session <= KILLS + 1


def test_the_adapter_is_the_same_to_the_bit(chain):
    whole, killed, _ = chain
    one, other = (
        hashlib.sha256((run.adapter_dir / "adapter_model.safetensors").read_bytes()).hexdigest()
        for run in (whole, killed)
    )
    assert one == other


def test_its_readers_see_the_same_steps_without_gaps_or_doubles(chain):
    """The loss of a log whose steps a save and a kill came between, too: saves fall every third step, logs every second."""
    whole, killed, _ = chain
    assert seen(whole) == seen(killed)
    last = SETTINGS["train.max_steps"]
    assert [step for step, values in seen(killed) if "loss" in values] == [*range(2, last + 1, 2)]
    assert [step for step, values in seen(killed) if "eval_loss" in values] == [*range(14, last + 1, 14)]


def test_requests_to_save_were_received(chain):
    _, killed, _ = chain
    answers = [request.answer for request in killed.requests]
    assert len(answers) >= KILLS // 5
    assert any(answer and answer.startswith("saved at step") for answer in answers), answers


def test_nothing_half_written_is_left_at_the_end(chain):
    _, killed, _ = chain
    assert [path.name for path in killed.checkpoints_dir.iterdir()] == [f"checkpoint-{SETTINGS['train.max_steps']}"]
    assert killed.status().state == "finished"


# other ends


def seen(run) -> list[tuple]:
    return [(line["step"], {name: line[name] for name in WATCHED if name in line}) for line in run.progress()]


def test_sigterm_saves_within_a_step_and_says_so(warm, chain):
    """As a spot interruption or `docker stop` sends it; by the command line, whose exit code is a shell's for SIGTERM."""
    whole, *_ = chain
    run = new_run(warm, "terminated", **{"train.save_steps": 1000})
    process = warm.start("terminated command")
    assert wait_for(lambda: run.status().step >= 3)
    asked = time.monotonic()
    os.kill(process, signal.SIGTERM)
    assert warm.ended() == 128 + signal.SIGTERM, warm.said()
    assert time.monotonic() - asked < 10  # docker's grace period
    status = run.status()
    assert status.state == "stopped"
    assert status.exit_reason.startswith("stopped and saved: this process was told to end (SIGTERM)")
    assert [path.name for path in run.checkpoints_dir.iterdir()] == [f"checkpoint-{status.step}"]
    assert not (run.adapter_dir / "certificate.json").exists()  # to look at the base model takes long where it is large
    warm.start("terminated")
    assert warm.ended() == 0, warm.said()
    assert seen(run) == seen(whole)
    assert (run.adapter_dir / "certificate.json").exists()


def test_sigterm_before_the_first_step_ends_at_once(warm):
    run = new_run(warm, "early")
    process = warm.start("early command")
    assert wait_for(run.log_path.exists)
    os.kill(process, signal.SIGTERM)
    assert warm.ended() == 128 + signal.SIGTERM, warm.said()
    assert (run.status().state, run.status().exit_reason) in [("stopped", "interrupted"), ("new", None)]
    assert not list(run.checkpoints_dir.glob("checkpoint-*"))


def checkpoint_digest(checkpoint: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.iterdir()}


def finds_no_space_for_the_second_checkpoint(warm, run, limit: str) -> None:
    """Trains to the first checkpoint, then without space for another."""
    from qlora_helpers import workflow

    warm.start(f"{run.name}")
    assert warm.ended() == 0, warm.said()
    (checkpoint,) = run.checkpoints_dir.iterdir()
    before = checkpoint_digest(checkpoint)
    workflow.open_run(run.folder, settings={"train.max_steps": 9})
    warm.start(f"{run.name} {limit}".strip())
    assert warm.ended() == 2, warm.said()
    assert "error: checkpoint-6 could not be written (" in warm.said()
    assert "Free some space and train again; the run goes on from its last good checkpoint." in warm.said()
    assert run.status().state == "failed"
    assert "could not be written" in run.status().last_error
    assert [path.name for path in run.checkpoints_dir.iterdir()] == ["checkpoint-3"]
    assert checkpoint_digest(checkpoint) == before


def test_files_that_may_grow_no_further_leave_the_last_good_checkpoint(warm, chain):
    """The kernel itself refuses in the middle of `optimizer.pt` (RLIMIT_FSIZE): needs no rights."""
    whole, *_ = chain
    limit = (whole.checkpoints_dir / f"checkpoint-{STEPS}" / "optimizer.pt").stat().st_size - 4096
    run = new_run(warm, "limited", **{"train.max_steps": 3})
    finds_no_space_for_the_second_checkpoint(warm, run, str(limit))
    warm.start("limited")
    assert warm.ended() == 0, warm.said()
    assert run.status().state == "finished"


def test_a_full_disk_leaves_the_last_good_checkpoint(warm, chain):
    """A real one, of a few MiB, where this process may mount it."""
    from qlora_helpers.runs.folder import Run

    whole, *_ = chain
    size = sum(path.stat().st_size for path in (whole.checkpoints_dir / f"checkpoint-{STEPS}").iterdir())
    run = new_run(warm, "full", **{"train.max_steps": 3})
    run.checkpoints_dir.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={int(1.6 * size)}", "tmpfs", str(run.checkpoints_dir)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("this process may mount nothing")
    try:
        finds_no_space_for_the_second_checkpoint(warm, Run(run.folder), "")
        assert "No space left on device" in warm.said() or "were not written whole; 0.0 GiB" in warm.said()
    finally:
        subprocess.run(["umount", str(run.checkpoints_dir)], check=True)
