"""A whole run on the tiny Falcon: its settings, its lock, its state whatever happens, and the adapter that comes back."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_helpers import workflow
from qlora_helpers.base.errors import ConfigError, Interrupted, ModelError, RunError, UserError
from qlora_helpers.base.files import read_json
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.evaluation.comparison import ReloadCheck
from qlora_helpers.export import adapter
from qlora_helpers.runs import launch, session
from qlora_helpers.runs.folder import Run
from qlora_helpers.workflow import check_reload, existing_run, open_run, preparing, training

SETTINGS = [
    "train.max_steps=2",
    "train.learning_rate=0.05",
    "train.eval_steps=2",
    "train.save_steps=1",
    "data.train_rows=4",
    "data.eval_rows=2",
    "data.test_rows=2",
    "data.seq_len_tokens=256",
    "evaluation.max_new_tokens=4",
]


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache, torch):
    """A run that was trained, and its model in memory. Shared: look, don't touch."""
    run = open_run("whole", profile="tiny", settings=SETTINGS, root=tmp_path_factory.mktemp("runs"))
    loaded = workflow.load(run, say=quiet)
    model = workflow.add_adapters(run, loaded)
    result = workflow.train(run, model=model, loaded=loaded, show_progress=False, say=quiet)
    return run, model, loaded, result


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the run's folder, to be spoilt."""
    run, *_ = whole
    return Run(shutil.copytree(run.folder, tmp_path / "runs" / "copy"))


# opening


def test_a_new_run_starts_from_a_profile(tmp_path, monkeypatch):
    run = open_run("a", profile="tiny", settings=["train.max_steps=7"], root=tmp_path)
    assert run.folder == tmp_path / "a"
    assert run.config() == profile_config("tiny").with_settings(["train.max_steps=7"])
    assert open_run("b", root=tmp_path).config().profile == "demo"
    monkeypatch.setenv("QLORA_PROFILE", "tiny")
    assert open_run("c", root=tmp_path).config().profile == "tiny"
    monkeypatch.setenv("QLORA_PROFILE", "")
    assert open_run("d", root=tmp_path).config().profile == "demo"
    monkeypatch.setenv("QLORA_PROFILE", "large")
    with pytest.raises(ConfigError, match="expected one of tiny, demo, falcon-40b, got 'large'"):
        open_run("e", root=tmp_path)
    assert not (tmp_path / "e").exists()


def test_an_existing_run_keeps_its_settings(tmp_path, monkeypatch):
    first = open_run("a", profile="tiny", settings=["train.max_steps=7"], root=tmp_path).config()
    monkeypatch.setenv("QLORA_PROFILE", "demo")
    assert open_run("a", root=tmp_path).config() == first
    assert open_run("a", profile="tiny", root=tmp_path).config() == first
    assert open_run("a", settings={"train.seed": 1}, root=tmp_path).config() == first.with_settings(["train.seed=1"])
    with pytest.raises(ConfigError):
        open_run("a", settings={"train.sed": 1}, root=tmp_path)
    assert open_run("a", profile="falcon-40b", root=tmp_path).config() == profile_config("falcon-40b")


@pytest.mark.parametrize("name", ["", ".", "..", "./", "../", "a/..", ".hidden", "a b", "-x"])
def test_a_name_cannot_be_the_folder_of_all_runs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for call in (open_run, existing_run):
        with pytest.raises(RunError, match="this can't be the name of a run"):
            call(name, root=tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_that_holds_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert workflow.runs_root() == Path("runs")
    assert open_run("a", profile="tiny").folder == Path("runs/a")
    assert open_run("elsewhere/b", profile="tiny").folder == Path("elsewhere/b")  # a path is a path
    monkeypatch.setenv("QLORA_RUNS", str(tmp_path / "mine"))
    assert open_run("a", profile="tiny").folder == tmp_path / "mine" / "a"
    assert open_run("a", profile="tiny", root="given").folder == Path("given/a")


def test_the_folder_of_runs_may_be_above_this_one(tmp_path, monkeypatch):
    """And its runs open again by their own folder, here and in the process that trains them."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = open_run("a", profile="tiny", root="../mine")
    assert run.folder == tmp_path / "mine" / "a"
    assert existing_run(run.folder).folder == run.folder
    assert existing_run(launch.train_command(run)[-1]).folder == run.folder
    assert open_run(f"{tmp_path}/here/../mine/a").folder == run.folder
    assert Run("../mine/a").folder == run.folder


def test_a_missing_run_is_reported_with_the_existing_ones(tmp_path):
    for name in ("b", "a"):
        open_run(name, profile="tiny", root=tmp_path)
    with pytest.raises(RunError, match=r"there is no run 'c'; got these runs: a, b\. Train one first\."):
        existing_run("c", root=tmp_path)
    assert existing_run("a", root=tmp_path).name == "a"


# what can change, and when


def test_after_training_model_adapter_and_data_are_fixed(copy):
    before = copy.config_path.read_bytes()
    with pytest.raises(RunError) as caught:
        open_run(copy.folder, settings=["adapter.r=16", "data.loss_on=all", "train.max_steps=9"])
    assert "adapter.r: 8 -> 16; data.loss_on: 'answer' -> 'all'" in str(caught.value)
    assert "train.max_steps" not in str(caught.value)
    assert "another name" in str(caught.value)
    assert copy.config_path.read_bytes() == before
    with pytest.raises(RunError, match="model.name: 'random:falcon-tiny' -> "):
        open_run(copy.folder, profile="demo")
    open_run(copy.folder, settings=["train.max_steps=9", "evaluation.batch_size=2", "adapter.r=8"])
    assert copy.config().train.max_steps == 9


@pytest.mark.parametrize("what", ["adapter", "checkpoints"])
def test_a_checkpoint_or_an_adapter_fixes_the_settings(copy, what):
    shutil.rmtree(copy.folder / what)
    with pytest.raises(RunError, match="has trained already"):
        open_run(copy.folder, settings=["adapter.r=16"])


def test_before_the_first_checkpoint_nothing_is_fixed(tmp_path):
    """Training that failed in its first step, for want of memory say, leaves an empty folder behind."""
    run = open_run("a", profile="tiny", root=tmp_path)
    run.checkpoints_dir.mkdir()
    open_run("a", settings=["data.seq_len_tokens=64"], root=tmp_path)
    assert run.config().data.seq_len_tokens == 64


# training


def test_a_whole_run(whole):
    run, model, _, result = whole
    assert (result.steps, result.stopped) == (2, False)
    status = run.status()
    assert (status.state, status.step, status.session) == ("finished", 2, 1)
    assert status.exit_reason == "all steps are done"
    there = {path.name for path in run.folder.iterdir()}
    assert {
        "config.json",
        "plan.json",
        "data",
        "checkpoints",
        "status.json",
        "progress.jsonl",
        "events",
        "log.txt",
        "adapter",
    } <= there
    measured = read_json(run.plan_path)["measured"]
    assert measured["steps"] == 2
    assert measured["trainable_parameters"] == sum(w.numel() for w in model.parameters() if w.requires_grad)
    assert measured["versions"]["torch"]
    assert not [path for path in run.folder.rglob("*") if path.suffix in (".bin", ".pkl")]


def test_what_is_saved_with_the_adapter(whole):
    run, *_ = whole
    settings = read_json(run.adapter_dir / "adapter_config.json")
    assert settings["base_model_name_or_path"] == "random:falcon-tiny"
    assert settings["r"] == 8
    assert sorted(settings["target_modules"]) == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
    assert read_json(run.adapter_dir / "config.json") == run.config().to_dict()
    card = (run.adapter_dir / "README.md").read_text()
    assert "base_model: random:falcon-tiny" in card
    assert "4-bit NF4" in card
    for path in run.adapter_dir.iterdir():  # it may be published
        if path.suffix in (".json", ".md"):
            assert os.path.expanduser("~") not in path.read_text() or path.name == "tokenizer.json"
            assert str(run.folder) not in path.read_text()


def test_a_second_trainer_is_refused(whole, copy):
    from filelock import FileLock

    _, model, loaded, _ = whole
    before = copy.status_path.read_bytes()
    with FileLock(copy.folder / ".lock"), pytest.raises(RunError, match="another process is training 'copy'"):
        workflow.train(copy, model=model, loaded=loaded, say=quiet)
    assert copy.status_path.read_bytes() == before  # the first one's
    with FileLock(copy.folder / ".lock", timeout=0):
        pass


def test_the_lock_of_a_killed_process_is_released(copy):
    code = (
        "import sys, time\nfrom filelock import FileLock\nFileLock(sys.argv[1]).acquire()\n"
        "print('locked', flush=True)\ntime.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(copy.folder / ".lock")], stdout=subprocess.PIPE)
    assert holder.stdout.readline()
    holder.kill()
    holder.communicate()
    with session.training_session(copy):
        pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RunError("no good"), "an error"), (ZeroDivisionError("oops"), "an error")],
)
def test_training_that_fails_leaves_a_true_status(copy, whole, monkeypatch, error, reason):
    import logging

    from qlora_helpers.training import train

    def failing(*args, **kwargs):
        copy.start_session(2, 0)
        raise error

    _, model, loaded, _ = whole
    handlers = list(logging.getLogger("qlora_helpers").handlers)
    monkeypatch.setattr(train, "train", failing)
    with pytest.raises(type(error)):
        workflow.train(copy, model=model, loaded=loaded, say=quiet)
    status = copy.status()
    assert (status.state, status.exit_reason) == ("failed", reason)
    assert status.last_error.startswith(type(error).__name__)
    assert str(error) in status.last_error
    assert type(error).__name__ in copy.log_path.read_text()
    assert logging.getLogger("qlora_helpers").handlers == handlers
    with pytest.raises(RunError, match="is failed"):
        copy.request("stop")


def test_an_interrupt_leaves_a_run_that_is_stopped_and_one_line(copy, whole, monkeypatch):
    from qlora_helpers.training import train

    def interrupted(*args, **kwargs):
        copy.start_session(2, 0)
        raise KeyboardInterrupt

    _, model, loaded, _ = whole
    monkeypatch.setattr(train, "train", interrupted)
    with pytest.raises(Interrupted, match="train was interrupted; what copy had saved is intact"):
        workflow.train(copy, model=model, loaded=loaded, say=quiet)
    status = copy.status()
    assert (status.state, status.exit_reason, status.last_error) == ("stopped", "interrupted", None)


def test_a_certificate_that_failed_is_seen_where_a_person_looks(copy, whole, monkeypatch):
    from qlora_helpers.views.monitor import watch_once

    _, model, loaded, _ = whole
    phases = []

    def certify(trained, data):
        phases.append(copy.status().phase)
        return dataclasses.replace(adapter.certify(trained, data), same_answers=0)

    monkeypatch.setattr(training, "certify", certify)
    said = []
    workflow.train(copy, model=model, loaded=loaded, say=said.append)
    assert phases == ["certifying"]
    failed = "the saved adapter's certificate failed: 2 of 2 answers of the saved adapter differ"
    assert said[-1].startswith(f"WARNING: {failed}. Train the run again")
    assert copy.status().state == "finished"
    assert f"warning: {failed}" in repr(watch_once(copy))


def test_what_needs_no_model_is_refused_before_one_is_loaded(tmp_path, copy, monkeypatch):
    def load(run, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(preparing, "load", load)
    settings = ["train.matmul_dtype=fp8", "train.fast_step=false"]
    with pytest.raises(ModelError, match="FP8 is a part of the fast step"):
        workflow.train(open_run("fp8", profile="tiny", settings=settings, root=tmp_path), say=quiet)
    with pytest.raises(RunError, match="is not there yet"):
        workflow.evaluate(open_run("untrained", profile="tiny", root=tmp_path), say=quiet)
    with pytest.raises(UserError, match="fails on a reference"):
        workflow.evaluate(copy, metric=lambda answer, reference: 1 / 0, say=quiet)


def test_a_model_that_cannot_be_loaded_leaves_a_true_status(tmp_path):
    run = open_run("a", profile="tiny", settings=["model.name=./nothing"], root=tmp_path)
    with pytest.raises(ModelError):
        workflow.train(run, say=quiet)
    assert run.status().state == "failed"
    assert "there is no model folder ./nothing" in run.status().last_error


def test_events_are_closed_if_training_fails(copy, whole, monkeypatch):
    from qlora_helpers.training import run_steps, train

    closed = []

    class Events:
        def close(self):
            closed.append(True)

    monkeypatch.setattr(run_steps, "event_callback", lambda *args, **kwargs: Events())
    monkeypatch.setattr(train, "train", lambda *args, **kwargs: 1 / 0)
    _, model, loaded, _ = whole
    with pytest.raises(ZeroDivisionError):
        workflow.train(copy, model=model, loaded=loaded, say=quiet)
    assert closed == [True]


def test_a_killed_trainer_is_dead_and_its_run_can_be_resumed(tmp_path):
    """The process dies between two saves; nothing is lost but the steps since the last checkpoint."""
    run = open_run("killed", profile="tiny", settings=[*SETTINGS, "train.max_steps=40"], root=tmp_path)
    command = [sys.executable, "-m", "qlora_helpers", "train", str(run.folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while not (run.checkpoints_dir / "checkpoint-3" / "verified.json").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
    status = run.status()
    assert status.state == "dead"
    open_run(run.folder, settings=[f"train.max_steps={status.step + 2}"])
    with pytest.warns(UserWarning, match="incomplete") if _has_unsealed(run) else _nothing():
        result = workflow.train(run, show_progress=False, say=quiet)
    assert result.steps == status.step + 2
    assert run.status().state == "finished"
    assert run.status().session == 2
    steps = [line["step"] for line in run.progress() if "loss" in line]
    assert steps == [*range(1, status.step + 3)]
    assert {line["session"] for line in run.progress()} == {1, 2}


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def _has_unsealed(run) -> bool:
    from qlora_helpers.training import checkpoints as saved

    return not saved.is_good(saved.all_checkpoints(run.checkpoints_dir)[-1])


# the adapter comes back


def test_the_reloaded_model_is_the_trained_one(whole):
    run, model, loaded, _ = whole
    check = check_reload(run, model, loaded, prompts=2, say=quiet)
    assert check.passed
    assert (check.prompts, check.same_answers) == (2, 2)
    assert check.largest_difference <= 1e-4
    assert repr(check).startswith("the reloaded model is the trained one: 2 of 2 answers equal")


def test_either_difference_fails_the_check():
    assert ReloadCheck(prompts=2, largest_difference=1e-5, same_answers=2).passed
    assert not ReloadCheck(prompts=2, largest_difference=1e-5, same_answers=1).passed
    assert not ReloadCheck(prompts=2, largest_difference=1e-3, same_answers=2).passed
    assert not ReloadCheck(prompts=2, largest_difference=float("nan"), same_answers=2).passed


def spoil(run, change) -> None:
    from safetensors.torch import load_file, save_file

    path = run.adapter_dir / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def one_weight(weights) -> None:
    name = next(name for name in weights if "lora_B" in name)
    weights[name][0] += 0.5


def drop_a_layer(weights) -> None:
    for name in [name for name in weights if ".h.3." in name]:
        del weights[name]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (one_weight, RunError, r"the reloaded model DIFFERS: .*Train again"),
        (drop_a_layer, ModelError, r"the saved adapter lacks 8 tensors of the model, .*\.h\.3\..* first"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_that_was_tampered_with_is_found(whole, copy, change, error, message):
    _, model, loaded, _ = whole
    spoil(copy, change)
    with pytest.raises(error, match=message):
        check_reload(copy, model, loaded, prompts=2, say=quiet)


def test_an_adapter_with_another_scale_is_found(whole, copy):
    _, model, loaded, _ = whole
    path = copy.adapter_dir / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | {"lora_alpha": 64}))
    with pytest.raises(RunError, match="the reloaded model DIFFERS"):
        check_reload(copy, model, loaded, prompts=2, say=quiet)


@pytest.mark.parametrize("damage", ["cut", "empty", "no config", "other rank"])
def test_a_damaged_adapter_is_reported(copy, damage):
    weights, settings = (copy.adapter_dir / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "no config":
        settings.unlink()
    else:
        settings.write_text(json.dumps(read_json(settings) | {"r": 4}))
    with pytest.raises(ModelError, match=r"the saved adapter could not be loaded \(.*Train the run again"):
        workflow.load_adapter(copy, workflow.load(copy, say=quiet))


def test_training_again_saves_a_damaged_adapter_anew(whole, copy):
    """It is in the checkpoint too."""
    run, *_ = whole
    (copy.adapter_dir / "adapter_model.safetensors").write_bytes(b"")
    workflow.train(copy, show_progress=False, say=quiet)
    name = "adapter_model.safetensors"
    assert (copy.adapter_dir / name).read_bytes() == (run.adapter_dir / name).read_bytes()


def test_a_run_without_an_adapter_says_what_makes_it(tmp_path):
    run = open_run("new", profile="tiny", root=tmp_path)
    with pytest.raises(RunError, match=r"new/adapter_model.safetensors is not there yet\. Notebook 04_train"):
        workflow.load_adapter(run, None)


def test_rows_that_the_proof_refuses_are_padded_with_the_reason_and_stay_so(whole, tmp_path, monkeypatch):
    """`config.json` says that Falcon's rows can be packed; the loaded model has the last word, once."""
    from qlora_helpers.training import row_isolation

    _, _, loaded, _ = whole
    run = open_run("padded", profile="tiny", settings=SETTINGS, root=tmp_path)
    shape, tokenizer = loaded.shape, loaded.tokenizer
    assert workflow.prepare_data(run, tokenizer, shape=shape).packed
    asked = []

    def refused(model, longest, sequences):
        asked.append((longest, sequences))
        return "its rows leak"

    monkeypatch.setattr(row_isolation, "packing_refusal", refused)
    data = workflow.prepare_data(run, tokenizer, shape=shape, model=loaded.model)
    assert asked == [(256, run.config().train.micro_batch_size)]
    assert not data.packed and "rows of this model are padded instead of packed: its rows leak" in data.notes
    assert not workflow.prepare_data(run, tokenizer, shape=shape).packed  # an evaluation proves nothing anew
    monkeypatch.undo()
    (run.checkpoints_dir / "checkpoint-1").mkdir(parents=True)
    assert not workflow.prepare_data(run, tokenizer, shape=shape, model=loaded.model).packed  # it trained on these
    (run.checkpoints_dir / "checkpoint-1").rmdir()
    assert workflow.prepare_data(run, tokenizer, shape=shape, model=loaded.model).packed


def test_an_evaluation_is_written(whole, copy):
    _, model, loaded, _ = whole
    result = workflow.evaluate(copy, model=model, loaded=loaded, say=quiet)
    written = read_json(copy.evaluation_path)
    assert written["random_weights"] is True
    assert written["scores"]["tuned"]["rouge_l"] == result.scores["tuned"].rouge_l
    assert len(written["rows"]) == 2


@pytest.fixture
def read_only(copy):
    """The copy, in a folder that takes no file."""
    if os.geteuid():
        copy.folder.chmod(0o555)
        yield copy
        copy.folder.chmod(0o755)
        return
    folder = str(copy.folder)
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        pytest.skip("this process may mount nothing, and may write everywhere")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield copy
    finally:
        subprocess.run(["umount", folder], check=True)


def test_an_evaluation_of_a_read_only_run_is_kept_and_says_so_before_it_asks(read_only, tmp_path, monkeypatch):
    from qlora_helpers.evaluation import answering as evaluation

    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    asked = evaluation.generate
    monkeypatch.setattr(evaluation, "generate", lambda *args, **more: said.append("asked") or asked(*args, **more))
    result = workflow.evaluate(read_only, say=said.append)
    first = next(index for index, text in enumerate(said) if "can't be written" in text)
    assert first < said.index("asked")
    assert "copy-evaluation.json" in said[-1]
    assert not read_only.evaluation_path.exists()
    assert len(read_json(tmp_path / "copy-evaluation.json")["rows"]) == len(result.rows) == 2
    workflow.evaluate(read_only, say=said.append)
    assert (tmp_path / "copy-evaluation-2.json").exists(), "the first result is not overwritten"


def test_a_metric_that_can_t_work_is_refused_before_anything_is_asked(whole, copy, monkeypatch):
    from qlora_helpers.evaluation import answering as evaluation

    _, model, loaded, _ = whole
    monkeypatch.setattr(evaluation, "generate", lambda *args, **more: pytest.fail("it was asked"))
    with pytest.raises(UserError, match="no answer was made yet"):
        workflow.evaluate(copy, model=model, loaded=loaded, metric=lambda one, other: 1 / 0, say=quiet)


def test_a_function_of_the_user_s_scores_a_run(whole, copy):
    _, model, loaded, _ = whole
    result = workflow.evaluate(
        copy, model=model, loaded=loaded, metric=lambda answer, reference: len(answer) < 1e6, say=quiet
    )
    assert result.scoring.metric == "function"
    assert result.scores["tuned"].value(result.scoring.main) == 1
    assert read_json(copy.evaluation_path)["scoring"]["main"] == result.scoring.main


# the demo


def test_versions_of_what_a_result_depends_on():
    found = workflow.versions()
    assert set(found) == {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"}
    assert all(found.values())
