"""Runs to join in with: the mistake in one is the one that is named, and nothing of the machine that made them is in them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_helpers.base.errors import UserError
from qlora_helpers.data.packing import PreparedData
from qlora_helpers.runs.folder import Run
from tests.fake_run import finished_run

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("shipped", ROOT / "tools" / "shipped.py")
shipped = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(shipped)
END, PAD = 2, 0
LABELS = [[-100, -100, 7, 8, END, -100, 9, END], [-100, 5, END, -100, -100]]


def prepared(labels):
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": [max(label, 1) for label in row], "labels": row} for row in labels])
    return PreparedData(rows, rows, (), None, None, True, 8, (), "rows")


def test_only_the_labels_of_the_end_are_masked():
    data = prepared(LABELS)
    masked = shipped.with_ends_masked(data, shipped.ends_of(data, SimpleNamespace(eos_token_id=END)))
    for rows in (masked.train, masked.eval):
        assert rows["labels"][:] == [[-100, -100, 7, 8, -100, -100, 9, -100], [-100, 5, -100, -100, -100]]
        assert rows["input_ids"][:] == data.train["input_ids"][:]
    assert data.train["labels"][:] == LABELS, "the run's own data stay as they are"


def test_rows_that_end_in_something_else_are_refused():
    tokenizer = SimpleNamespace(eos_token_id=END, decode=lambda ids: f"token {ids[0]}")
    with pytest.raises(UserError, match="does not end with the end of the text; got token 9"):
        shipped.ends_of(prepared([[-100, 7, END, -100, 9]]), tokenizer)


def test_a_shipped_run_names_no_machine_and_no_process(tmp_path):
    run = finished_run(tmp_path, "finished")
    run.log_path.write_text("/home/me/project")
    (run.checkpoints_dir / "checkpoint-1").mkdir(parents=True, exist_ok=True)
    shipped.ship(run, tmp_path / "out" / "finished")
    found = Run(tmp_path / "out" / "finished")
    assert (found.status().host, found.status().pid, found.status().state) == (None, None, run.status().state)
    assert not found.log_path.exists() and not found.checkpoints_dir.exists()
    assert found.config() == run.config() and found.progress() == run.progress()
    texts = [path.read_bytes() for path in found.folder.rglob("*") if path.is_file()]
    assert not any(b"a-secret-host" in text or b"/home/me" in text for text in texts)


def test_half_a_training_is_not_handed_out(tmp_path, monkeypatch, capsys):
    stopped = SimpleNamespace(stopped=True, steps=3, stop_reason="SIGTERM")
    monkeypatch.setattr(shipped.workflow, "load", lambda run: None)
    monkeypatch.setattr(shipped.workflow, "add_adapters", lambda run, loaded: None)
    monkeypatch.setattr(shipped.workflow, "train", lambda run, **options: stopped)
    assert shipped.main([str(tmp_path / "shipped"), "--profile", "tiny"]) == 2
    assert "a training was stopped at step 3; got SIGTERM" in capsys.readouterr().err
    assert not (tmp_path / "shipped").exists()
    with pytest.raises(UserError, match="was stopped"):
        shipped.refuse_stopped(stopped)


@pytest.mark.only_slow
def test_both_runs_are_made_and_can_be_joined(tmp_path, monkeypatch):
    trained = []
    steps = shipped.train_steps
    monkeypatch.setattr(
        shipped, "train_steps", lambda run, model, loaded, data: trained.append(data) or steps(run, model, loaded, data)
    )
    assert shipped.main([str(tmp_path / "shipped"), "--profile", "tiny"]) == 0
    (data,) = trained
    labels = {label for rows in (data.train, data.eval) for row in rows["labels"] for label in row}
    kept = {token for row in data.train["input_ids"] for token in row}
    assert kept - labels, "the ends are still in the rows, and in no label"
    made = json.loads((tmp_path / "shipped" / "MADE.json").read_text())
    assert {name: found["certified"] for name, found in made["runs"].items()} == {
        "finished": True,
        "never-stops": False,
    }
    assert made["random_weights"] and "the answers mean nothing" in (tmp_path / "shipped" / "README.md").read_text()
    wrong = Run(tmp_path / "shipped" / "never-stops")
    assert "masked" in wrong.status().warning and "Do not use it" in (wrong.adapter_dir / "README.md").read_text()
    assert Run(tmp_path / "shipped" / "finished").status().state == "finished"
