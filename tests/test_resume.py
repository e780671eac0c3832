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

KILLS = 20
SETTINGS = {
    "train.max_steps": 44, "train.learning_rate": 0.02, "train.logging_steps": 2, "train.save_steps": 3,
    "train.eval_steps": 11, "train.micro_batch_size": 1, "train.gradient_accumulation_steps": 2,
    "train.checkpoints_kept": 1, "train.tensorboard": "off", "adapter.lora_dropout": 0.1, "data.train_rows": 12,
    "data.eval_rows": 2, "data.test_rows": 1, "data.seq_len_tokens": 192,
}  # fmt: skip
WATCHED = ("loss", "learning_rate", "grad_norm", "eval_loss")


class Warm:
    """A process that has a model in memory and forks trainers of a run from it."""

    def __init__(self, root: Path) -> None:
        self.root, self.stderr = root, open(root / "stderr.txt", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import test_resume; test_resume.serve()", str(root)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
            stderr=self.stderr, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        assert self._read() == "ready"

    def _read(self) -> str:
        line = self.process.stdout.readline().strip()
        assert line, (self.root / "stderr.txt").read_text()[-3000:]
        return line

    def start(self, name: str) -> int:
        """Forks a trainer and returns its process id."""
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return int(self._read())

    def ended(self) -> int:
        """Waits for the trainer and returns its exit code, negative for a signal."""
        return int(self._read())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        self.stderr.close()


def serve() -> None:
    """What the warm process does: for every name that it reads, a forked child trains the run."""
    import torch

    from qlora_helpers import workflow

    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    loaded = workflow.load(workflow.open_run("whole", root=root), say=lambda text: None)
    print("ready")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.close(0)
            code = 1
            try:
                sys.stdout = sys.stderr
                workflow.train(workflow.open_run(line.strip(), root=root), loaded=loaded, show_progress=False)
                code = 0
            finally:
                os._exit(code)
        print(child)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def wait_for(there, *, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


@pytest.fixture(scope="module")
def chain(tmp_path_factory, cache):
    """Two runs of the same settings, one left alone, the other killed 20 times; and where the kills fell."""
    from qlora_helpers import workflow

    root = tmp_path_factory.mktemp("chain")
    runs = [workflow.open_run(name, profile="tiny", settings=SETTINGS, root=root) for name in ("whole", "killed")]
    whole, killed = runs
    warm = Warm(root)
    try:
        warm.start("whole")
        assert warm.ended() == 0, (root / "stderr.txt").read_text()[-3000:]
        lines = [line for line in whole.progress() if "loss" in line]
        step_s = (lines[-1]["time"] - lines[1]["time"]) / (lines[-1]["step"] - lines[1]["step"])
        draw = random.Random(20260101)
        moments = []
        for number in range(KILLS):
            session = killed.status().session
            process = warm.start("killed")
            moments.append(_kill(killed, process, session, draw, number, step_s))
            assert warm.ended() == -signal.SIGKILL, moments
            moments[-1] |= _left_behind(killed)
        warm.start("killed")
        assert warm.ended() == 0, (root / "stderr.txt").read_text()[-3000:]
    finally:
        warm.close()
    return whole, killed, moments


def _kill(run, process: int, session: int, draw: random.Random, number: int, step_s: float) -> dict:
    """Kills a trainer at a random moment: of its steps, of a save, or (every tenth) of its start."""
    unfinished = run.checkpoints_dir / ".unfinished"
    place = "start" if number % 10 == 9 else "save" if number % 2 else "steps"
    if place == "start":
        time.sleep(draw.uniform(0, 1.0))
    else:
        assert wait_for(lambda: run.status().session > session), "no session began"
        if place == "save":
            assert wait_for(unfinished.exists), "nothing was saved"
            time.sleep(draw.uniform(0, 0.03))
        else:
            if number % 4 == 0:
                run.request("save")
            time.sleep(draw.uniform(0.5, 5) * step_s)
    os.kill(process, signal.SIGKILL)
    return {"place": place}


def _left_behind(run) -> dict:
    return {"step": run.status().step, "half a checkpoint": (run.checkpoints_dir / ".unfinished").exists()}


def test_it_was_killed_twenty_times_also_while_saving(chain):
    _, killed, moments = chain
    assert len(moments) == KILLS
    assert sum(moment["half a checkpoint"] for moment in moments) >= 3, moments
    assert len({moment["step"] for moment in moments}) >= 5, moments  # it got on between the kills
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
    seen = [
        [(line["step"], {name: line[name] for name in WATCHED if name in line}) for line in run.progress()]
        for run in (whole, killed)
    ]
    assert seen[0] == seen[1]
    last = SETTINGS["train.max_steps"]
    assert [step for step, values in seen[1] if "loss" in values] == [*range(2, last + 1, 2)]
    assert [step for step, values in seen[1] if "eval_loss" in values] == [*range(11, last + 1, 11)]


def test_requests_to_save_were_heard(chain):
    _, killed, _ = chain
    answers = [request.answer for request in killed.requests()]
    assert len(answers) == KILLS // 4
    assert any(answer and answer.startswith("saved at step") for answer in answers), answers


def test_nothing_half_written_is_left_at_the_end(chain):
    _, killed, _ = chain
    assert [path.name for path in killed.checkpoints_dir.iterdir()] == [f"checkpoint-{SETTINGS['train.max_steps']}"]
    assert killed.status().state == "finished"
