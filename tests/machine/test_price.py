"""The price of an hour, and its source."""

from __future__ import annotations

import json

import pytest
from fake_nvml import FakeNvml, NoDriver

from qlora_helpers.base.config import TrainConfig
from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.machine import price, studio
from qlora_helpers.machine.instances import INSTANCES
from qlora_helpers.runs.budget import Budget, refuse_spent_budget
from qlora_helpers.runs.status import Status


class FourA10G(FakeNvml):
    def nvmlDeviceGetCount(self):
        return 4

    def nvmlDeviceGetName(self, handle):
        return "NVIDIA A10G"


class OneA10G(FourA10G):
    def nvmlDeviceGetCount(self):
        return 1


@pytest.fixture
def in_studio(tmp_path, monkeypatch):
    path = tmp_path / "resource-metadata.json"
    path.write_text(
        json.dumps({"AppType": "JupyterLab", "DomainId": "d-1", "SpaceName": "lab", "ResourceName": "default"})
    )
    monkeypatch.setattr(studio, "STUDIO_METADATA", path)
    monkeypatch.setattr(price, "BOARD_NAME", tmp_path / "product_name")
    monkeypatch.delenv("SM_CURRENT_INSTANCE_TYPE", raising=False)
    return tmp_path


def test_the_setting_overrides_the_catalogue(in_studio):
    assert price.machine_price(TrainConfig(usd_per_hour=1.5), FourA10G()) == price.Price(1.5, "as given")


def test_inside_sagemaker_the_instance_s_name_decides(in_studio, monkeypatch):
    (in_studio / "product_name").write_text("g5.2xlarge\n")
    assert price.machine_price(TrainConfig(), OneA10G()).usd_per_hour == INSTANCES["ml.g5.2xlarge"].price_usd_per_hour
    monkeypatch.setenv("SM_CURRENT_INSTANCE_TYPE", "ml.g6.xlarge")
    assert price.machine_price(TrainConfig(), OneA10G()).source.startswith("ml.g6.xlarge, us-east-1, ")
    monkeypatch.setenv("SM_CURRENT_INSTANCE_TYPE", "ml.p5e.48xlarge")  # catalogued without a price
    assert price.machine_price(TrainConfig(), OneA10G()) is None


def test_the_most_expensive_instance_with_these_gpus_counts(in_studio):
    with_one = [item.price_usd_per_hour for item in INSTANCES.values() if (item.gpu, item.gpus) == ("A10G", 1)]
    assert None in with_one and len(with_one) > 2  # those without a price don't count
    found = price.machine_price(TrainConfig(), OneA10G())
    assert found.usd_per_hour == max(item for item in with_one if item is not None)
    assert price.machine_price(TrainConfig(), FourA10G()).usd_per_hour == max(
        item.price_usd_per_hour for item in INSTANCES.values() if (item.gpu, item.gpus) == ("A10G", 4)
    )
    assert price.machine_price(TrainConfig(), NoDriver()) is None


def test_elsewhere_no_price_is_known_and_a_limit_in_dollars_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(studio, "STUDIO_METADATA", tmp_path / "nothing")
    monkeypatch.delenv("SM_CURRENT_INSTANCE_TYPE", raising=False)
    assert price.needed_price(TrainConfig(), OneA10G()) is None
    with pytest.raises(UserError, match=r"stop_at_usd is set, but .* is not known.*train.usd_per_hour=7.09"):
        price.needed_price(TrainConfig(stop_at_usd=2.0), OneA10G())


# the budget


def test_the_budget_counts_what_is_used():
    status = Status(started_at=1000.0, spent_usd=1.0, usd_per_hour=3.6)
    budget = Budget(TrainConfig(stop_at_usd=1.5, stop_at_minutes=10), status)
    assert budget.used(1100.0) == {"seconds": 100.0, "usd": 1.1}
    assert budget.exhausted(1499.0) is None
    assert budget.exhausted(1500.0) == "1.50 USD of train.stop_at_usd=1.5 are used"
    slow = Budget(TrainConfig(stop_at_minutes=10), Status(started_at=1000.0))
    assert slow.used(1599.0) == {"seconds": 599.0}
    assert slow.exhausted(1599.0) is None
    assert slow.exhausted(1600.0) == "10 min 00 s of train.stop_at_minutes=10 are over"


def test_patience_counts_from_the_best_loss_of_the_run():
    budget = Budget(TrainConfig(patience=2), Status(started_at=1.0), eval_losses=[2.0, 1.5])
    for loss, without in ((1.6, 1), (1.4, 0), (1.4, 1), (1.5, 2)):
        assert budget.exhausted() is None
        budget.evaluated(loss)
        assert budget.without_better == without
    assert budget.exhausted() == "no better evaluation loss than 1.4000 in 2 evaluations (train.patience)"


def test_dollars_that_are_spent_are_refused_before_anything_is_loaded():
    spent = Status(state="stopped", started_at=1000.0, heartbeat=1000.0 + 1800, spent_usd=1.0, usd_per_hour=2.0)
    refuse_spent_budget(TrainConfig(stop_at_usd=2.01), spent)
    with pytest.raises(RunError, match=r"the run has used 2.00 USD, and train.stop_at_usd is 2. Raise"):
        refuse_spent_budget(TrainConfig(stop_at_usd=2.0), spent)
    assert spent.next_session().spent_usd == 2.0
    assert spent.next_session().spent_s == 1800
