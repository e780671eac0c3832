"""What several tests of exports share: a run that was trained and evaluated once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

SETTINGS = [
    "train.max_steps=2",
    "train.learning_rate=0.02",
    "data.train_rows=4",
    "data.eval_rows=1",
    "data.test_rows=3",
    "data.seq_len_tokens=256",
    "evaluation.max_new_tokens=6",
]


@pytest.fixture(scope="session")
def small_settings():
    """Settings with which a run takes seconds."""
    return list(SETTINGS)


@pytest.fixture(scope="session")
def trained(cache, torch, tmp_path_factory, llama_folder):
    """A run on a checkpoint folder that was trained and evaluated. Shared: look, don't touch."""
    from qlora_helpers import workflow

    settings = [*SETTINGS, f"model.name={llama_folder}"]
    run = workflow.open_run("mine", profile="tiny", settings=settings, root=tmp_path_factory.mktemp("runs"))
    workflow.train(run, show_progress=False, say=lambda text: None)
    workflow.evaluate(run, say=lambda text: None)
    return run


@pytest.fixture
def copy(trained, tmp_path: Path):
    """A copy of the run, to be spoilt; without what was exported."""
    from qlora_helpers.runs.folder import Run

    shutil.copytree(trained.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("export", "export-*"))
    return Run(tmp_path / "copy")
