"""Flex attention within packed rows: its masks, its values as far as a CPU computes them, and the mask in its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from qlora_helpers.model.attention import AttentionTerms
from qlora_helpers.training.fast_step import flex_rows
from qlora_helpers.training.fast_step.block_diagonal import RowStarts, attend_within_rows
from qlora_helpers.training.fast_step.flex_rows import (
    RowMasks,
    attend_by_flex,
    attend_under_mask,
    candidates,
    flex_attend,
    kind_of,
    row_mask,
)

STARTS = torch.tensor([0, 1, 100, 130, 300, 300, 300], dtype=torch.int32)
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
WAYS = {
    "soft-cap": AttentionTerms(0.7, None, 2.0),
    "soft-cap and window": AttentionTerms(0.7, 40, 2.0),
    "all": AttentionTerms(None, 40, 2.0, SINKS),
    "wide": AttentionTerms(1.0),
}


def drawn(tokens: int = 300, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, heads, 16, generator=draw, dtype=dtype) for heads in (4, 2, 2)]


@pytest.mark.parametrize("tokens", [40, 128, 129, 700])
@pytest.mark.parametrize("window", [None, 1, 5, 129, 300])
def test_the_block_mask_is_the_one_that_pytorch_makes_from_all_pairs(tokens, window):
    draw = torch.Generator().manual_seed(tokens)
    for rows in (1, 3, 9):
        cuts = torch.randint(1, tokens, (rows - 1,), generator=draw).unique()
        starts = torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens] * 3)]).to(torch.int32)
        row = torch.searchsorted(starts, torch.arange(tokens, dtype=torch.int32), right=True)

        def sees(batch, head, at, seen, row=row):
            return (row[at] == row[seen]) & (seen <= at) & (at - seen < (window or tokens))

        found, expected = row_mask(starts, tokens, window).blocks, create_block_mask(sees, 1, 1, tokens, tokens, "cpu")
        for kind in ("kv", "full_kv", "q", "full_q"):
            counts = getattr(expected, f"{kind}_num_blocks")
            assert torch.equal(getattr(found, f"{kind}_num_blocks"), counts)
            for one, other, count in zip(
                getattr(found, f"{kind}_indices")[0, 0],
                getattr(expected, f"{kind}_indices")[0, 0],
                counts[0, 0],
                strict=True,
            ):
                assert sorted(one[:count].tolist()) == sorted(other[:count].tolist())
        both = [create_mask(each, 1, 1, tokens, tokens, "cpu") for each in (found.mask_mod, sees)]
        assert torch.equal(*both)


@pytest.mark.parametrize("way", WAYS)
def test_under_a_mask_values_and_gradients_are_those_of_rows_one_by_one(way):
    """In float64, for two sequences of which the rows of neither reach the other."""
    terms = WAYS[way]
    parts = drawn(dtype=torch.float64)
    rows = RowStarts(torch.device("cpu"), 300)
    rows.begin(torch.tensor([0, 1, 100, 150, 200, 300], dtype=torch.int32), 300)
    first = rows.masks.mask(terms.window, 300).first
    found = []
    for attend in (
        lambda *parts: attend_under_mask(*parts, first, terms, 2),
        lambda *parts: attend_within_rows(*(part.unflatten(0, (2, 150)) for part in parts), rows, terms).flatten(0, 1),
    ):
        given = [part.clone().requires_grad_() for part in parts]
        out = attend(*given)
        found.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), given)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "way", [way for way in WAYS if way != "all"]
)  # a CPU's kernel returns no log-sum-exp for sinks
@torch.no_grad()
def test_flex_attention_gives_the_values_of_rows_one_by_one(way):
    terms = WAYS[way]
    parts = drawn()
    rows = RowStarts(torch.device("cpu"), 300)
    rows.begin(STARTS, 300)
    mask = rows.masks.mask(terms.window, 300).blocks
    attend = torch.compile(flex_attend, backend="eager", fullgraph=True, dynamic=False)
    out = attend(*(part.transpose(0, 1)[None] for part in parts), mask, terms, {})[0].transpose(0, 1)
    exact = attend_within_rows(*(part.double()[None] for part in parts), rows, terms)[0]
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_compiled_layer_takes_each_batch_s_mask_without_compiling_again():
    terms = WAYS["soft-cap and window"]
    query, key, value = drawn()
    masks = RowMasks(pytest.fail)
    masks.begin(STARTS, None)
    masks.mask(40, 300)
    masks.how[kind_of(query, key, terms)] = {}
    graphs = []

    def counting(graph, examples):
        graphs.append(graph)
        return graph.forward

    attend = torch.compile(
        lambda *parts: attend_by_flex(*parts, masks, terms, 40, 1), backend=counting, fullgraph=True, dynamic=False
    )
    for cut in (50, 100, 290):
        starts = torch.tensor([0, cut, 300, 300], dtype=torch.int32)
        masks.begin(starts, 300)
        expected = attend_under_mask(query, key, value, row_mask(starts, 300, 40).first, terms, 1)
        torch.testing.assert_close(attend(query, key, value), expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


def test_where_flex_attention_fails_a_mask_takes_its_place_and_that_is_said_once(monkeypatch):
    """A CPU has no backward pass for it, as a GPU may lack the shared memory for wide heads."""
    said: list[str] = []
    masks = RowMasks(said.append)
    terms = WAYS["soft-cap"]
    parts = drawn()
    for starts in (STARTS, STARTS.clamp(min=130) * (torch.arange(7) > 0)):
        masks.begin(starts.to(torch.int32), 300)
        out = attend_by_flex(*parts, masks, terms, None, 1)
        assert torch.equal(out, attend_under_mask(*parts, row_mask(starts, 300, None).first, terms, 1))
    assert len(said) == 1 and said[0].startswith("heads of 16 values attend under a mask")


def test_out_of_memory_is_no_reason_to_hold_all_scores(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(flex_rows, "compiled_flex_attend", lambda: full)
    masks = RowMasks(pytest.fail)
    masks.begin(STARTS, 300)
    with pytest.raises(torch.OutOfMemoryError):
        attend_by_flex(*drawn(), masks, WAYS["soft-cap"], None, 1)


@pytest.mark.parametrize("head_dim", [64, 256, 512])
def test_tiles_divide_the_mask_s_blocks(head_dim):
    sizes = [size for options in candidates(head_dim) for name, size in options.items() if "BLOCK" in name]
    assert sizes and all(flex_rows.BLOCK % size == 0 for size in sizes)


def test_the_script_for_a_gpu_runs_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "gpu")
    import attention_on_gpu

    monkeypatch.setattr(sys, "argv", ["attention_on_gpu.py", str(tmp_path / "found.json"), "--tiny"])
    assert attention_on_gpu.main() == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [len(found[kind]) for kind in ("cases", "models")] == [
        len(attention_on_gpu.CASES),
        len(attention_on_gpu.MODELS),
    ]
    assert all("errors" in entry["found"]["training"] for entry in found["cases"])
