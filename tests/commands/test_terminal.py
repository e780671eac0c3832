"""What a command prints, on a terminal, into a pipe, and for a program."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import warnings
from pathlib import Path

import pytest

from qlora_helpers.__main__ import main, parser
from qlora_helpers.base import phases
from qlora_helpers.base.phases import LossTable
from qlora_helpers.commands import terminal

TINY = [
    part
    for setting in (
        "train.max_steps=3",
        "data.train_rows=4",
        "data.eval_rows=1",
        "data.test_rows=1",
        "train.eval_steps=2",
    )
    for part in ("--set", setting)
]
SHOWN_STEP_BY_STEP = {"train", "launch", "evaluate", "demo"}
CHATTER = (
    *("Loading weights", "Saving the dataset", "Writing model shards", "{'loss'", "'train_runtime'", "it/s"),
    *("FutureWarning", "UserWarning", "DeprecationWarning"),
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def on_a_terminal(*arguments: str, cwd: Path) -> tuple[int, str]:
    """A command's exit code and what it writes to a terminal 100 columns wide."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command = [sys.executable, "-m", "qlora_helpers", *arguments]
    with subprocess.Popen(command, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        parts = []
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            parts.append(part)
        os.close(ours)
        return process.wait(60), b"".join(parts).decode()


def as_seen(text: str) -> list[str]:
    """The lines that stay on a terminal: a line that is written over keeps its last state."""
    lines = text.replace("\x1b[A", "").replace("\r\n", "\n").split("\n")
    return [line for line in (each.rstrip().split("\r")[-1].rstrip() for each in lines) if line]


def test_a_training_on_a_terminal_is_a_bar_and_a_table_and_no_chatter(here):
    code, text = on_a_terminal("train", "mine", "--profile", "tiny", *TINY, cwd=here)
    assert code == 0, text
    assert not [word for word in CHATTER if word in text]
    lines = as_seen(text)
    (head,) = [number for number, line in enumerate(lines) if "training loss" in line]
    assert lines[head] == LossTable.HEAD
    figures = [line for line in lines[head + 1 :] if re.match(r" +\d+ ", line)]
    assert [line.split()[0] for line in figures] == ["1", "2", "2", "3", "3"]
    (bar,) = [line for line in lines if line.startswith("training ")]
    assert re.search(r"█+.* 3 of 3 steps +\d+:\d+, 00:00 left$", bar)
    assert lines[-2].startswith("finished after 3 steps: loss ")


def test_for_a_program_it_is_an_object_a_line(here, capsys):
    assert main(["train", "mine", "--profile", "tiny", *TINY, "--json"]) == 0
    printed = capsys.readouterr()
    events = [json.loads(line) for line in printed.out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[-1] == "result" and set(kinds) == {"phase", "line", "step", "result"}
    assert {"loading weights", "labelling", "training"} <= {each.get("name") for each in events}
    steps = [event for event in events if event["event"] == "step"]
    assert [each["step"] for each in steps if "loss" in each] == [1, 2, 3]
    assert [each["step"] for each in steps if "eval_loss" in each] == [2, 3]
    result = events[-1]
    assert (result["command"], result["steps"], result["stopped"]) == ("train", 3, False)
    assert set(result) - {"event", "command"} <= set(terminal.RESULTS)
    promised = (Path(__file__).parents[2] / "docs" / "terminal.md").read_text(encoding="utf-8")
    assert not [key for event in events for key in event if key != "event" and f"`{key}`" not in promised]

    assert main(["train", "mine", "--json", "--set", "adapter.r=4"]) == 2
    printed = capsys.readouterr()
    error = json.loads(printed.out.splitlines()[-1])
    assert error["event"] == "error" and "adapter.r: 8 -> 4" in error["text"] and error["next_step"]
    assert "error: " in printed.err

    assert main(["train", "mine", "--quiet"]) == 0  # all steps are done: quick
    assert capsys.readouterr().out == ""
    assert main(["train", "mine"]) == 0
    piped = capsys.readouterr()
    assert "all 3 steps were done before" in piped.out and "\r" not in piped.out + piped.err
    assert not [word for word in CHATTER if word in piped.out + piped.err]


def test_launch_shows_and_ends_as_train_does(here, capsys, monkeypatch):
    shown = terminal.JsonShow.step

    def interrupting(show, values):
        shown(show, values)
        if values["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    start = ["launch", "mine", "--profile", "tiny", *TINY, "--set", "train.fast_step=false"]
    with monkeypatch.context() as patched:
        patched.setattr(terminal.JsonShow, "step", interrupting)
        assert main([*start, "--json"]) == 130
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"phase", "line", "step", "result"} == {each["event"] for each in events}
    assert (events[-1]["command"], events[-1]["stopped"]) == ("train", True) and events[-1]["steps"] < 3
    assert main(["launch", "mine", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["launch", "mine", "--json", "--share", "nothing"]) == 2
    assert json.loads(capsys.readouterr().out)["event"] == "error"


@pytest.mark.only_slow
def test_two_launched_processes_print_as_one(here, capfd):
    assert main(["launch", "mine", "--profile", "tiny", *TINY, "--gpus", "2", "--json"]) == 0
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert "2 processes" in events[0]["text"]
    (result,) = [each for each in events if each["event"] == "result"]
    assert (result["steps"], result["stopped"]) == (3, False)
    assert [each["step"] for each in events if each["event"] == "step" and "loss" in each] == [1, 2, 3]


def test_a_library_s_warning_goes_to_the_log_and_ours_to_the_terminal(capsys, caplog):
    caplog.set_level("INFO", logger="qlora_helpers")
    with terminal.shown(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = terminal._showwarning
        warnings.warn_explicit("theirs", FutureWarning, "/x/site-packages/torch/y.py", 3)
        warnings.warn_explicit("ours\x1b[31m", UserWarning, str(Path(terminal.__file__)), 3)
        warnings.warn_explicit("of a script", UserWarning, "/home/somebody/script.py", 3)
    assert capsys.readouterr().err == "warning: ours\nwarning: of a script\n"
    assert "y.py:3: FutureWarning: theirs" in caplog.text


def test_every_command_and_every_option_says_what_it_does():
    """An option without a text, and an import that takes seconds, would be noticed only by a person who asks for help."""
    (commands,) = (action for action in parser()._actions if action.dest == "command")
    assert len(commands.choices) >= 16
    silent = [
        f"{name} {action.dest}"
        for name, each in commands.choices.items()
        for action in each._actions
        if not action.help
    ]
    assert not silent
    assert {name for name, each in commands.choices.items() if "--quiet" in each.format_usage()} == SHOWN_STEP_BY_STEP
    code = "import sys; from qlora_helpers.__main__ import parser; parser(); print(sorted(set(sys.modules) & {names}))"
    names = {"torch", "transformers", "numpy", "pandas", "tqdm", "qlora_helpers.workflow"}
    done = subprocess.run([sys.executable, "-c", code.format(names=names)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_nothing_of_it_stays_when_the_command_has_ended(monkeypatch):
    before = warnings.showwarning, dict(os.environ), phases.current()
    with terminal.shown(quiet=True) as show:
        assert phases.current() is show
    assert (warnings.showwarning, dict(os.environ), phases.current()) == before


def test_the_table_has_every_evaluation_and_some_of_the_other_steps():
    table = LossTable(1000)
    lines = [line for step in range(1, 1001) for line in table.lines({"step": step, "loss": 2.0, "seconds_left": 9.0})]
    assert len(lines) == 1 + 21 and lines[-1].split()[0] == "1,000"
    (line,) = table.lines({"step": 777, "eval_loss": 1.5})
    assert line.split() == ["777", "1.500"]


def test_a_long_phase_says_in_a_file_how_far_it_is(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.LineShow().bar("labelling", total=100, unit=" rows") as bar:
        for _ in range(100):
            now[0] += 1.0
            bar.update(1)
    assert capsys.readouterr().out.splitlines() == [
        "labelling: 30 of 100 rows, about 1 min 10 s left",
        "labelling: 60 of 100 rows, about 40 s left",
        "labelling: 90 of 100 rows, about 10 s left",
        "labelling: 100 of 100 rows in 1 min 40 s",
    ]


def test_the_first_of_many_says_nothing_of_what_is_left(capsys, monkeypatch):
    """It takes longest: a model was warmed up in it."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.LineShow().bar("answering", total=120, unit=" answers") as bar:
        for seconds in (31.0, *[1.0] * 35):
            now[0] += seconds
            bar.update(1)
    assert capsys.readouterr().out.splitlines() == [
        "answering: 1 of 120 answers",
        "answering: 31 of 120 answers, about 2 min 55 s left",
        "answering: 36 of 120 answers in 1 min 06 s",
    ]


def test_of_several_processes_the_first_alone_prints(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert type(terminal.chosen()) is terminal.QuietShow and type(terminal.chosen(as_json=True)) is terminal.QuietShow
