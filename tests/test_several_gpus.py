"""The table of several GPUs (`tests/gpu/several_gpus.py`), rehearsed in two processes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "gpu/several_gpus.py"
TRAINED = {"state": "finished", "losses": [7.0, 6.9], "certified": True}
AS_IT_SHOULD_BE = {
    "one": TRAINED,
    "shards": TRAINED,
    "copies of shards": {"left_out": "it takes 4 processes"},
    "killed": TRAINED | {"state_then": "failed"},
    "stopped": {"code": 0, "stopped": "stopped", "state": "finished", "gapless": True},
    "full": {
        "state": "failed",
        "exit_reason": "out of memory",
        "last_error": "out of memory (process 2 of 2, backward)",
    },
    "evaluated": TRAINED | {"evaluate": 0, "export": 0, "rows": 4},
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import several_gpus

    return several_gpus


def test_a_table_that_is_as_it_should_be_has_no_failures(script):
    assert script.failures(AS_IT_SHOULD_BE, steps=2) == []


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        ("shards", {"losses": [7.0, 6.5]}, "not those of one GPU"),
        ("shards", {"losses": [7.0]}, "did not train to its end"),
        ("shards", {"certified": False}, "no certificate"),
        ("killed", {"state_then": "running"}, "did not learn of it"),
        ("stopped", {"gapless": False}, "did not save, end and go on"),
        ("full", {"last_error": None}, "does not know"),
        ("evaluated", {"rows": 0}, "did not answer"),
    ],
)
def test_what_is_off_is_named(case, changes, said, script):
    results = {name: dict(values) for name, values in AS_IT_SHOULD_BE.items()}
    results[case] |= changes
    (found,) = script.failures(results, steps=2)
    assert found.startswith(case) and said in found


@pytest.mark.only_slow
def test_the_whole_table_on_two_processes(tmp_path):
    out = tmp_path / "table.json"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(out), "--steps", "6"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert {"one", "copies", "shards", "killed", "fewer", "stopped", "full", "evaluated"} <= set(
        json.loads(out.read_text())
    )
