"""Short convolutions that keep packed rows apart: values, gradients, and which models' change."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_helpers.model.short_convolutions import NAME, convolve_within_rows, keep_rows_apart
from qlora_helpers.training.row_isolation import packing_refusal

LENGTHS = (1, 2, 7, 3, 4)


def alone(hidden, weight, bias, activation):
    """Each row by PyTorch's own convolution."""
    rows = [
        F.conv1d(row, weight[:, None], bias, padding=weight.shape[-1] - 1, groups=row.shape[1])[..., : row.shape[-1]]
        for row in hidden.split(LENGTHS, dim=-1)
    ]
    out = torch.cat(rows, dim=-1)
    return F.silu(out) if activation else out


@pytest.mark.parametrize("taps", [1, 3, 4, 20])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_values_and_gradients_are_those_of_the_rows_alone(taps, activation):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6, sum(LENGTHS), generator=draw, dtype=torch.float64)
    weight, bias = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((6, taps), (6,)))
    rows = torch.arange(len(LENGTHS), dtype=torch.int32).repeat_interleave(torch.tensor(LENGTHS)).expand(2, -1)
    found = []
    for convolve in (alone, lambda *parts: convolve_within_rows(*parts, seq_idx=rows)):
        given = hidden.clone().requires_grad_()
        out = convolve(given, weight, bias, activation)
        found.append((out, *torch.autograd.grad((out * out.detach().cos()).sum(), given)))
    torch.testing.assert_close(*found)


def test_in_16_bits_it_is_as_near_to_the_exact_sum_as_pytorch_s_own():
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 6, 17, generator=draw), torch.randn(6, 4, generator=draw)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    rows = torch.arange(len(LENGTHS), dtype=torch.int32).repeat_interleave(torch.tensor(LENGTHS))[None]
    exact = alone(hidden.double(), weight.double(), None, None)
    own = (alone(hidden, weight, None, None).double() - exact).norm()
    assert (convolve_within_rows(hidden, weight, seq_idx=rows).double() - exact).norm() <= 1.01 * own


def lfm2():
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = ["conv", "full_attention", "conv"]
    config = AutoConfig.for_model("lfm2", **shape, intermediate_size=64, vocab_size=200, layer_types=kinds)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.config.use_cache = False
    return model


def test_a_hybrid_of_convolutions_and_attention_packs_and_computes_what_it_did(monkeypatch):
    model = lfm2()
    module = sys.modules[type(model).__module__]
    original = getattr(module, NAME)
    original = getattr(original, "__wrapped__", original) if hasattr(original, "keeps_rows_apart") else original
    monkeypatch.setattr(module, NAME, original)
    before = packing_refusal(model, 128)
    ids = torch.arange(20)[None]
    logits = model(ids).logits
    assert "can't keep packed sequences apart" in before
    assert keep_rows_apart(model) == 1 and keep_rows_apart(model) == 1
    assert getattr(module, NAME).__wrapped__ is original
    assert packing_refusal(model, 128) is None and packing_refusal(model, 128, 3) is None
    assert torch.equal(model(ids).logits, logits)


def test_a_package_s_kernel_stays(monkeypatch):
    """It refuses tensors of a CPU in its own words, or takes rows itself."""
    model = lfm2()
    module = sys.modules[type(model).__module__]

    def refuses(*args, **kwargs):
        raise RuntimeError("expected CUDA tensors")

    for kernel in (refuses, lambda hidden, *args, **kwargs: hidden):
        monkeypatch.setattr(module, NAME, kernel)
        assert keep_rows_apart(model) == 0
        assert getattr(module, NAME) is kernel


def test_models_without_such_convolutions_are_left_alone():
    config = AutoConfig.for_model("llama", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    assert keep_rows_apart(AutoModelForCausalLM.from_config(config)) == 0
