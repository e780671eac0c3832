"""What the exercise on an explosion teaches is so: the newest checkpoint is finite and spoilt, and starting over helps."""

from __future__ import annotations

import pytest

import qlora_helpers as ql
from qlora_helpers.teaching.exercises.watching import last_healthy
from qlora_helpers.training.checkpoints import all_checkpoints, newest_good, step_of

pytestmark = pytest.mark.only_slow

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
}
QUIET = {"show_progress": False, "say": lambda text: None}


def test_a_lower_rate_does_not_rescue_the_newest_checkpoint_and_starting_over_does(tmp_path):
    run = ql.open_run("exploded", profile="tiny", settings=SETTINGS, root=tmp_path)
    with pytest.raises(ql.UserError, match="no longer a finite number"):
        ql.train(run, **QUIET)
    newest = newest_good(run.checkpoints_dir)
    saved = [step_of(path) for path in all_checkpoints(run.checkpoints_dir)]
    norms = [line["grad_norm"] for line in run.progress() if "grad_norm" in line]
    assert newest is not None and step_of(newest) == max(saved), "the newest checkpoint is finite, so it counts as good"
    assert last_healthy(norms, saved) == 0

    with pytest.raises(ql.UserError, match="no longer a finite number"):
        ql.retry(run, settings={"train.learning_rate": 1e-3}, **QUIET)

    again = ql.open_run("again", profile="tiny", settings=SETTINGS | {"train.learning_rate": 1e-3}, root=tmp_path)
    assert ql.train(again, **QUIET).steps == SETTINGS["train.max_steps"]
