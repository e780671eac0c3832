"""Two saved adapters are compared weight by weight."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.lora import adapter_difference


@pytest.fixture
def saved(tmp_path):
    def save(name, **weights):
        (tmp_path / name).mkdir()
        save_file(
            {key: torch.tensor(value) for key, value in weights.items()}, tmp_path / name / "adapter_model.safetensors"
        )
        return tmp_path / name

    return save


def test_the_largest_difference_of_two_adapters_is_found(saved):
    first = saved("first", a=[1.0, 2.0], b=[[0.5]])
    assert adapter_difference(first, first) == 0.0
    second = saved("second", a=[1.0, 1.75], b=[[0.625]])
    assert adapter_difference(first, second) == adapter_difference(second, first) == 0.25


@pytest.mark.parametrize(
    "weights", [{"a": [1.0, 2.0, 3.0], "b": [[0.5]]}, {"a": [1.0, 2.0]}, {"a": [1.0, 2.0], "c": [[0.5]]}]
)
def test_adapters_of_different_shapes_are_refused(saved, weights):
    with pytest.raises(ModelError, match="can't be compared; expected the same layers and ranks"):
        adapter_difference(saved("first", a=[1.0, 2.0], b=[[0.5]]), saved("second", **weights))
