"""Rounding to FP8 against float64: plain torch, and the same Triton kernels that a GPU runs where Triton can be imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import bitsandbytes.functional as F
import pytest
import torch

from qlora_helpers.training.fast_step.fp8_kernels import E4M3, LARGEST, has_kernels, nf4_to_fp8, nf4_values, rows_to_fp8

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(192, 576), (96, 128), (130, 320)]  # tiles that end inside and outside the weight


@pytest.mark.skipif(INTERPRETED, reason="this is what it starts")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_do_the_same_in_triton_s_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ended = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


def test_a_cpu_takes_the_kernels_in_the_interpreter_alone():
    assert has_kernels(torch.device("cpu")) is INTERPRETED


def packed(shape, nested):
    torch.manual_seed(0)
    weights, state = F.quantize_4bit(torch.randn(shape) * 0.02, compress_statistics=nested, quant_type="nf4")
    second = state.state2 if nested else None
    nested_parts = (second.code, second.absmax, state.offset) if nested else (None, None, None)
    return weights, state, (state.code, *nested_parts, list(shape))


@pytest.mark.parametrize("nested", [True, False], ids=["double quantisation", "single"])
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacked_weights_are_those_of_bitsandbytes(shape, nested):
    weights, state, rest = packed(shape, nested)
    assert torch.equal(nf4_values(weights, state.absmax, *rest), F.dequantize_4bit(weights, state))


@pytest.mark.parametrize("transposed", [False, True], ids=["by rows", "transposed, by columns"])
@pytest.mark.parametrize("nested", [True, False], ids=["double quantisation", "single"])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_in_fp8_are_the_nearest_to_float64(shape, nested, transposed):
    weights, state, rest = packed(shape, nested)
    exact = F.dequantize_4bit(weights, state).double()
    exact = exact.t() if transposed else exact
    largest = exact.abs().amax(1).float()
    found = nf4_to_fp8(weights, state.absmax, LARGEST / largest, *rest, transposed)
    assert found.dtype == E4M3 and found.is_contiguous() and found.shape == exact.shape
    scaled = exact * (LARGEST / largest.double())[:, None]
    # Half a unit in the last of 3 places, and half of the smallest number that is not 0.
    assert ((found.double() - scaled).abs() <= scaled.abs() * 2**-4 * 1.0001 + 2**-10).all()
    assert found.double().abs().amax(1).eq(LARGEST).all(), "each row's largest is the largest there is"


def test_each_row_has_a_scale_of_its_own():
    torch.manual_seed(0)
    x = torch.randn(33, 200) * torch.logspace(-30, 30, 33)[:, None]
    values, scales = rows_to_fp8(x)
    apart = (values.double() * scales.double() - x.double()).norm(dim=1) / x.double().norm(dim=1)
    assert values.dtype == E4M3 and scales.shape == (33, 1)
    assert apart.max() < 0.035


def test_a_row_of_zeros_stays_zero():
    values, scales = rows_to_fp8(torch.zeros(2, 48))
    assert values.float().eq(0).all() and scales.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_value_that_is_not_finite_spoils_its_row_alone(bad):
    x = torch.ones(3, 48)
    x[1, 7] = bad
    values, scales = rows_to_fp8(x)
    found = (values.float() * scales).sum(1)
    assert found[0] == found[2] == 48 and not found[1].isfinite()
