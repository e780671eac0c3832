"""The plan's parameters of every family's `config.json`, beside the model that transformers builds of it: all in this process.

Bytes are compared with loaded models as the families go down the path (`test_matrix`), and of all families by
`tests/matrix/measure.py --plans`.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import matrix_configurations as configurations
import matrix_path
import pytest

from qlora_helpers.model.shapes import counted
from qlora_helpers.model.shapes.config_file import read_config_file
from qlora_helpers.model.shapes.sizes import model_sizes


@pytest.fixture
def counting_here(torch, monkeypatch, tmp_path):
    """Counts in this process, where a plan starts one for each `config.json`."""
    from qlora_helpers.model.built_sizes import answer_to

    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(counted, "_count", lambda config, family: answer_to(json.loads(config)))


def parameters_of(torch, config, folder: Path) -> int:
    """Writes a configuration's file, and counts the model that loading makes of it, by another function than the plan's."""
    from qlora_helpers.model.blueprint import model_class

    with torch.device("meta"):
        model = model_class(config).from_config(config)
    model.tie_weights()
    config.save_pretrained(folder)
    return sum(part.numel() for part in model.parameters())


def test_the_plan_counts_every_family_exactly(torch, counting_here, tmp_path):
    """By arithmetic or built; a family that is refused fails here too."""
    wrong = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for family in configurations.judged_families():
            true = parameters_of(torch, configurations.tiny_config(family), tmp_path / family)
            try:
                sizes = model_sizes(read_config_file(tmp_path / family / "config.json", family))
            except Exception as error:
                wrong[family] = repr(error)
                continue
            if (planned := sizes.parameters + sizes.beside_text) != true:
                wrong[family] = f"{planned:,} of {true:,}"
    assert wrong == {}


@pytest.mark.parametrize("family", ["falcon_mamba", "hy_v4", "gemma3", "gemma4", "granitemoehybrid", "opt"])
def test_the_plan_knows_the_bytes_of_what_is_loaded(counting_here, tmp_path, family):
    """Weights that code reads directly or keeps in float32, projections beside the layers, vision parts, experts, positions."""
    found = matrix_path.judge(family, tmp_path, stages=("build", "load"))
    assert found["reached"] == "load", found["failed"]
    assert found["plan"]["off"] == 0
    assert abs(found["plan"]["bytes_off"]) < 0.0005  # constants of less than a block
