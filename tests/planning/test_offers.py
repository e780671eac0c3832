"""All hardware on which a training fits, where this machine has no GPU."""

from __future__ import annotations

import json
import subprocess
import sys

from qlora_helpers.base.profiles import profile_config
from qlora_helpers.machine.hardware import GPUS
from qlora_helpers.planning.offers import catalogued_hardware, find_offers
from qlora_helpers.planning.run_plan import plan_run

RECIPE = profile_config("falcon-40b")


def offers_for(model: str):
    return find_offers(RECIPE.with_settings({"model.name": model}), tokens=1_000_000)


def test_all_that_fit_are_offered_the_cheapest_first():
    found = offers_for("meta-llama/Llama-3.1-70B")
    prices = [each.choice.dollars for each in found.plans]
    known = [price for price in prices if price is not None]
    assert known == sorted(known) and prices[: len(known)] == known
    assert len(known) >= 8
    names = {each.hardware.label for each in found.plans}
    assert {"ml.p5.4xlarge", "A100-80GB"} <= names
    assert not {"ml.g5.xlarge", "RTX-4090"} & names, "too small"
    assert all(each.choice.peak_gib <= each.hardware.usable_gib for each in found.plans)


def test_an_offer_is_the_plan_for_that_hardware():
    config = RECIPE.with_settings({"model.name": "Qwen/Qwen3.5-9B"})
    first = find_offers(config, tokens=1_000_000).plans[0]
    assert first.choice == plan_run(config, gpus=first.hardware.label, tokens=1_000_000).choice


def test_each_card_and_number_of_cards_is_tried_once():
    kinds = [(each.gpu.name, each.gpus) for each in catalogued_hardware()]
    assert len(kinds) == len(set(kinds)) >= 20
    assert {name for name, _ in kinds} == set(GPUS)
    assert {each.label for each in catalogued_hardware()} >= {"ml.g5.xlarge", "H200"}
    assert "ml.g5.2xlarge" not in {each.label for each in catalogued_hardware()}, "the same card for more money"


def test_the_table_says_what_each_costs_and_when_that_was_read():
    text = repr(offers_for("openai/gpt-oss-20b"))
    assert "gpt-oss-20b: 20,914,757,184 parameters" in text
    assert "USD an hour" in text and "ml.g6e.xlarge (1 x L40S)" in text
    assert "2026-09-27" in text and "goes through 4 of 32" in text


def test_where_nothing_fits_the_closest_is_named():
    found = offers_for("llama-4-maverick")
    assert not found.plans or found.closest is None
    config = RECIPE.with_settings({"model.name": "deepseek-ai/DeepSeek-V3", "model.quantization": "none"})
    none = find_offers(config, tokens=1_000_000)
    assert none.plans == () and none.closest.shortfall_gib > 0
    assert "fits on none of these" in repr(none) and "would fit: --set model.quantization=nf4" in repr(none)


def test_the_command_without_a_gpu_lists_them():
    program = [sys.executable, "-m", "qlora_helpers", "plan", "--model", "Qwen/Qwen3-8B", "--json"]
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=60, env={"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr
    offers = json.loads(done.stdout)["offers"]
    assert (
        len(offers) >= 15 and offers[0]["hardware"] and offers[0]["choice"]["dollars"] <= offers[1]["choice"]["dollars"]
    )
