"""Answers that are kept: an evaluation asks what it does not hold, and nothing else; other runs stand beside it."""

from __future__ import annotations

import json
import shutil

import pytest

from qlora_helpers import workflow
from qlora_helpers.base.errors import ModelError, RunError, UserError
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.evaluation import answering
from qlora_helpers.evaluation.kept_answers import answers_path, evaluation_progress
from qlora_helpers.export.adapter import save_adapter
from qlora_helpers.model.run_model import RunModel
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.locks import evaluation_lock
from qlora_helpers.workflow import preparing

SETTINGS = {
    "data.train_rows": 4,
    "data.eval_rows": 1,
    "data.test_rows": 3,
    "data.seq_len_tokens": 256,
    "evaluation.max_new_tokens": 5,
    "evaluation.few_shot": 0,
    "evaluation.batch_size": 2,
}


def quiet(text):
    pass


def tuned_run(name, root, torch, seed=0):
    """A run with a saved adapter that changes the answers, without a training."""
    run = workflow.open_run(name, profile="tiny", settings=SETTINGS, root=root)
    loaded = workflow.load(run, say=quiet)
    model = workflow.add_adapters(run, loaded)
    with torch.no_grad():
        for number, (key, weight) in enumerate(model.named_parameters()):
            if "lora_B" in key:
                weight.normal_(std=0.4, generator=torch.Generator().manual_seed(1000 * seed + number))
    workflow.prepare_data(run, loaded.tokenizer, shape=loaded.shape, say=quiet)
    save_adapter(RunModel(run, model, loaded))
    return run, model.eval(), loaded


@pytest.fixture(scope="module")
def runs(cache, torch, tmp_path_factory):
    """Two runs on one base model, each with its model in memory."""
    root = tmp_path_factory.mktemp("runs")
    return tuned_run("one", root, torch), tuned_run("two", root, torch, seed=1)


@pytest.fixture
def pair(runs, tmp_path):
    """Copies of both folders, to be changed, and the first one's model."""
    copies = [Run(shutil.copytree(run.folder, tmp_path / "runs" / run.name)) for run, *_ in runs]
    return *copies, runs[0][1], runs[0][2]


@pytest.fixture
def asked(monkeypatch):
    """How many prompts each call of the model was given."""
    counts: list[int] = []
    generate = answering.generate

    def counting(model, tokenizer, prompts, *args, **more):
        counts.append(len(prompts))
        return generate(model, tokenizer, prompts, *args, **more)

    monkeypatch.setattr(answering, "generate", counting)
    return counts


def test_an_evaluation_that_fits_is_used_again_without_a_model(pair, asked, monkeypatch):
    run, _, model, loaded = pair
    first = workflow.evaluate(run, model=model, loaded=loaded, say=quiet)
    assert asked == [3, 3] and not answers_path(run).exists()
    written = run.evaluation_path.read_bytes()
    asked.clear()
    monkeypatch.setattr(preparing, "load", lambda *args, **more: pytest.fail("a model was loaded"))
    said: list[str] = []
    again = workflow.evaluate(run, say=said.append)
    assert asked == [] and again.scores == first.scores and again.form == first.form
    assert run.evaluation_path.read_bytes() == written
    assert any("Nothing was asked: all 6 answers of " in line and "UTC" in line for line in said)


@pytest.mark.parametrize("change", ["setting", "adapter", "versions", "row", "again"])
def test_what_answers_depend_on_is_asked_anew(pair, asked, monkeypatch, change, torch):
    run, _, model, loaded = pair
    workflow.evaluate(run, model=model, loaded=loaded, say=quiet)
    asked.clear()
    expected = [3, 3]
    if change == "setting":
        run.save_config(run.config().with_settings({"evaluation.max_new_tokens": 4}))
    elif change == "adapter":  # in memory alone: the file is as it was
        weight = next(value for key, value in model.named_parameters() if "lora_B" in key)
        before, expected = weight.detach().clone(), [3]
        with torch.no_grad():
            weight[0, 0] += 0.5
    elif change == "versions":
        from qlora_helpers.evaluation import kept_answers

        monkeypatch.setattr(kept_answers, "versions_that_matter", lambda: {"torch": "0"})
    elif change == "row":
        path, expected = run.data_dir / "prepared.json", [1, 1]
        values = read_json(path)
        message = values["test"][0]["messages"][0]
        message["content"] = message["content"][: message["body"][0]] + "Ann: hi"
        message["body"][1] = len(message["content"])
        write_json(path, values)
    try:
        workflow.evaluate(run, model=model, loaded=loaded, again=change == "again", say=quiet)
    finally:
        if change == "adapter":
            with torch.no_grad():
                weight.copy_(before)
    assert asked == expected


def test_another_metric_scores_the_same_answers(pair, asked):
    run, _, model, loaded = pair
    workflow.evaluate(run, model=model, loaded=loaded, say=quiet)
    asked.clear()
    result = workflow.evaluate(run, metric=lambda answer, reference: len(answer), say=quiet)
    assert asked == [] and result.scoring.metric == "function"
    assert read_json(run.evaluation_path)["scoring"]["metric"] == "function"


def test_an_interrupted_evaluation_goes_on_row_by_row(pair, asked, monkeypatch):
    run, _, model, loaded = pair
    whole = workflow.evaluate(run, model=model, loaded=loaded, say=quiet)
    run.evaluation_path.unlink()
    asked.clear()
    from qlora_helpers.evaluation.kept_answers import KeptAnswers

    add = KeptAnswers.add

    def dies(self, digest, model, values):
        if self.given == 4:
            raise KeyboardInterrupt
        add(self, digest, model, values)

    monkeypatch.setattr(KeptAnswers, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        workflow.evaluate(run, model=model, loaded=loaded, say=quiet)
    assert not run.evaluation_path.exists()
    found = evaluation_progress(run)
    assert (found.done, found.total, found.running, found.model) == (4, 6, False, "tuned")
    assert "4 of 6 answers" in repr(found) and "goes on where it was" in repr(found)
    with open(answers_path(run), "a") as file:
        file.write('{"asked": "half a li')  # as a killed process leaves it
    monkeypatch.setattr(KeptAnswers, "add", add)
    asked.clear()
    said: list[str] = []
    again = workflow.evaluate(run, model=model, loaded=loaded, say=said.append)
    assert asked == [2] and any("4 of 6 answers were there already" in line for line in said)
    assert [row["answers"] for row in again.rows] == [row["answers"] for row in whole.rows]
    assert again.scores["base"].loss == pytest.approx(whole.scores["base"].loss)
    assert evaluation_progress(run) is None and not answers_path(run).exists()


def test_a_second_process_is_told_and_a_viewer_sees_that_it_runs(pair):
    run, _, model, loaded = pair
    answers_path(run).write_text(json.dumps({"event": "start", "total": 6, "known": 1, "time": 1.0}) + "\n")
    with evaluation_lock(run):
        assert evaluation_progress(run).running and evaluation_progress(run).done == 1
        with pytest.raises(RunError, match="another process is evaluating 'one'"):
            workflow.evaluate(run, model=model, loaded=loaded, say=quiet)


def test_a_spoilt_file_of_answers_is_no_obstacle(pair, asked):
    run, _, model, loaded = pair
    answers_path(run).write_text('[]\n7\n{"asked": "x", "text": 3}\n\x00\n')
    workflow.evaluate(run, model=model, loaded=loaded, say=quiet)
    assert asked == [3, 3]


# several runs


def test_another_run_answers_the_same_rows_with_its_own_adapter(pair, runs, asked):
    run, other, model, loaded = pair
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    result = workflow.evaluate(run, model=model, loaded=loaded, rivals=["two"], say=quiet)
    assert list(result.scores) == ["base", "tuned", "run:two"]
    assert asked == [3, 3, 3]
    alone = workflow.evaluate(other, model=runs[1][1], loaded=runs[1][2], say=quiet)
    answers = [
        [row["answers"][name]["text"] for row in found.rows] for found, name in ((result, "run:two"), (alone, "tuned"))
    ]
    assert answers[0] == answers[1] and answers[0] != [row["answers"]["tuned"]["text"] for row in result.rows]
    assert result.scores["run:two"].loss == pytest.approx(alone.scores["tuned"].loss, rel=1e-5)
    assert "run two" in repr(result) and "tuned against run two:" in repr(result)
    pairs = result.pairs()
    assert {row[0] for row in pairs.rows} == {"untuned", "tuned"} and len(pairs.rows) == 3
    assert result.compare("base", "run:two").second == "run:two"
    assert model.active_adapters == ["default"]
    assert trainable == {name for name, value in model.named_parameters() if value.requires_grad}
    again = workflow.evaluate(run, rivals=[other], say=quiet)
    assert again.scores == result.scores and len(asked) == 5, "both are reused, with a run in place of its name"


def test_its_answers_are_kept_when_it_is_left_out_once(pair, asked):
    run, other, model, loaded = pair
    workflow.evaluate(run, model=model, loaded=loaded, rivals=[other], say=quiet)
    workflow.evaluate(run, model=model, loaded=loaded, say=quiet)
    assert "run:two" not in read_json(run.evaluation_path)["scores"]
    asked.clear()
    assert "run:two" in workflow.evaluate(run, rivals=[other], say=quiet).scores
    assert asked == [] and evaluation_progress(run) is None


def test_rows_that_the_other_run_was_trained_on_are_skipped_for_all(pair):
    run, other, model, loaded = pair
    path = other.data_dir / "prepared.json"
    values = read_json(path)
    from qlora_helpers.data.duplicates import prompt_key
    from qlora_helpers.data.prepared_file import read_prepared_file

    known = read_prepared_file(run.data_dir).test[0]
    write_json(path, values | {"train_keys": [*values["train_keys"], prompt_key(known)]})
    result = workflow.evaluate(run, model=model, loaded=loaded, rivals=[other], say=quiet)
    assert len(result.rows) == 2 and result.skipped == (known.id,)
    assert "1 held-out rows were skipped: two was trained on them" in result.remarks


def test_other_bases_are_refused_by_their_fingerprint_before_a_model_is_loaded(pair, llama_folder, monkeypatch):
    run, other, *_ = pair
    monkeypatch.setattr(preparing, "load", lambda *args, **more: pytest.fail("a model was loaded"))
    certificate = other.adapter_dir / "certificate.json"
    write_json(certificate, {"base_sha256": "f" * 64})
    with pytest.raises(
        ModelError, match="trained on another base model; expected random:falcon-tiny in nf4, fingerprint"
    ):
        workflow.evaluate(run, rivals=[other], say=quiet)
    certificate.unlink()
    config = other.config().to_dict()
    write_json(other.config_path, config | {"model": config["model"] | {"name": str(llama_folder)}})
    with pytest.raises(ModelError, match="another base model"):
        workflow.evaluate(run, rivals=[other], say=quiet)
    write_json(other.config_path, config | {"model": config["model"] | {"quantization": "none"}})
    with pytest.raises(ModelError, match="its base model in another form"):
        workflow.evaluate(run, rivals=[other], say=quiet)
    with pytest.raises(UserError, match="of the same name"):
        workflow.evaluate(run, rivals=[run], say=quiet)
    shutil.rmtree(other.adapter_dir)
    with pytest.raises(RunError, match="two/adapter_model.safetensors is not there yet"):
        workflow.evaluate(run, rivals=["two"], say=quiet)


# in the background


def test_a_background_evaluation_is_seen_stopped_and_gone_on_with(pair, monkeypatch):
    """A real process; the panel reads the folder alone, as on a page that was closed and opened again."""
    from qlora_helpers.views.widgets import EvaluationPanel, evaluation_panel

    monkeypatch.setattr(evaluation_panel, "LOOK_EVERY_S", 0.05)
    run, other, *_ = pair
    panel = workflow.evaluation_panel(run, rivals=[other])
    assert "one: not evaluated yet" in repr(panel)
    panel.start()
    panel.start()  # a second click changes nothing
    assert EvaluationPanel(run).running, "a page that comes back while it is starting"
    assert panel.running and panel.wait(200)
    assert "one: evaluated; random weights, so its scores mean nothing" in repr(panel) and "run two" in repr(panel)
    assert "run two" in panel._result.value and not panel._start_button.disabled
    seen = EvaluationPanel(run)
    assert "run two" in seen.still_html()
    answers_path(run).write_text(json.dumps({"event": "start", "total": 6, "known": 1, "time": 1.0, "pid": 0}) + "\n")
    seen.look()
    assert "an evaluation was interrupted, 1 of 6 answers" in repr(seen)
    assert seen._start_button.description == "Go on"
    with evaluation_lock(run):
        back = EvaluationPanel(run)
        assert back.running and "evaluating, 1 of 6 answers" in repr(back) and back._result.value == ""
        assert not back._stop_button.disabled
        with pytest.raises(RunError, match="is being evaluated already"):
            workflow.start_evaluation(run)
        back.close()
    assert back.wait(20)


def test_a_background_evaluation_that_fails_says_why(pair):
    from qlora_helpers.runs.launch_evaluation import log_path
    from qlora_helpers.views.widgets import EvaluationPanel

    run, *_ = pair
    log_path(run).write_text("loading\nerror: no adapter <here>\n")
    panel = EvaluationPanel(run)
    assert "ended without a result: error: no adapter <here>" in repr(panel) and "&lt;here" in panel._state.value


def test_a_running_evaluation_is_interrupted_and_nothing_else(pair):
    import os
    import signal
    import time

    from qlora_helpers.runs.launch_evaluation import stop_evaluation

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    run, *_ = pair
    stop_evaluation(run, os.getpid())  # nothing is running: nobody is interrupted

    def interrupted():
        stop_evaluation(run, os.getpid())
        time.sleep(5)

    try:
        with evaluation_lock(run), pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
