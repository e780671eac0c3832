"""Since when a run's weights are suspect: counted cases of explosions that must be dated, and of healthy runs that must pass."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict

import pytest
import torch

from qlora_helpers.base.records import read_record
from qlora_helpers.training.health import JUMP, LEAST, RISE_NATS, Evidence, Health, norm_bound
from qlora_helpers.training.loss_watch import LossWatch, Measured

NAN = float("nan")
FIFTY = range(50)
# A tiny model at learning rate 1.0, as measured: its loss shows nothing, and every other norm is far below the first.
EXPLODED_LOSSES = [7.719, 7.614, 7.454, 7.384, 7.898, 7.564, 7.54, 7.589]
EXPLODED_NORMS = [1.14, 1857, 0.01907, 1.022e07, 0.05877, 80.1, 3.692e09, 3.124e16]


def health_of(losses, norms) -> Health:
    health = Health()
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        health.add(step, loss, norm)
    return health


def ever_suspect(losses, norms) -> list[int]:
    """The steps at which a run that goes well was suspect."""
    health, found = Health(), []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        health.add(step, loss, norm)
        found += [step] if health.since else []
    return found


# what must be dated


def test_an_explosion_is_dated_by_its_first_jump_though_its_norms_fall_in_between():
    health = health_of(EXPLODED_LOSSES, EXPLODED_NORMS)
    assert (health.since, health.why) == (2, "the gradient norm jumped to 1857 at step 2, where 1.1 was usual")


@pytest.mark.parametrize("start", [1, 5, 40, 200])
def test_an_explosion_after_healthy_steps_is_dated(start):
    draw = random.Random(start)
    losses = [7.0 - 0.01 * step + draw.gauss(0, 0.2) for step in range(start)]
    norms = [math.exp(draw.gauss(0, 0.4)) for _ in range(start)]
    health = health_of(losses + EXPLODED_LOSSES[1:], norms + [norm * 20 for norm in EXPLODED_NORMS[1:]])
    assert health.since == start + 1


def test_a_loss_above_that_of_the_untrained_adapter_is_dated_while_few_steps_are_known():
    health = health_of([2.0, 1.9, 2.0 + RISE_NATS + 0.1, 6.0], [1.0] * 4)
    assert (health.since, health.why) == (3, "the loss rose to 4.10 at step 3, where 1.95 was usual")


def test_a_loss_that_rises_by_steps_is_dated_by_the_first():
    health = health_of([2.0] * 20 + [4.5, 5.0, 6.0, 7.0, 8.0], [1.0] * 25)
    assert health.since == 21, "abnormal steps do not raise the level"


def test_norms_that_leap_never_become_the_level():
    norms = [1.0] * 20 + [1e3, 1e-2] * 40
    assert health_of([2.0] * 100, norms).since == 21


def test_a_jump_that_follows_collapsed_norms_is_dated_by_these():
    """A tiny model whose learning rate was raised to 1.0 at step 5, as measured."""
    norms = [1.14, 1.1034, 1.1311, 1.152, 1.1775, 0.048855, 0.0098552, 15.152, 2218]
    losses = [7.7, 7.65, 7.67, 7.58, 7.55, 7.37, 7.35, 8.07, 8.0]
    before = health_of(losses[:7], norms[:7])
    assert (before.since, before.doubtful_since) == (0, 6), "the checkpoint from before step 6 is kept"
    health = health_of(losses, norms)
    what = "the gradient norm jumped to 15.15 at step 8, where 1.1 was usual, after the norm had collapsed at step 6"
    assert (health.since, health.why) == (6, what)


# what must pass


def noisy(seed, spread):
    """Losses that fall, and norms with this spread of their logarithms; clipping changes none, they are from before it."""
    draw = random.Random(seed)
    losses = [2.0 + 5.0 * math.exp(-step / 30) + draw.gauss(0, 0.3) for step in range(400)]
    return losses, [math.exp(draw.gauss(0, spread)) for _ in range(400)]


def test_ordinary_noise_is_never_suspect():
    """19 of 20 norms within a factor of 2.2 of the middle one."""
    assert sum(len(ever_suspect(*noisy(seed, 0.4))) for seed in FIFTY) == 0


def test_a_failure_in_a_very_noisy_run_costs_at_most_the_checkpoints_of_ten_steps():
    """Norms within a factor of 4: a run that fails for another reason seldom does so within a suspicion, and each is short."""
    suspect = [ever_suspect(*noisy(seed, 0.7)) for seed in FIFTY]
    assert sum(map(len, suspect)) <= 30, "of 20,000 steps"
    assert all(each[-1] - each[0] < LEAST for each in suspect if each)


@pytest.mark.parametrize("seed", FIFTY)
def test_a_warm_up_is_never_suspect(seed):
    """Norms grow with B, up to twentyfold in 100 steps, and the loss begins to fall late."""
    draw = random.Random(seed)
    norms = [0.1 * (1 + 0.19 * min(step, 100)) * math.exp(draw.gauss(0, 0.2)) for step in range(200)]
    losses = [7.7 - 0.04 * max(0, step - 50) + draw.gauss(0, 0.2) for step in range(200)]
    assert ever_suspect(losses, norms) == []


@pytest.mark.parametrize("first", [5.0, 50.0, 5e3, 5e6])
def test_a_large_first_norm_is_never_suspect_and_hides_no_later_jump(first):
    """While B is zero, only B has a gradient."""
    norms = [first] + [1.0] * 30
    assert ever_suspect([2.0] * 31, norms) == []
    assert health_of([2.0] * 32, [*norms, 12.0]).since == 32


def test_a_single_hard_batch_and_a_single_high_norm_are_forgotten():
    losses, norms = [2.0] * 40, [1.0] * 40
    losses[20], norms[30] = 9.0, 500.0
    assert ever_suspect(losses, norms) == [21, 22, 23, 31, 32, 33]
    health = health_of(losses, norms)
    assert (health.since, health.why, max(health.losses), max(health.norms)) == (0, "", 2.0, 1.0)


def test_a_level_that_has_moved_is_no_explosion():
    """Other data begin at step 51: twenty times the norm, and the loss as before."""
    suspect = ever_suspect([2.0] * 100, [1.0] * 50 + [20.0] * 50)
    assert suspect == list(range(51, 51 + LEAST - 1))


def test_norms_of_zero_are_no_level():
    """A learning rate of zero, or a batch without a trained token."""
    assert ever_suspect([2.0] * 20, [0.0] * 5 + [1.0] * 5 + [0.0] * 3 + [1.0] * 7) == []
    assert norm_bound([0.0, 0.0]) == math.inf
    assert norm_bound([0.0, 2.0]) == 2.0 * JUMP


def test_old_checkpoints_bring_no_evidence():
    health = Health()
    health.restore(Evidence())
    health.add(21, 2.0, 1e9)
    assert health.since == 0, "there is nothing to compare with"


# what a checkpoint keeps


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_session_that_goes_on_judges_as_one_that_never_ended(cut, tmp_path):
    losses, norms = [7.7] * 3 + EXPLODED_LOSSES[1:] + [7.5] * 12, [1.0, 1.0, 0.05] + EXPLODED_NORMS[1:] + [1.0] * 12
    whole, first = health_of(losses, norms), health_of(losses[:cut], norms[:cut])
    (tmp_path / "kept.json").write_text(json.dumps(asdict(first.evidence())))
    second = Health()
    second.restore(read_record(tmp_path / "kept.json", Evidence))
    for step in range(cut, len(losses)):
        second.add(step + 1, losses[step], norms[step])
    assert second == whole


# in the watch


def run(watch, losses, norms, *, look_every=1):
    """Feeds steps of one forward pass each; returns the first trouble."""
    for number, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        watch.add(torch.tensor(loss), torch.tensor([7]))
        watch.end_step(number, torch.tensor(norm))
        if number % look_every == 0 and (trouble := watch.look(wait=True)):
            return trouble
    return watch.look(wait=True)


@pytest.mark.parametrize("look_every", [1, 2, 5, 10, 100])
def test_how_often_values_are_logged_changes_nothing(look_every):
    trouble = run(LossWatch(), [*EXPLODED_LOSSES, 7.5], [*EXPLODED_NORMS, NAN], look_every=look_every)
    assert (trouble.step, trouble.since) == (9, 2)
    assert run(LossWatch(), [2.0] * 60, [30.0] + [1.0] * 59, look_every=look_every) is None


def test_one_row_that_gives_no_finite_loss_sets_nothing_aside():
    watch = LossWatch()
    for number in range(1, 31):
        for loss in (2.0, NAN if number == 30 else 2.0):
            watch.add(torch.tensor(loss), torch.tensor([number]))
        watch.end_step(number, NAN if number == 30 else 1.0)
    trouble = watch.look(wait=True)
    assert (trouble.step, trouble.batch, trouble.since) == (30, 2, None)


def test_weights_that_give_no_finite_loss_at_all_are_spoilt():
    trouble = run(LossWatch(), [2.0] * 29 + [NAN], [1.0] * 29 + [NAN])
    assert (trouble.step, trouble.since) == (30, 30)
    assert trouble.evidence == "the loss is no longer a finite number (nan) at step 30"


def test_skipped_float16_steps_are_no_evidence():
    norms = [1.0] * 12 + [math.inf] * 8 + [1.0] * 12
    watch = LossWatch(may_overflow=True)
    assert run(watch, [2.0] * 32, norms) is None
    assert watch.health.since == 0


# of several processes


def together(of_all) -> list:
    """What each of several processes finds, all of which look at the values of all."""
    found = []
    for steps in of_all:
        watch = LossWatch()
        for each in steps:
            watch.add(torch.tensor(each.losses[0]), torch.tensor(each.blocks[0]))
            watch.end_step(each.number, each.norm)
        found.append(watch.look_together(lambda own: of_all))
    return found


def steps_of(losses, block) -> list[Measured]:
    return [Measured(number, [loss], 1.0, [(block,)]) for number, loss in enumerate(losses, start=1)]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_all_processes_find_an_explosion_in_one_of_them(rank):
    of_all = [steps_of([2.0] * 20 + [20.0 if rank == each else 2.0] * 5, each) for each in range(3)]
    one, *others = together(of_all)
    assert (one.step, one.process, one.blocks, one.since) == (21, rank + 1, (rank,), 21)
    assert all(other == one for other in others)


def test_all_processes_find_the_process_whose_loss_is_not_finite():
    of_all = [steps_of([2.0] * 5 + [2.0], 3), steps_of([2.0] * 5 + [NAN], 4)]
    one, other = together(of_all)
    assert one == other
    assert (one.step, one.process, one.blocks, one.since) == (6, 2, (4,), None)
