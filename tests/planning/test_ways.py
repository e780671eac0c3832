"""Ways to use several GPUs: what each holds and sends, which one the plan takes, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_helpers.base.config import TrainConfig
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import GPUS, parse_gpus
from qlora_helpers.machine.instances import INSTANCES
from qlora_helpers.machine.links import LINKS, NVLINK_4, PCIE_4
from qlora_helpers.model.shapes.catalog import known_shape
from qlora_helpers.planning.candidates import candidate
from qlora_helpers.planning.exchange import exchange
from qlora_helpers.planning.layout import WAYS, layouts
from qlora_helpers.planning.memory import packed_bytes
from qlora_helpers.planning.plan import Plan, make_plan
from qlora_helpers.planning.run_plan import plan_run
from qlora_helpers.planning.speed import step_time
from qlora_helpers.planning.workload import Workload

RECIPE = profile_config("falcon-40b")


def workload(gpus: str, *settings: str, model: str = "tiiuae/falcon-40b") -> Workload:
    config = RECIPE.with_settings([f"model.name={model}", *settings])
    return Workload(config, known_shape(model), parse_gpus(gpus), 2_800_000)


def ways(plan: Plan) -> dict[str, bool]:
    return {each.share: each.fits for each in plan.ways}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("model.name=random:mixtral-8x7b",), "experts can't be shared out"),
        (("adapter.use_dora=true",), "DoRA reads whole weights"),
        (("model.quantization=none",), "no 4-bit weights"),
    ],
)
def test_shards_are_not_offered_where_they_are_refused(settings, reason):
    """`model.sharding` and `model.lora` refuse them when they are loaded."""
    model = "random:mixtral-8x7b" if "mixtral" in settings[0] else "tiiuae/falcon-40b"
    given = workload("ml.g5.12xlarge", *settings, model=model)
    assert reason in given.not_shared and all(each.shards == 1 for each in given.layouts)
    plan = make_plan(given)
    shards = next(each for each in plan.ways if each.share == "shards")
    assert shards.best is None and not shards.fits and reason in shards.why_not
    assert plan.choice is None or plan.choice.share != "shards"
    assert not workload("ml.g5.12xlarge").not_shared


def test_the_ways_are_those_of_the_setting():
    (setting,) = [each for each in TrainConfig.__dataclass_fields__.values() if each.name == "share"]
    assert {"auto", *WAYS} == set(setting.metadata["choices"])


def test_falcon_40b_on_four_cards_of_24_gib_is_sharded():
    """The recipe's instance: no card holds a copy, spread layers wait for each other, shards all work."""
    plan = plan_run(RECIPE, gpus="ml.g5.12xlarge")
    assert ways(plan) == {
        "one": False,
        "copies": False,
        "shards": True,
        "copies of shards": False,
        "spread": True,
    }
    assert plan.choice.share == "shards" and plan.choice.processes == 4
    spread = next(each.best for each in plan.ways if each.share == "spread")
    assert plan.choice.tokens_per_s > 3 * spread.tokens_per_s
    assert plan.choice.seconds < 4000 and plan.choice.dollars < 8 < 20 < spread.dollars
    assert plan.choice.micro_batch_size * plan.choice.gradient_accumulation_steps * 4 == 8
    assert "train.share=shards" in plan.choice.settings and "--set train.share=shards" in repr(plan)
    shown = repr(plan)
    assert "shards was chosen, in which each GPU holds a part of every layer" in shown
    assert "a whole copy would take 25.5 GiB on each GPU, of 22.0 usable" in shown
    assert "PCIe 4 (31.5 GB/s each way), hidden behind the layer before" in shown
    assert "times as fast as spread" in shown and "predicted, never measured" in shown
    assert "within one it is the same as shards" in shown
    html = plan._repr_html_()
    assert html.count("<table") == 2 and "ways to use the GPUs" in html
    told = {each["share"]: each for each in plan.to_dict()["ways"]}
    assert len(told["spread"]["peak_gib"]) == 4 and told["shards"]["tokens_per_s"] == plan.choice.tokens_per_s


def test_a_prototype_of_shards_took_what_is_predicted():
    """Falcon-40B on two H200s, 4 x 2,048 tokens a GPU, all layers checkpointed, no output skipped: measured once with a throw-away
    prototype, 4,176 tokens/s together and 22.8 GiB at most."""
    asked = workload("2xH200")
    step = asked.step(micro_batch_size=4, compiled=True, shards=2, checkpointed=60, skipped=False, fp8=False)
    found = candidate(asked, step, gpus=1, gradient_accumulation_steps=1)
    assert found.tokens_per_s == pytest.approx(4176, rel=0.1)
    assert gib(found.memory[0].allocated) == pytest.approx(22.8, rel=0.03)


def test_each_gpu_holds_its_part_and_a_few_whole_layers():
    asked = workload("4xL4")
    whole, part = (
        candidate(asked, asked.step(micro_batch_size=1, checkpointed=60, **more), gpus=1, gradient_accumulation_steps=2)
        for more in ({}, {"shards": 4})
    )
    one, shard = whole.memory[0], part.memory[0]
    assert shard.weights_quantized == one.weights_quantized / 4
    assert shard.constants == pytest.approx(one.constants / 4, rel=1e-6) and shard.weights_other == one.weights_other
    assert one.gathered == 0 and shard.gathered == 3 * packed_bytes(asked.sizes, asked.step())
    assert shard.gathered == pytest.approx(3 * (one.weights_quantized + one.constants) / 60, rel=1e-6)
    assert shard.adapters == one.adapters and shard.gradients == 2 * one.gradients  # whole in every process
    assert shard.total == sum(round(value * 2**30) for value in shard.parts_gib().values())


def test_what_is_sent_takes_time_only_where_the_link_is_slower_than_the_layer_before():
    asked = workload("4xL4")
    step = asked.step(micro_batch_size=1, shards=4, checkpointed=60)
    time = step_time(asked.sizes, step, asked.gpu)
    gathered = 3 / 4 * packed_bytes(asked.sizes, step)
    quick, slow = (
        exchange(asked.sizes, step, replace(asked.hardware, found_link=link), time)
        for link in (NVLINK_4, replace(PCIE_4, gb_s=0.5))
    )
    assert quick.gathered_bytes == slow.gathered_bytes == gathered
    assert quick.gather_s == pytest.approx(gathered / (450e9 * 0.75))
    assert quick.waits_s == pytest.approx(2 * quick.gather_s)  # the first layer's alone
    assert quick.average_s == pytest.approx(2 * 3 / 4 * 4 * step.adapter_parameters / NVLINK_4.bytes_s)
    computing = time.forward_s + time.backward_s
    assert slow.waits_s > 2 * 60 * slow.gather_s - computing > 10 * quick.waits_s


def test_copies_send_gradients_over_the_slowest_link_alone():
    one, two = workload("ml.g5.12xlarge"), workload("2xml.g5.12xlarge")
    step = one.step(micro_batch_size=1, copies=4)
    time = step_time(one.sizes, step, one.gpu)
    inside, across = (exchange(each.sizes, step, each.hardware, time) for each in (one, two))
    assert inside.waits_s == across.waits_s == 0
    assert inside.average_s == pytest.approx(2 * 3 / 4 * 4 * step.adapter_parameters / PCIE_4.bytes_s)
    assert across.average_s == inside.average_s  # four copies find room in one machine
    eight = exchange(two.sizes, replace(step, copies=8), two.hardware, time)
    assert eight.average_s > 2 * inside.average_s  # 40 Gbit/s


def test_between_machines_copies_of_shards_are_taken_where_no_card_holds_a_copy():
    plan = make_plan(workload("2xml.g5.12xlarge"))
    assert plan.choice.share == "copies of shards" and (plan.choice.copies, plan.choice.step.shards) == (2, 4)
    assert "'train.share=copies of shards'" in repr(plan)  # quoted, to be copied
    sharded = next(each.best for each in plan.ways if each.share == "shards")
    assert sharded.exchange.waits_s > 10 * plan.choice.exchange.waits_s  # every layer crosses the network
    assert "can't reach the GPUs of another machine" in repr(plan)
    assert plan.hardware.price_usd_per_hour == 2 * 7.09


def test_of_two_ways_that_are_about_as_fast_the_simpler_is_taken():
    plan = make_plan(workload("2xH200"))
    fast = {each.share: each.best.seconds for each in plan.ways if each.fits}
    assert plan.choice.share == "copies" and fast["copies"] < 1.05 * fast["shards"]
    assert "shards would be about as fast" in plan.reason


def test_a_way_that_is_asked_for_is_taken_and_shown_beside_the_others():
    plan = make_plan(workload("ml.g5.12xlarge", "train.share=spread"))
    assert plan.choice.share == "spread" and ways(plan)["shards"]


def test_only_what_was_measured_on_these_cards_is_called_measured():
    measured = {each.share: each.measured for each in make_plan(workload("2xH200")).ways}
    assert measured == {
        "one": False,
        "copies": True,
        "shards": False,
        "copies of shards": False,
        "spread": True,
    }
    assert not any(each.measured for each in make_plan(workload("2xA100-80GB")).ways)


def test_one_gpu_and_one_process_have_nothing_to_choose():
    assert make_plan(workload("H200")).ways == () == make_plan(replace(workload("2xH200"), one_process=True)).ways
    assert "ways to use" not in repr(make_plan(workload("H200")))


def test_sequences_that_can_not_be_shared_say_so():
    alone = ("train.micro_batch_size=1", "train.gradient_accumulation_steps=1")
    plan = make_plan(workload("2xH200", *alone))
    assert {each.share for each in plan.ways if each.best} == {"one", "spread"}
    assert "an optimizer step of 1 sequence can't be shared evenly" in repr(plan)
    assert [each.gpus for each in layouts(3, 1, 8)] == [1, 2, 2, 3]


def test_every_card_has_a_link_and_every_instance_a_network():
    assert set(LINKS) == set(GPUS)
    assert all(instance.network.gb_s > 1 and instance.network.source for instance in INSTANCES.values())
    assert all(link.source and 0 < link.collective_share < 1 for link in LINKS.values())
    two = parse_gpus("2x ml.p5.48xlarge")
    assert (two.gpus, two.machines, two.gpus_per_machine, two.label) == (16, 2, 8, "2xml.p5.48xlarge")
    assert two.between_machines.gb_s == 400
