"""Hardware as people write it, and the facts behind it."""

from __future__ import annotations

import math
import re

import pytest

from qlora_helpers.base.errors import UserError
from qlora_helpers.machine.hardware import GPUS, find_gpu, parse_gpus
from qlora_helpers.machine.instances import INSTANCES
from qlora_helpers.machine.links import LINKS


@pytest.mark.parametrize(
    ("text", "gpus", "usable_gib", "name"),
    [
        ("24GiB", 1, 24, None),
        ("4x24GiB", 4, 24, None),
        ("4 x 24 gib", 4, 24, None),
        ("1x7.5GiB", 1, 7.5, None),
        ("4x24 GB", 4, 24e9 / 1024**3, None),
        ("H100", 1, 79.11, "H100"),
        ("2xA100-80GB", 2, GPUS["A100-80GB"].usable_gib, "A100-80GB"),
        ("8X rtx 4090", 8, GPUS["RTX-4090"].usable_gib, "RTX-4090"),
        ("4090", 1, GPUS["RTX-4090"].usable_gib, "RTX-4090"),
        ("RTX4090", 1, GPUS["RTX-4090"].usable_gib, "RTX-4090"),
        ("NVIDIA GeForce RTX 3090", 1, GPUS["RTX-3090"].usable_gib, "RTX-3090"),
        ("2x3090", 2, GPUS["RTX-3090"].usable_gib, "RTX-3090"),
        ("Tesla T4", 1, GPUS["T4"].usable_gib, "T4"),
        ("RTX 5090", 1, GPUS["RTX-5090"].usable_gib, "RTX-5090"),
        ("4x RTX A6000", 4, GPUS["RTX-A6000"].usable_gib, "RTX-A6000"),
        ("rtx 6000 ada", 1, GPUS["RTX-6000-Ada"].usable_gib, "RTX-6000-Ada"),
        ("RTX PRO 6000", 1, GPUS["RTX-PRO-6000"].usable_gib, "RTX-PRO-6000"),
        ("3060", 1, GPUS["RTX-3060"].usable_gib, "RTX-3060"),
        ("L40", 1, GPUS["L40"].usable_gib, "L40"),
        ("8xB200", 8, GPUS["B200"].usable_gib, "B200"),
        ("L40S", 1, GPUS["L40S"].usable_gib, "L40S"),
        ("h200", 1, GPUS["H200"].usable_gib, "H200"),
        ("A100 80GB", 1, GPUS["A100-80GB"].usable_gib, "A100-80GB"),
        ("A100", 1, GPUS["A100-40GB"].usable_gib, "A100-40GB"),  # what fits there fits on both
        ("ml.g5.12xlarge", 4, GPUS["A10G"].usable_gib, "A10G"),
        ("ML.P5.4xlarge", 1, GPUS["H100"].usable_gib, "H100"),
    ],
)
def test_hardware_is_read_as_people_write_it(text, gpus, usable_gib, name):
    hardware = parse_gpus(text)
    assert (hardware.gpus, hardware.gpu and hardware.gpu.name) == (gpus, name)
    assert math.isclose(hardware.usable_gib, usable_gib)
    assert parse_gpus(hardware.label) == hardware  # a label can be parsed again


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "24",
        "4x",
        "x24GiB",
        "4x24",
        "0x24GiB",
        "4x0GiB",
        "24MiB",
        "B300",
        "0xH100",
        "ml.g9.xlarge",
        "0xml.g5.xlarge",
    ],
)
def test_other_hardware_is_refused_with_one_message(text):
    with pytest.raises(UserError) as caught:
        parse_gpus(text)
    message = str(caught.value)
    assert "4x24GiB" in message and "A100-80GB" in message and "ml.g5.12xlarge" in message
    assert (text.strip() or "got nothing") in message


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("ml.g4dn.metal", "xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge"),
        (" ML.g5.3xlarge ", "xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge 24xlarge 48xlarge"),
        ("g6.12xlarge", "xlarge 2xlarge 4xlarge 8xlarge 12xlarge 16xlarge 24xlarge 48xlarge"),
        ("ml.p5.", "4xlarge 48xlarge"),
        ("ml.p4d", "24xlarge"),
    ],
)
def test_an_unknown_size_of_a_known_family_names_the_known_ones(text, sizes):
    with pytest.raises(UserError) as caught:
        parse_gpus(text)
    family = text.strip().lower().removeprefix("ml.").split(".")[0]
    known = ", ".join(f"ml.{family}.{size}" for size in sizes.split())
    assert f"no instance ml.{family} of that size is known; expected {known}; got {text.strip()}." in str(caught.value)


def test_a_price_is_dated_and_can_be_overridden():
    dated = parse_gpus("ml.g5.12xlarge")
    assert dated.price_usd_per_hour == 7.09
    assert "us-east-1, mid 2026" in dated.price_note
    own = parse_gpus("ml.g5.12xlarge", price=5.5)
    assert (own.price_usd_per_hour, own.price_note) == (5.5, "as given")
    assert parse_gpus("4x24GiB", price=0).price_usd_per_hour == 0
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="this is not a price"):
            parse_gpus("H100", price=wrong)


def test_a_machine_has_at_most_64_gpus():
    assert parse_gpus("64xH100").gpus == 64
    for text in ("65xH100", "0xH100", "100000xH100", "9" * 5000 + "xH100"):
        with pytest.raises(UserError, match="these GPUs are not known"):
            parse_gpus(text)


def test_hardware_without_a_price_has_no_price_note():
    for text in ("4x24GiB", "2xL4", "ml.p5en.48xlarge", "ml.g6e.16xlarge"):
        hardware = parse_gpus(text)
        assert (hardware.price_usd_per_hour, hardware.price_note) == (None, "")


def test_prices_are_dated_and_have_a_source():
    for instance in INSTANCES.values():
        if instance.price_usd_per_hour is None:
            assert not (instance.region or instance.priced_on or instance.source)
            continue
        assert instance.price_usd_per_hour > 0
        assert re.fullmatch(r"mid 2026|2026-\d\d-\d\d", instance.priced_on)
        assert re.fullmatch(r"us-(east|west)-\d", instance.region)
        assert instance.source


def test_the_prices_that_were_checked():
    prices = {name: (INSTANCES[name].price_usd_per_hour, INSTANCES[name].region) for name in INSTANCES}
    assert prices["ml.g6.12xlarge"] == (5.75, "us-east-1")
    assert prices["ml.g6e.12xlarge"] == (13.12, "us-east-1")
    assert prices["ml.p4d.24xlarge"] == (25.25, "us-west-2")
    assert prices["ml.p5.48xlarge"] == (63.30, "us-west-2")


def test_every_instance_has_a_known_gpu_and_more_of_them_cost_more():
    assert {name.split(".")[1] for name in INSTANCES} == {"g4dn", "g5", "g6", "g6e", "p4d", "p4de", "p5", "p5e", "p5en"}
    assert {instance.gpu for instance in INSTANCES.values()} <= set(GPUS)
    assert {instance.gpus for instance in INSTANCES.values()} == {1, 4, 8}
    for family in ("g4dn", "g5", "g6", "g6e", "p5"):
        of_family = [instance for name, instance in INSTANCES.items() if name.split(".")[1] == family]
        prices = [one.price_usd_per_hour for one in of_family if one.price_usd_per_hour is not None]
        assert len(prices) >= 2 and prices == sorted(prices)


@pytest.mark.parametrize(("family", "gpu"), [("g4dn", "T4"), ("g5", "A10G"), ("g6", "L4"), ("g6e", "L40S")])
def test_every_size_of_a_family_is_known_with_its_gpus(family, gpu):
    """As in AWS' tables of accelerated instances; SageMaker does not offer g4dn.metal."""
    gpus = {"xlarge": 1, "2xlarge": 1, "4xlarge": 1, "8xlarge": 1, "12xlarge": 4, "16xlarge": 1}
    gpus |= {"24xlarge": 4, "48xlarge": 8} if family != "g4dn" else {}
    found = {name: (one.gpu, one.gpus) for name, one in INSTANCES.items() if name.startswith(f"ml.{family}.")}
    assert found == {f"ml.{family}.{size}": (gpu, count) for size, count in gpus.items()}


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_less_of_a_gpu_is_usable_than_it_is_sold_as(gpu):
    assert 0.85 * gpu.memory_gib < gpu.usable_gib < gpu.memory_gib
    assert gpu.name in GPUS


def test_only_what_was_measured_counts_as_measured():
    assert {name for name, gpu in GPUS.items() if gpu.measured} == {"H100", "H200"}
    assert {name for name, gpu in GPUS.items() if not gpu.supports_bf16} == {"T4"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("MI300X", "AMD GPU"),
        ("2x MI250", "AMD GPU"),
        ("AMD Instinct MI210", "AMD GPU"),
        ("M3", "Apple chip"),
        ("P100", "without tensor cores"),
        ("K80", "no longer supports"),
        ("Gaudi2", "Intel accelerator"),
        ("trn1.32xlarge", "Trainium"),
        ("ml.inf2.xlarge", "Inferentia"),
    ],
)
def test_hardware_that_can_not_be_used_is_refused_with_the_reason(text, reason):
    with pytest.raises(UserError, match=f"can't be planned: it is .*{reason}"):
        parse_gpus(text)


@pytest.mark.parametrize(
    ("text", "near"),
    [("L4OS", "L40S"), ("RTX-4060", "RTX-4090"), ("2xA16", "A10G"), ("H10O", "H100"), ("A100-8OGB", "A100-80GB")],
)
def test_a_near_name_is_suggested(text, near):
    with pytest.raises(UserError, match=f"Did you mean .*{near}"):
        parse_gpus(text)


def test_an_instance_without_these_gpus_is_not_called_something_else():
    with pytest.raises(UserError, match="these GPUs are not known"):
        parse_gpus("ml.p3.2xlarge")


@pytest.mark.parametrize(
    ("driver_name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIE"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("Tesla T4", "T4"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX-PRO-6000"),
        ("NVIDIA GeForce RTX 3080", "RTX-3080"),
        ("NVIDIA GeForce RTX 5090", "RTX-5090"),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA RTX 6000", None),
    ],
)
def test_a_drivers_name_is_that_card_or_none(driver_name, known):
    found = find_gpu(driver_name)
    assert (found.name if found else None) == known


def test_every_card_knows_its_link_and_less_memory_than_it_is_sold_with():
    assert set(LINKS) == set(GPUS)
    for gpu in GPUS.values():
        assert 0.85 * gpu.memory_gib < gpu.usable_gib < gpu.memory_gib
        assert gpu.fp8_tflops == 0 or gpu.fp8_tflops == pytest.approx(2 * gpu.bf16_tflops, rel=0.02)
