"""What notebooks 04 and 05 say of an explosion is so: the newest checkpoint is finite and spoilt, and `retry` passes over it."""

from __future__ import annotations

import re
import shutil

import pytest

import qlora_helpers as ql
from qlora_helpers.teaching.exercises.watching import last_healthy
from qlora_helpers.training.checkpoints import adapter_is_finite, all_checkpoints, newest_good, step_of

SETTINGS = {
    "data.train_rows": 8,
    "data.eval_rows": 1,
    "data.test_rows": 1,
    "data.seq_len_tokens": 256,
    "train.max_steps": 10,
    "train.save_steps": 2,
    "train.eval_steps": None,
    "train.warmup_steps": 0,
    "train.learning_rate": 1.0,
    "train.checkpoints_kept": 4,
    "train.logging_steps": 1,
    "train.tensorboard": "off",
}
QUIET = {"show_progress": False, "say": lambda text: None}
LOWER = {"train.learning_rate": 1e-3}
SPOILT = r"checkpoints 2, .*\d are set aside \(the gradient norm jumped to [\d.e+]+ at step 2, where 1\.1 was usual\)"


@pytest.fixture(scope="module")
def exploded(tmp_path_factory):
    """A run whose gradient is no longer a number after a few steps, and the message."""
    run = ql.open_run("exploded", profile="tiny", settings=SETTINGS, root=tmp_path_factory.mktemp("runs"))
    with pytest.raises(ql.UserError) as caught:
        ql.train(run, **QUIET)
    return run, str(caught.value)


@pytest.fixture
def run(exploded, tmp_path):
    """A copy of it."""
    shutil.copytree(exploded[0].folder, tmp_path / "exploded")
    return ql.existing_run("exploded", root=tmp_path)


def test_finite_checkpoints_that_are_spoilt_are_set_aside_and_stay(exploded):
    run, message = exploded
    assert "is no longer a finite number" in message and "; its data: sequence " in message
    assert re.search(rf"the run goes on from the untrained adapter: {SPOILT}\.$", message)
    paths = all_checkpoints(run.checkpoints_dir)
    saved = [step_of(path) for path in paths]
    assert saved[:2] == [2, 4]
    assert all(adapter_is_finite(path / "adapter_model.safetensors") for path in paths)
    assert newest_good(run.checkpoints_dir) is None
    norms = [line["grad_norm"] for line in run.progress() if "grad_norm" in line]
    assert last_healthy(norms, saved) == 0, "as the exercise has it"


def test_retry_starts_anew_at_a_lower_rate_and_is_the_run_that_never_exploded(run, tmp_path):
    said = []
    result = ql.retry(run, settings=LOWER, show_progress=False, say=said.append)
    assert (result.steps, result.new_steps) == (10, 10)
    assert said[0] == "Going on with train.learning_rate=0.001"
    anew = rf"Training starts anew from the untrained adapter, because no checkpoint is healthy: {SPOILT}\."
    assert sum(bool(re.fullmatch(anew, line)) for line in said) == 1
    assert "done)" not in " ".join(said), "none of its steps is behind it"
    fresh = ql.open_run("fresh", profile="tiny", settings=SETTINGS | LOWER, root=tmp_path)
    ql.train(fresh, **QUIET)
    name = "adapter_model.safetensors"
    assert (run.adapter_dir / name).read_bytes() == (fresh.adapter_dir / name).read_bytes()


def test_a_person_may_go_on_from_a_spoilt_checkpoint_and_it_is_said(run):
    said = []
    last = step_of(all_checkpoints(run.checkpoints_dir)[-1])
    with pytest.raises(ql.UserError, match=f"no longer a finite number .*: checkpoint.* {last} (is|are) set aside"):
        ql.retry(run, settings=LOWER, checkpoint=last, show_progress=False, say=said.append)
    asked = f"Training goes on from checkpoint {last}, as you asked, although it had been set aside (the gradient norm"
    assert sum(line.startswith(asked) for line in said) == 1
    assert newest_good(run.checkpoints_dir) is None, "it failed again, so it is set aside again"


def test_a_run_that_explodes_late_goes_on_from_its_last_healthy_checkpoint(tmp_path):
    run = ql.open_run("late", profile="tiny", settings=SETTINGS | LOWER | {"train.max_steps": 4}, root=tmp_path)
    ql.train(run, **QUIET)
    with pytest.raises(ql.UserError, match="goes on from its last healthy checkpoint, of step 4: checkpoint"):
        ql.retry(run, settings={"train.learning_rate": 1.0, "train.max_steps": 40}, **QUIET)
    said = []
    settings = LOWER | {"train.max_steps": 8}
    result = ql.retry(run, settings=settings, show_progress=False, say=said.append)
    assert (result.steps, result.new_steps) == (8, 4)
    assert any(line.startswith("Training goes on from checkpoint 4, the last healthy one: ") for line in said)


def test_trained_adapters_in_memory_are_not_taken_for_untrained_ones(run):
    loaded = ql.load(run, say=lambda text: None)
    model = ql.add_adapters(run, loaded)
    next(weight for name, weight in model.named_parameters() if "lora_B" in name).data.fill_(0.1)
    with pytest.raises(ql.UserError, match="the adapters in memory have been trained"):
        ql.retry(run, model=model, loaded=loaded, settings=LOWER, **QUIET)
