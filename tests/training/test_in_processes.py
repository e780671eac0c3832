"""A run that is started as one process, on a machine on which the plan shares the work among several."""

from __future__ import annotations

import json

import pytest

from qlora_helpers import __main__ as command_line
from qlora_helpers import workflow
from qlora_helpers.base.errors import Interrupted, RunError
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.machine import telemetry
from qlora_helpers.machine.hardware import parse_gpus
from qlora_helpers.planning import choosing, run_plan, started, starting
from qlora_helpers.runs import launch, locks, ranks
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.plan_file import add_to_plan, read_plan
from qlora_helpers.training import in_processes
from qlora_helpers.workflow import training as workflow_training

CARDS = ("GPU-a", "GPU-b", "GPU-c", "GPU-d")
STEP = ("train.micro_batch_size", "train.gradient_accumulation_steps")


@pytest.fixture
def g5_12xlarge(monkeypatch, tmp_path):
    """Makes this an ml.g5.12xlarge inside SageMaker: four A10G, at the catalogue's price."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("SM_CURRENT_INSTANCE_TYPE", "ml.g5.12xlarge")
    monkeypatch.setattr(locks, "visible_gpus", lambda: CARDS)
    monkeypatch.setattr(locks, "unlocked_gpus", lambda gpus: tuple(gpus))
    monkeypatch.setattr(locks, "refuse_busy_gpus", lambda gpus: None)
    monkeypatch.setattr(telemetry, "used_shares", lambda: dict.fromkeys(CARDS, 0.02))
    for module in (choosing, run_plan):
        monkeypatch.setattr(module, "this_machine", lambda price=None: parse_gpus("4xA10G", price))


@pytest.fixture
def in_ranks(monkeypatch) -> list[tuple[list[str], int]]:
    """Records what would be started, instead."""
    found: list[tuple[list[str], int]] = []
    monkeypatch.setattr(starting, "run_ranks", lambda command, processes: found.append((command, processes)) or 0)
    monkeypatch.setattr(ranks, "run_ranks", lambda command, processes: found.append((command, processes)) or 0)
    return found


def plan_on_this_machine():
    """The way of the plan for the profile, with its figures, as the command line has printed it for the machine by its name."""
    found = run_plan.plan_run(profile_config("falcon-40b"), gpus="ml.g5.12xlarge")
    return found.choice


def test_the_command_train_takes_the_way_of_the_plan_with_its_time_and_price(g5_12xlarge, in_ranks, capsys):
    assert command_line.main(["train", "mine", "--profile", "falcon-40b", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    choice = plan_on_this_machine()
    assert choice.share == "shards" and choice.processes == 4
    ((command, processes),) = in_ranks
    assert processes == 4 and command[-1] == "--quiet" and "--processes" not in command
    run = Run("runs/mine")
    assert run.config().train.share == "shards"
    micro, passes = (started.setting_of(run.config(), name) for name in STEP)
    assert micro * passes * 4 == 8
    assert command_line.main(["train", "mine"]) == 0
    said = capsys.readouterr().out
    assert "shards, 4 GPUs" in said and "tokens/s" in said
    why = read_plan(run).launched.why
    planned = run_plan.plan_run(profile_config("falcon-40b"))
    assert planned.choice.share == "shards" and planned.choice.dollars == pytest.approx(choice.dollars)
    assert why in said.replace("\n", " ") and "$" in why and " min " in why
    hours = float(why.split("$")[1].split()[0]) / planned.hardware.price_usd_per_hour
    assert hours == pytest.approx(choice.seconds / 3600, rel=0.05)  # a little less of the card is planned to be filled


@pytest.mark.parametrize("by_hand", ["spread", "one"])
def test_a_way_that_was_set_by_hand_is_kept(by_hand, g5_12xlarge, in_ranks, monkeypatch):
    trained: list[str] = []
    monkeypatch.setattr(workflow, "train", lambda run, **options: trained.append(run.config().train.share))
    assert command_line.main(["train", "mine", "--profile", "falcon-40b", "--set", f"train.share={by_hand}"]) == 0
    assert command_line.main(["train", "ours", "--profile", "falcon-40b", "--processes", "1"]) == 0
    assert trained == [by_hand, "auto"] and in_ranks == []


def test_processes_of_a_training_do_not_start_others(g5_12xlarge, monkeypatch, tmp_path):
    run = Run(tmp_path / "runs" / "mine")
    run.save_config(profile_config("falcon-40b"))
    assert in_processes.several_by_plan(run).processes == 4
    monkeypatch.setenv("RANK", "0")
    assert in_processes.several_by_plan(run) is None
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(locks, "visible_gpus", lambda: CARDS[:1])
    assert in_processes.several_by_plan(run) is None
    run.save_config(run.config().with_settings(["model.device_map=cpu"]))
    monkeypatch.setattr(locks, "visible_gpus", lambda: CARDS)
    assert in_processes.several_by_plan(run) is None


def test_loading_in_one_process_says_what_the_plan_would_do(g5_12xlarge, tmp_path):
    run = Run(tmp_path / "runs" / "mine")
    run.save_config(profile_config("falcon-40b"))
    remark = in_processes.remark_on_loading(run)
    assert "shards, 4 GPUs" in remark and "$" in remark and "ql.start(run) trains so, in 4 processes" in remark
    run.save_config(run.config().with_settings(["train.share=spread"]))
    assert in_processes.remark_on_loading(run) == ""
    run.save_config(run.config().with_settings(["train.share=auto"]))
    run.set_status(state="finished")  # it is loaded for answers
    assert in_processes.remark_on_loading(run) == ""


@pytest.fixture
def background(g5_12xlarge, monkeypatch, tmp_path):
    """A run whose started processes do at once what is asked of them here."""
    run = Run(tmp_path / "runs" / "mine")
    run.save_config(profile_config("falcon-40b"))
    monkeypatch.setattr(in_processes, "EVERY_S", 0.0)

    def does(*moments):
        left = list(moments)

        def detached(run, command, processes, gpus=None):
            run.open_session()
            return 1

        monkeypatch.setattr(launch, "_start_detached", detached)
        return run, lambda: left.pop(0)(run)

    return does


def finished(run: Run) -> None:
    measured = {"peak_gib": {"cuda:0": 20.0}, "seconds": 60.0, "tokens_per_s": 800.0, "steps": 7, "machine": "4 x A10G"}
    counts = dict.fromkeys(("trainable_parameters", "parameters", "published_parameters"), 1)
    add_to_plan(run, measured=measured | counts | {"versions": {}})
    with run.progress_path.open("a") as lines:
        lines.write(json.dumps({"session": 1, "step": 7, "loss": 1.5}) + "\n")
    run.set_status(state="finished", step=7)


def test_train_in_a_cell_starts_the_processes_and_returns_how_they_ended(background):
    looked: list[int] = []
    run, redraw = background(lambda run: looked.append(1), finished)
    said: list[str] = []
    result = in_processes.train_in_processes(run, redraw=redraw, say=said.append)
    assert (result.steps, result.new_steps, result.loss, result.tokens_per_s) == (7, 7, 1.5, 800.0) and looked == [1]
    assert "shards, 4 GPUs" in said[0] and not result.stopped


def test_what_fails_in_the_processes_fails_in_the_cell(background):
    run, redraw = background(
        lambda run: run.set_status(state="failed", last_error="OutOfMemory: out of memory (backward)")
    )
    with pytest.raises(RunError, match="failed: OutOfMemory: out of memory"):
        in_processes.train_in_processes(run, redraw=redraw, say=lambda text: None)


def test_an_interrupted_cell_has_the_processes_save_and_stop(background):
    def interrupted(run: Run) -> None:
        raise KeyboardInterrupt

    run, redraw = background(interrupted)
    with pytest.raises(Interrupted, match="asked to save and stop"):
        in_processes.train_in_processes(run, redraw=redraw, say=lambda text: None)
    assert [each.kind for each in run.requests] == ["stop"]


def test_workflow_train_goes_there_unless_a_model_is_loaded(g5_12xlarge, monkeypatch, tmp_path):
    run = Run(tmp_path / "runs" / "mine")
    run.save_config(profile_config("falcon-40b"))
    monkeypatch.setattr(workflow_training, "train_in_processes", lambda run, **options: "there")
    assert workflow.train(run, show_progress=False) == "there"

    def opened(*arguments, **options):
        raise RuntimeError("here")

    monkeypatch.setattr(workflow_training, "_session", opened)
    for options in ({"in_this_process": True}, {"loaded": object()}, {"model": object()}):
        with pytest.raises(RuntimeError, match="here"):
            workflow.train(run, show_progress=False, **options)
