"""Experiment trackers get what TensorBoard gets, and one that is missing or fails costs nobody a training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qlora_helpers import workflow
from qlora_helpers.__main__ import main
from qlora_helpers.base.errors import ConfigError, RunError, UserError
from qlora_helpers.base.files import write_json
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.runs import launch
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.trackers import read_known
from qlora_helpers.training import trackers
from qlora_helpers.workflow import preparing

SETTINGS = ["train.max_steps=2", "data.train_rows=4", "data.eval_rows=1", "data.test_rows=1", "train.eval_steps=2"]
# Records what the package asks of Trackio; the real libraries are tested below, in `make slow`.
RECORDER = """
import json, os
def _write(*what):
    with open(os.environ["RECORDED"], "a") as file:
        print(json.dumps(what), file=file)
class Run:
    def log(self, values, step=None):
        if os.environ.get("FAILS") == str(step):
            raise ConnectionError("the server is gone")
        _write("log", step, values)
def init(project, **options):
    print("* chatter of a library")
    if os.environ.get("FAILS") == "init":
        raise PermissionError("nobody is logged in")
    _write("init", project, options["name"], options["config"]["train.max_steps"], options["resume"])
    return Run()
def finish():
    _write("finish")
"""


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Puts the recorder in Trackio's place; returns what it was asked so far."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "trackio.py").write_text(RECORDER)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("RECORDED", str(tmp_path / "asked.jsonl"))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    yield lambda: [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    sys.modules.pop("trackio", None)


def run_of(tmp_path: Path, *settings: str) -> Run:
    return workflow.open_run("mine", profile="tiny", settings=[*SETTINGS, *settings], root=tmp_path / "runs")


def test_a_tracker_that_is_not_installed_is_one_error_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    monkeypatch.setattr(preparing, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    assert main(["train", "mine", "--profile", "tiny", "--set", "train.report_to=wandb,mlflow"]) == 2
    message = capsys.readouterr().err
    assert (
        message.count("error: ") == 1
        and "Weights & Biases, MLflow" in message
        and "pip install wandb mlflow" in message
    )
    with pytest.raises(UserError, match="pip install"):
        launch.start(Run(Path("runs") / "mine"))


def test_an_unknown_tracker_is_a_wrong_setting():
    with pytest.raises(
        ConfigError, match="train.report_to: expected some of wandb, mlflow, trackio, or none, got comet"
    ):
        profile_config("tiny").with_settings(["train.report_to=wandb,comet"])
    assert profile_config("tiny").with_settings(["train.report_to=none"]).train.report_to is None


def test_it_gets_the_figures_of_tensorboard_under_their_names(tmp_path, recorded, capsys):
    run = run_of(tmp_path, "train.report_to=trackio")
    workflow.train(run, show_progress=False, say=lambda text: None)
    asked = recorded()
    assert asked[0] == ["init", "qlora_helpers", "mine", 2, "allow"] and asked[-1] == ["finish"]
    found: dict[str, list] = {}
    for _, step, values in asked[1:-1]:
        for name, value in values.items():
            found.setdefault(name, []).append((step, pytest.approx(value, rel=1e-6)))
    events = EventAccumulator(str(run.events_dir))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "eval/loss", "train/learning_rate"} <= set(tags) and set(found) == set(tags)
    for tag in tags:
        assert [(event.step, event.value) for event in events.Scalars(tag)] == found[tag]
    assert "chatter" not in capsys.readouterr().out and "chatter" in run.log_path.read_text()


def test_one_that_fails_later_is_left_out_and_training_goes_on(tmp_path, recorded, monkeypatch):
    monkeypatch.setenv("FAILS", "2")
    run = run_of(tmp_path, "train.report_to=trackio")
    assert workflow.train(run, show_progress=False, say=lambda text: None).steps == 2
    assert [each[1] for each in recorded() if each[0] == "log"] == [1]
    assert "Trackio takes no more figures: the server is gone" in run.log_path.read_text()
    assert run.status().state == "finished"


def test_one_that_can_t_be_opened_ends_it_before_the_model_is_loaded(tmp_path, recorded, monkeypatch):
    monkeypatch.setenv("FAILS", "init")
    monkeypatch.setattr(preparing, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises(RunError, match=r"Trackio can't be opened \(nobody is logged in\).*report_to=none"):
        workflow.train(run_of(tmp_path, "train.report_to=trackio"), show_progress=False, say=lambda text: None)


def test_scores_follow_at_the_run_s_step_and_cost_no_evaluation(tmp_path, recorded, monkeypatch):
    run = run_of(tmp_path, "train.report_to=trackio")
    run.set_status(state="finished", step=2)
    trackers.report_scores(run, run.config(), {"rouge_l_tuned": 30.0})
    assert recorded()[1:] == [["log", 2, {"scores/rouge_l_tuned": 30.0}], ["finish"]]
    monkeypatch.setenv("FAILS", "init")
    trackers.report_scores(run, run.config(), {"rouge_l_tuned": 30.0})


def test_no_folder_of_this_machine_is_sent(tmp_path):
    config = profile_config("tiny").with_settings({"data.source": str(tmp_path / "secret-project" / "rows.jsonl")})
    assert trackers._settings(config)["data.source"] == "rows.jsonl"


def test_a_number_from_somebody_else_s_run_folder_is_checked(tmp_path):
    run = run_of(tmp_path)
    write_json(run.folder / "trackers.json", {"mlflow": "../../x", "wandb": None})
    with pytest.raises(RunError, match="damaged"):
        read_known(run)


READ = {
    "mlflow": """
        import mlflow
        client = mlflow.MlflowClient()
        (experiment,) = [each for each in client.search_experiments() if each.name == "qlora_helpers"]
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.run_name == "mine" and run.info.status == "FINISHED", run.info
        assert run.data.params["adapter.r"] == "8"
        found = {each.step: each.value for each in client.get_metric_history(run.info.run_id, "train/loss")}
        scores = [name for name in run.data.metrics if name.startswith("scores/")]
    """,
    "trackio": """
        from trackio.sqlite_storage import SQLiteStorage
        assert SQLiteStorage.get_runs("qlora_helpers") == ["mine"]
        lines = SQLiteStorage.get_logs("qlora_helpers", "mine")
        found = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
        scores = [name for line in lines for name in line if name.startswith("scores/")]
    """,
    "wandb": """
        import glob
        from wandb.proto import wandb_internal_pb2 as pb
        from wandb.sdk.internal.datastore import DataStore
        found, scores = {}, []
        for path in sorted(glob.glob("wandb/offline-run-*/*.wandb")):
            store = DataStore()
            store.open_for_scan(path)
            while (data := store.scan_data()) is not None:
                record = pb.Record()
                record.ParseFromString(data)
                items = {(each.key or "/".join(each.nested_key)): each.value_json for each in record.history.item}
                if "train/loss" in items:
                    found[int(items["optimizer_step"])] = float(items["train/loss"])
                scores += [name for name in items if name.startswith("scores/")]
    """,
}


@pytest.mark.only_slow
@pytest.mark.parametrize("name", READ)
def test_the_real_library_works_offline_over_two_sessions(tmp_path, name):
    """Installs it into a folder of the test's own, unless QLORA_TRACKERS names one where it lies."""
    folder = os.environ.get("QLORA_TRACKERS") or str(tmp_path / "site")
    if "QLORA_TRACKERS" not in os.environ:
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", folder, name]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"{name} can't be installed here")
    paths = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parents[2]), folder])
    environment = os.environ | {
        "PYTHONPATH": paths,
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }
    settings = [
        part
        for each in [*SETTINGS, f"train.report_to={name}", "evaluation.max_new_tokens=2"]
        for part in ("--set", each)
    ]
    for command in (
        ["train", "mine", "--profile", "tiny", *settings],
        ["train", "mine", "--set", "train.max_steps=3"],
        ["evaluate", "mine", "--quiet"],
    ):
        arguments = [sys.executable, "-m", "qlora_helpers", *command]
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    code = textwrap.dedent(READ[name]) + "\nimport json; print(json.dumps([found, scores]))"
    read = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert read.returncode == 0, read.stderr[-3000:]
    found, scores = json.loads(read.stdout.splitlines()[-1])
    logged = {str(line["step"]): line["loss"] for line in Run(tmp_path / "runs" / "mine").progress() if "loss" in line}
    assert found == pytest.approx(logged) and set(found) == {"1", "2", "3"}
    assert "scores/rouge_l_tuned" in scores
