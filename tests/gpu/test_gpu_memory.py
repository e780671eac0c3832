"""Needs a CUDA GPU; skipped elsewhere."""

from __future__ import annotations

import pytest

from qlora_helpers.runs.cleanup import find_space, free, free_gpu_memory

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def test_memory_of_this_process_is_found_and_given_back(tmp_path):
    block = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    held = find_space(tmp_path).select("gpu:*")
    assert held.n_bytes >= 1 << 28
    kept = free_gpu_memory()
    assert kept.after_gib >= 0.25  # a tensor that is still referred to stays
    del block
    assert free(held, confirm=True) >= 1 << 28
    assert not [item for item in find_space(tmp_path) if item.id.startswith("gpu:")]
