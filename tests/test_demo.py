"""The demo's runs."""

from __future__ import annotations

import pytest

from qlora_helpers import demo
from qlora_helpers.runs.folder import Run


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("dialogues.jsonl", "demo-dialogues"),
        ("/some/folder/my rows.v2.csv", "demo-my-rows-v2"),
        ("knkarthick/samsum", "demo-samsum"),
        ("données.jsonl", "demo-donn-es"),
        ("データ.json", "demo----"),
        (".jsonl", "demo--jsonl"),
        ("x" * 200 + ".csv", "demo-" + "x" * 80),
    ],
)
def test_a_demo_on_a_file_has_a_run_of_its_own(tmp_path, data, name):
    assert demo._demo_name(data) == name
    assert Run(tmp_path / name).name == name
