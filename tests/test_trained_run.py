"""What can be done with a run once it is trained: train it again, ask it, reload it."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from qlora_helpers import workflow
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.export.adapter import certify
from qlora_helpers.export.certificate import require_certificate
from qlora_helpers.model.run_model import RunModel
from qlora_helpers.runs.folder import Run

DIALOGUE = "Ann: cake on friday?\nBo: sure, I bring one"
SETTINGS = [
    "train.max_steps=2",
    "train.learning_rate=0.05",
    "data.train_rows=4",
    "data.eval_rows=1",
    "data.test_rows=2",
    "data.seq_len_tokens=256",
    "evaluation.max_new_tokens=6",
]


@pytest.fixture(scope="module")
def trained(cache, torch, tmp_path_factory):
    """A run of two steps, its base model and its tuned model."""
    run = workflow.open_run("mine", profile="tiny", settings=SETTINGS, root=tmp_path_factory.mktemp("runs"))
    loaded = workflow.load(run, say=str)
    model = workflow.add_adapters(run, loaded)
    workflow.train(run, model=model, loaded=loaded, show_progress=False, say=str)
    return run, loaded, model


def adapter_weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_" in name}


def test_training_a_finished_run_loads_it_without_a_step(trained, torch):
    run, _, model = trained
    progress, measured = run.progress(), read_json(run.plan_path)["measured"]
    fresh = workflow.load(run, say=str)
    again = workflow.add_adapters(run, fresh)
    result = workflow.train(run, model=again, loaded=fresh, show_progress=False, say=str)
    assert (result.steps, result.tokens_per_s, result.stopped) == (2, 0, False)
    assert result.loss == [line["loss"] for line in progress if "loss" in line][-1]
    assert run.progress() == progress
    assert (run.status().state, run.status().step, run.status().session) == ("finished", 2, 2)
    assert read_json(run.plan_path)["measured"] == measured
    before, after = adapter_weights(model), adapter_weights(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_reload_check_is_kept_in_the_plan(trained):
    run, loaded, model = trained
    check = workflow.check_reload(run, model, loaded, prompts=2, say=str)
    assert check.passed
    plan = read_json(run.plan_path)
    assert plan["reload"] == dataclasses.asdict(check)
    assert "measured" in plan


def test_ask_answers_as_the_base_model_or_as_the_tuned_one(trained):
    run, loaded, model = trained
    untuned, tuned = (workflow.ask(run, model, loaded, DIALOGUE, tuned=which) for which in (False, True))
    base = workflow.load(run, say=str)
    assert untuned == workflow.ask(run, workflow.add_adapters(run, base), base, DIALOGUE)
    assert tuned != untuned
    assert 1 <= tuned.tokens <= 6
    assert tuned == workflow.ask(run, model, loaded, DIALOGUE)


def test_an_answer_is_safe_to_print(trained, monkeypatch):
    from qlora_helpers.evaluation import generate

    run, loaded, model = trained
    given = generate.Answer("a\x1b[31mb\x9b1m\u202ec\nd", 4, True)
    monkeypatch.setattr(generate, "generate", lambda *args, **kwargs: [given])
    reply = workflow.ask(run, model, loaded, DIALOGUE)
    assert (reply.text, reply.tokens, reply.stopped, reply.trimmed) == ("abc\nd", 4, True, "")


def test_ask_samples_with_its_seed(trained):
    run, loaded, model = trained
    first, again, other = (
        workflow.ask(run, model, loaded, DIALOGUE, tuned=False, sampled=True, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_ask_trims_a_dialogue_that_is_too_long(trained, monkeypatch):
    from qlora_helpers.evaluation import generate

    run, loaded, model = trained
    asked = []
    monkeypatch.setattr(
        generate,
        "generate",
        lambda model, tokenizer, prompts, *rest, **more: asked.append(prompts) or [generate.Answer("", 1, True)],
    )
    workflow.ask(run, model, loaded, DIALOGUE * 200)
    ((prompt,),) = asked
    assert len(prompt) == 256 - 6
    assert loaded.tokenizer.decode(prompt).endswith("\n---\nSummary:\n")


def test_training_ends_with_a_certificate_that_passes(trained):
    run, _, _ = trained
    found = require_certificate(run.adapter_dir)
    assert (found.prompts, found.same_answers, found.largest_difference) == (2, 2, 0.0)
    assert found.data_fingerprint == read_json(run.data_dir / "prepared.json")["fingerprint"]
    assert found.base_model == "random:falcon-tiny"
    assert found.base_sha256


def test_a_saved_adapter_that_is_not_the_live_one_fails_its_certificate(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    run, loaded, model = trained
    copy = Run(shutil.copytree(run.folder, tmp_path / "copy"))
    weights = load_file(copy.adapter_dir / "adapter_model.safetensors")
    weights[next(name for name in weights if "lora_B" in name)] *= -9
    save_file(weights, copy.adapter_dir / "adapter_model.safetensors")
    data = workflow.prepare_data(copy, loaded.tokenizer, shape=loaded.shape, say=lambda text: None)
    found = certify(RunModel(copy, model, loaded), data)
    assert not found.passed
    assert "logits differ" in found.problems[0]


def test_settings_that_are_not_the_live_adapter_s_fail_its_certificate(trained, tmp_path):
    run, loaded, model = trained
    copy = Run(shutil.copytree(run.folder, tmp_path / "copy"))
    path = copy.adapter_dir / "adapter_config.json"
    settings = read_json(path)
    write_json(path, settings | {"lora_alpha": 10 * settings["lora_alpha"]})
    data = workflow.prepare_data(copy, loaded.tokenizer, shape=loaded.shape, say=lambda text: None)
    assert certify(RunModel(copy, model, loaded), data).settings_changed == ("lora_alpha: 32 -> 320",)
