"""Starting on free GPUs: which are taken, how they share the work, and that a step learns from the same sequences on any number."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_nvml import FakeNvml

from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.place import at
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.machine import telemetry
from qlora_helpers.machine.hardware import parse_gpus
from qlora_helpers.planning import choosing, run_plan, starting
from qlora_helpers.planning.layout import Layout
from qlora_helpers.planning.out_of_memory import OutOfMemory, next_settings, rescued
from qlora_helpers.runs import launch, locks
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.plan_file import read_plan

FALCON, LLAMA = "tiiuae/falcon-40b", "meta-llama/Llama-3.1-8B"
CARDS = ("GPU-a", "GPU-b", "GPU-c", "GPU-d")


@pytest.fixture
def machine(monkeypatch):
    """Makes this a machine with some cards, of which some are in use."""

    def of(card: str, count: int = 4, *, busy: tuple[str, ...] = (), used: dict[str, float] | None = None) -> None:
        cards = CARDS[:count]
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(locks, "visible_gpus", lambda: cards)
        monkeypatch.setattr(locks, "unlocked_gpus", lambda gpus: tuple(gpu for gpu in gpus if gpu not in busy))
        monkeypatch.setattr(locks, "refuse_busy_gpus", lambda gpus: refuse(busy, gpus))
        monkeypatch.setattr(choosing, "this_machine", lambda price=None: parse_gpus(f"{count}x{card}", price))
        monkeypatch.setattr(telemetry, "used_shares", lambda: dict.fromkeys(cards, 0.02) | (used or {}))

    return of


def refuse(busy, gpus) -> None:
    if set(busy) & set(gpus):
        raise RunError("another run is already training")


def config(model: str = FALCON, *settings: str):
    return profile_config("falcon-40b").with_settings([f"model.name={model}", *settings])


def test_all_free_gpus_are_taken_in_the_way_of_the_plan(machine):
    machine("A10G")
    chosen = choosing.choose(config())
    assert (chosen.gpus, chosen.share, chosen.processes) == (CARDS, "shards", 4)
    assert chosen.settings[choosing.MICRO] * chosen.settings[choosing.PASSES] * 4 == 8
    assert set(chosen.settings) == {choosing.SHARE, choosing.MICRO, choosing.PASSES}  # each process plans the rest
    assert "shards, 4 GPUs" in chosen.why and "predicted, never measured" in chosen.why
    assert " for 2,797,607 tokens" in chosen.why and "$" not in chosen.why  # a price that nobody knows
    machine("H200", 2)
    chosen = choosing.choose(config(LLAMA))
    assert (chosen.share, chosen.processes) == ("copies", 2) and "never measured" not in chosen.why


def test_gpus_that_others_use_are_passed_over(machine):
    machine("A10G", busy=("GPU-b",))
    assert choosing.choose(config(LLAMA)).gpus == ("GPU-a", "GPU-c")  # of three, two can share eight sequences
    machine("A10G", used={"GPU-a": 0.6, "GPU-d": 0.9})
    assert choosing.choose(config(LLAMA)).gpus == ("GPU-b", "GPU-c")
    assert choosing.choose(config(LLAMA), gpus=1).gpus == ("GPU-b",)
    assert len(choosing.choose(config(LLAMA), gpus=4).gpus) == 4  # asked for
    machine("A10G", 1, used={"GPU-a": 0.9})
    assert choosing.choose(config(LLAMA)).gpus == ("GPU-a",)  # there is no other
    machine("A10G", busy=CARDS)
    with pytest.raises(RunError, match="already training"):
        choosing.choose(config(LLAMA))


def test_ways_and_numbers_are_taken_as_asked(machine):
    machine("A10G")
    two = choosing.choose(config(LLAMA), gpus=2, share="shards")
    assert (two.gpus, two.share, two.processes) == (CARDS[:2], "shards", 2)
    spread = choosing.choose(config(), share="spread")
    assert (spread.gpus, spread.processes) == (CARDS, 1) and choosing.SHARE not in spread.settings
    assert spread.settings["train.checkpointed_layers"] is not None  # on several cards the trainer does not plan
    by_hand = choosing.choose(config(FALCON, "train.checkpointed_layers=60"), share="spread")
    assert "train.checkpointed_layers" not in by_hand.settings
    alone = choosing.choose(config(LLAMA), share="one")
    assert (alone.gpus, alone.processes) == (CARDS[:1], 1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"gpus": 5}, r"not as many free GPUs; expected at most 4; got gpus=5"),
        ({"gpus": 0}, r"at least one GPU or process"),
        ({"share": "copies"}, r"copies would not fit; expected at most 22.0 GiB on each GPU; got 25.5 GiB"),
        ({"share": "copies of shards"}, r"can't share the work as copies of shards; got takes several machines"),
        ({"share": "both"}, r"not known; expected auto, one, copies"),
    ],
)
def test_what_can_not_be_is_one_message(machine, asked, message):
    machine("A10G")
    with pytest.raises(UserError, match=message):
        choosing.choose(config(), **asked)


def test_what_can_not_be_planned_is_spread_as_before(machine, monkeypatch):
    machine("8GiB", 2)
    chosen = choosing.choose(config())
    assert (chosen.gpus, chosen.processes, chosen.settings) == (CARDS[:2], 1, {})
    assert "by the plan nothing fits" in chosen.why


def test_processes_on_a_cpu_share_a_step_evenly(monkeypatch):
    monkeypatch.setattr(locks, "visible_gpus", lambda: ())
    asked = profile_config("tiny").with_settings(["train.micro_batch_size=4", "train.gradient_accumulation_steps=3"])
    assert choosing.choose(asked) == choosing.Choice(None, "one", 1, {})
    two = choosing.choose(asked, gpus=2)
    assert (two.share, two.processes) == ("copies", 2)
    assert (two.settings[choosing.MICRO], two.settings[choosing.PASSES]) == (3, 2)
    assert choosing.choose(asked, gpus=2, share="shards").settings[choosing.SHARE] == "shards"
    assert choosing.choose(asked, gpus=2, nodes=2).processes == 4
    with pytest.raises(UserError, match=r"12 sequences can't be shared evenly; .* such as 4; got 5"):
        choosing.choose(asked, gpus=5)
    with pytest.raises(UserError, match="can't be spread over a CPU's processes"):
        choosing.choose(asked, gpus=2, share="spread")


@pytest.fixture
def started(monkeypatch) -> list[tuple[list[str], dict[str, str]]]:
    """Records what would be started: the command, and which GPUs it is shown."""
    found = []

    def detached(run, command, processes, gpus=None):
        found.append((command[command.index("train") + 2 :], launch.shown_gpus(gpus)))
        options = [each for each in command if each.startswith("train.")]
        run.save_config(run.config().with_settings(options))  # as the started process does
        return 4711

    monkeypatch.setattr(launch, "_start_detached", detached)
    return found


def test_a_run_goes_on_with_the_same_step_on_another_number_of_gpus(machine, started, tmp_path):
    run = Run(tmp_path / "runs" / "mine")
    run.save_config(config(LLAMA))
    machine("A10G")
    said = repr(starting.start(run))
    assert "Each GPU has the whole 4-bit model" in said and "process 4711" in said
    assert started[-1] == (["--set", "train.share=copies", *MICRO_2, "--processes", "4"], {})
    launched = read_plan(run).launched
    assert (launched.share, launched.processes, launched.gpus) == ("copies", 4, 4)
    machine("A10G", busy=("GPU-a", "GPU-c"))
    starting.start(run)
    command, shown = started[-1]
    assert shown == {"CUDA_VISIBLE_DEVICES": "1,3"} and command[-1] == "2"
    train = run.config().train
    assert train.micro_batch_size * train.gradient_accumulation_steps * 2 == 8
    machine("A10G", 1)
    starting.start(run)
    assert started[-1][0][-2:] == ["--processes", "1"]
    assert run.config() == config(LLAMA)  # as it was asked


MICRO_2 = ["--set", "train.micro_batch_size=2"]


def test_what_a_person_changes_after_a_start_counts(machine, started, tmp_path):
    run = Run(tmp_path / "runs" / "mine")
    run.save_config(config(LLAMA))
    machine("A10G")
    starting.start(run)
    run.save_config(run.config().with_settings(["train.gradient_accumulation_steps=8"]))
    starting.start(run)
    train = run.config().train
    assert train.micro_batch_size * train.gradient_accumulation_steps * 4 == 2 * 8  # a step of 16 sequences now
    run.save_config(run.config().with_settings(["train.share=spread"]))
    starting.start(run)
    assert started[-1][0][-2:] == ["--processes", "1"] and run.config().train.share == "spread"


def test_processes_start_with_the_settings_as_they_are(machine, started, tmp_path):
    run = Run(tmp_path / "runs" / "mine")
    run.save_config(config(LLAMA))
    machine("A10G")
    starting.start(run, processes=2)
    assert started == [(["--processes", "2"], {})] and read_plan(run).launched is None


def test_shown_gpus_keep_the_persons_own_choice(monkeypatch):
    monkeypatch.setattr(locks, "visible_gpus", lambda: ("GPU-c", "GPU-a"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 0")
    assert launch.shown_gpus(("GPU-a",)) == {"CUDA_VISIBLE_DEVICES": "0"}
    assert launch.shown_gpus(None) == launch.shown_gpus(("GPU-c", "GPU-a")) == {}


def test_the_share_of_memory_in_use_is_read_by_the_cards_ids():
    class Named(FakeNvml):
        def nvmlDeviceGetUUID(self, handle):
            return ["GPU-aaaa", "GPU-bbbb"][handle]

    assert telemetry.used_shares(Named()) == {"GPU-aaaa": 0.125, "GPU-bbbb": 0.125}
    assert replace(choosing.Choice(None, "one", 1, {})).why == ""


def out_of_memory_in_shards(run: Run, monkeypatch, card: str):
    """What the first of four processes reports that ran out of memory in shards; afterwards this is a single process again."""
    monkeypatch.setattr(run_plan, "this_machine", lambda price=None: parse_gpus(card))
    with monkeypatch.context() as several:
        for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4}.items():
            several.setenv(name, str(value))

        @rescued
        def step(run):
            with at("backward", facts=lambda: {"step": 3, "compiled": True, "checkpointed": 9}):
                raise MemoryError

        with pytest.raises(OutOfMemory) as caught:
            step(run)
    return caught.value


def test_a_start_after_shards_were_out_of_memory_takes_less_and_what_a_person_set_stays(
    machine, started, tmp_path, monkeypatch
):
    run = Run(tmp_path / "runs" / "mine")
    run.save_config(config())
    machine("A10G")
    starting.start(run)
    before = dict(zip(started[-1][0][::2], started[-1][0][1::2], strict=False))
    assert before["--processes"] == "4" and not any("checkpointed" in each for each in started[-1][0])
    error = out_of_memory_in_shards(run, monkeypatch, "4xA10G")
    failed = read_plan(run).out_of_memory
    assert 0 < failed.most_gib < 21.99 and failed.card_gib == 21.99
    assert f"at most {failed.most_gib:.1f} GiB" in str(error) and "ql.start(run)" in str(error)
    starting.start(run)
    train = run.config().train
    assert train.share == "shards" and train.micro_batch_size * train.gradient_accumulation_steps * 4 == 8
    held = run_plan.predicted_step(
        run.config(),
        hardware=parse_gpus("4xA10G"),
        compiled=train.compile == "on",
        checkpointed=train.checkpointed_layers,
        trained_share=0.2,
        layout=Layout(shards=4),
    )["reserved_gib"]["cuda:0"]
    assert train.checkpointed_layers > 9 and held + 0.75 <= failed.most_gib + 0.01
    machine("H200", 4)  # other cards: nothing is limited, and what was set for the small ones is undone
    starting.start(run)
    assert run.config().train.checkpointed_layers is None
    with pytest.raises(RunError, match="in several processes, and what would fit is for these"):
        next_settings(run)
