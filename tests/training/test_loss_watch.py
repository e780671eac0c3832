"""The watch over the loss: what it reports as trouble, what it lets pass, and that it waits only when it must."""

from __future__ import annotations

import math
import random

import pytest
import torch

from qlora_helpers.training.health import IN_A_ROW, LEAST, RISE_NATS, bound
from qlora_helpers.training.loss_watch import MOST_OVERFLOWS, LossWatch, _Step, rows_in_words

NAN = float("nan")


def feed(watch, steps, *, norm=1.0, first=1):
    """Feeds steps of one forward pass each, of packed sequence 7; returns the first trouble."""
    for number, loss in enumerate(steps, start=first):
        watch.add(torch.tensor(loss), torch.tensor([7]))
        watch.end_step(number, torch.tensor(norm))
        trouble = watch.look(wait=False)
        if trouble is not None:
            return trouble
    return None


def test_a_healthy_training_passes():
    draw = random.Random(0)
    losses = [2.0 + 9.0 * math.exp(-step / 20) + draw.gauss(0, 0.4) for step in range(300)]
    assert feed(LossWatch(), losses) is None


def test_a_single_hard_batch_passes():
    watch = LossWatch()
    assert feed(watch, [2.0] * 20 + [9.0] * (IN_A_ROW - 1) + [2.0] * 20) is None
    assert watch.suspects == []


def test_a_loss_that_stays_up_is_reported_with_its_first_step():
    trouble = feed(LossWatch(), [2.0] * 20 + [6.5, 9.0, 9.0])
    assert (trouble.step, trouble.exploded, trouble.batch, trouble.blocks) == (21, True, 1, (7,))
    assert trouble.what == "the loss exploded to 6.50, where 2.00 was usual"


def test_an_explosion_names_the_worst_forward_pass_of_its_step():
    watch = LossWatch()
    for number in range(1, 24):
        high = number > 20
        for loss, block in ((1.0, 3), (9.0 if high else 1.0, 5), (4.0 if high else 1.0, 8)):
            watch.add(torch.tensor(loss), torch.tensor([block]))
        watch.end_step(number, torch.tensor(1.0))
    trouble = watch.look(wait=True)
    assert (trouble.step, trouble.batch, trouble.batches, trouble.blocks) == (21, 2, 3, (5,))


def test_suspect_losses_do_not_move_the_median():
    watch = LossWatch()
    feed(watch, [2.0] * 20 + [9.0] * (IN_A_ROW - 1))
    assert len(watch.suspects) == IN_A_ROW - 1
    assert max(watch.recent) == 2.0


def test_no_loss_counts_as_exploded_at_the_start():
    assert feed(LossWatch(), [2.0] * (LEAST - 1) + [900.0]) is None
    assert bound([2.0] * (LEAST - 1)) == math.inf
    assert bound([2.0] * LEAST) == 2.0 + RISE_NATS


def test_the_bound_is_robust():
    draw = random.Random(1)
    noisy = [draw.gauss(3.0, 0.8) for _ in range(50)]
    assert bound([*noisy, 1000.0]) == pytest.approx(bound(noisy), abs=0.5)
    assert bound(noisy) > 3.0 + RISE_NATS


def test_the_third_high_loss_in_a_row_is_an_explosion():
    """The number is spelt out here, so that another one in the package fails."""
    assert IN_A_ROW == 3
    assert feed(LossWatch(), [2.0] * 20 + [9.0, 9.0, 2.0, 9.0, 9.0]) is None
    assert feed(LossWatch(), [2.0] * 20 + [9.0, 9.0, 9.0]).step == 21


def test_a_loss_two_nats_above_the_usual_is_suspect_where_losses_hardly_vary():
    assert bound([2.0] * 12) == 4.0


def test_the_usual_is_that_of_the_last_32_steps():
    losses = [6.0] * 100 + [3.0] * 20  # most of the last 32 are low, most of all are high
    trouble = feed(LossWatch(), [*losses, 6.5, 6.5, 6.5])
    assert trouble.what == "the loss exploded to 6.50, where 3.00 was usual"


def test_the_spread_is_that_of_one_loss_not_of_a_difference():
    """Of normal losses it estimates their standard deviation; a difference of two has sqrt(2) times as much."""
    draw = random.Random(2)
    losses = [draw.gauss(5.0, 1.5) for _ in range(20_000)]
    assert bound(losses) == pytest.approx(5.0 + 6 * 1.5, rel=0.02)


def test_a_loss_that_falls_does_not_widen_the_bound():
    falling = [8.0 - 0.15 * step for step in range(32)]
    assert bound(falling) == pytest.approx(8.0 - 0.15 * 15.5 + RISE_NATS)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_reported_at_once(value):
    watch = LossWatch()
    for loss, block in ((2.0, 3), (value, 5)):  # two forward passes
        watch.add(torch.tensor(loss), torch.tensor([block, block + 1]))
    watch.end_step(4, torch.tensor(1.0))
    trouble = watch.look(wait=False)
    assert (trouble.step, trouble.batch, trouble.batches, trouble.blocks) == (4, 2, 2, (5, 6))
    assert "the loss is no longer a finite number" in trouble.what


def test_a_gradient_that_is_not_finite_concerns_all_sequences_of_the_step():
    watch = LossWatch()
    for block in (3, 5):
        watch.add(torch.tensor(2.0), torch.tensor([block]))
    watch.end_step(4, torch.tensor(math.inf))
    trouble = watch.look(wait=True)
    assert (trouble.batch, trouble.blocks) == (None, (3, 5))
    assert trouble.what == "grad_norm is no longer a finite number (inf)"


def test_in_float16_a_gradient_may_overflow_but_no_loss():
    assert feed(LossWatch(may_overflow=True), [2.0], norm=math.inf) is None
    assert feed(LossWatch(may_overflow=True), [NAN], norm=math.inf) is not None


@pytest.mark.parametrize("norm", [NAN, math.inf])
def test_in_float16_gradients_that_overflow_at_every_step_are_reported(norm):
    watch = LossWatch(may_overflow=True)
    assert feed(watch, [2.0] * 4) is None
    assert feed(watch, [2.0] * MOST_OVERFLOWS, norm=norm, first=5) is None
    assert watch.overflows == MOST_OVERFLOWS == 30
    assert feed(watch, [2.0], first=35) is None  # a finite one: the scale has come down far enough
    assert feed(watch, [2.0] * MOST_OVERFLOWS, norm=norm, first=36) is None
    trouble = feed(watch, [2.0], norm=norm, first=66)
    assert (trouble.step, trouble.exploded, trouble.batch, trouble.blocks) == (36, False, None, ())
    assert trouble.what == "nothing was learned since step 35: float16 gradients overflowed in 31 steps in a row, first"


def test_it_waits_only_when_it_must():
    """As on a GPU, where a value arrives a step later."""

    class Event:
        waited, there = 0, False

        def query(self):
            return self.there

        def synchronize(self):
            self.waited += 1

    watch, event = LossWatch(), Event()
    watch._waiting.append(_Step(1, [None], torch.tensor([NAN, 1.0]), event))
    assert watch.look(wait=False) is None
    assert event.waited == 0
    assert watch.look(wait=True).step == 1
    assert event.waited == 1


def test_steps_are_checked_in_order():
    class Late:
        def query(self):
            return False

        def synchronize(self):
            pass

    watch = LossWatch()
    watch._waiting.extend(
        [_Step(1, [None], torch.tensor([NAN, 1.0]), Late()), _Step(2, [None], torch.tensor([NAN, 1.0]))]
    )
    assert watch.look(wait=False) is None
    assert watch.look(wait=True).step == 1


def test_without_sequence_numbers_none_are_reported():
    watch = LossWatch()
    watch.add(torch.tensor(NAN), None)
    watch.end_step(1, 1.0)
    assert watch.look(wait=True).blocks == ()


def test_rows_are_named_up_to_a_number():
    assert rows_in_words([3], [["a", "b"]]) == "sequence 3 (rows a, b)"
    assert rows_in_words([3, 4, 5], [["a", "b"], ["c", "d"], ["e"]], most=3) == (
        "sequence 3 (rows a, b); sequence 4 (rows c, ...); and 1 more sequences"
    )
    assert rows_in_words([], []) == ""
