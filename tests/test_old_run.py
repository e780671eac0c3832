"""A run folder of an earlier version, under that version's names: it is opened, reported on and resumed.

`runs/run_before_rooms` was written by the last version before the package was divided into rooms: two steps of the tiny profile,
an evaluation, an unanswered request and settings after an out-of-memory error.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora_helpers import workflow
from qlora_helpers.data.prepared_file import read_prepared_file
from qlora_helpers.evaluation.evaluation_file import read_evaluation
from qlora_helpers.export.certificate import read_certificate
from qlora_helpers.planning.out_of_memory import next_settings
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.plan_file import read_plan
from qlora_helpers.views.monitor import loss_curve, plan_table
from qlora_helpers.views.report import write_report
from qlora_helpers.views.run_list import read_runs

OLD = Path(__file__).parent / "runs" / "run_before_rooms"


@pytest.fixture
def old(tmp_path) -> Run:
    return Run(shutil.copytree(OLD, tmp_path / "runs" / "old"))


def test_the_folder_really_holds_old_names():
    held = {path.name: path.read_text() for path in OLD.rglob("*.json")}
    assert '"recompute_layers": 1' in held["config.json"]
    assert "train.recompute_layers=2" in held["plan.json"]
    assert '"left_out"' in held["prepared.json"] and '"left_out"' in held["evaluation.json"]
    assert any('"heard_at"' in text for text in held.values())


def test_old_names_are_read_as_todays(old):
    assert old.config().train.checkpointed_layers == 1
    assert (old.status().state, old.status().step) == ("finished", 2)
    (request,) = old.requests
    heard_at = json.loads(next(old.requests_dir.glob("*.json")).read_text())["heard_at"]
    assert (request.stage, request.received_at) == ("received", heard_at)
    assert len(loss_curve(old).loss) == 2

    plan = read_plan(old)
    assert (plan.measured.steps, plan.measured.machine, plan.predicted) == (2, "CPU", None)
    settings = old.config().with_settings(next_settings(old)).train
    assert (settings.micro_batch_size, settings.checkpointed_layers) == (1, 2)

    assert read_prepared_file(old.data_dir).report.skipped == ()
    assert read_evaluation(old)["skipped"] == []
    assert read_certificate(old.adapter_dir).passed


def test_an_old_run_is_reported(old):
    page = write_report(old).read_text(encoding="utf-8")
    assert "train.checkpointed_layers" in page and "train.recompute_layers" not in page
    assert "2,560" in page  # trained parameters
    (row,) = read_runs(old.folder.parent)
    assert tuple(row.cells()[:2]) == ("old", "finished 2 of 2") and not row.problem
    assert plan_table(old).rows[-1][0] == "tokens/s"


def test_an_old_run_is_resumed_from_its_checkpoint(old):
    run = workflow.open_run("old", root=old.folder.parent, settings=["train.max_steps=3"])
    result = workflow.train(run, show_progress=False, say=lambda text: None)
    assert (result.steps, result.new_steps) == (3, 1)
    losses = [(line["step"], line["session"]) for line in run.progress() if "loss" in line]
    assert losses == [(1, 1), (2, 1), (3, 2)]
    (request,) = run.requests
    assert request.answer == "stale: the session it was meant for has ended"
    assert "heard_at" not in next(run.requests_dir.glob("*.json")).read_text()
    assert run.status().state == "finished"
    assert read_certificate(run.adapter_dir).passed
