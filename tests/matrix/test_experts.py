"""Mixtures go down the whole path with adapters on their experts, as the matrix goes down it without."""

from __future__ import annotations

import matrix_path
import pytest


@pytest.mark.parametrize(
    "family",
    ["qwen3_moe", *(pytest.param(each, marks=pytest.mark.only_slow) for each in ("mixtral", "gpt_oss", "jetmoe"))],
)
def test_a_mixture_with_adapters_on_its_experts_goes_down_the_path(torch, tmp_path, monkeypatch, family):
    """Plain and fast losses, certificate, evaluation with the adapter and without, reload, and the merged files' weights."""
    names = "kv_proj,experts" if family == "jetmoe" else "q_proj,experts"
    settings = (*matrix_path.SETTINGS, f"adapter.target_modules={names}")
    monkeypatch.setattr(matrix_path, "SETTINGS", settings)
    found = matrix_path.judge(family, tmp_path)
    assert found["passed"], found.get("failed")
