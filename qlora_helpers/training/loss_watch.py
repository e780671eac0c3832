"""Watches losses and gradient norms for three kinds of trouble: a value that is not finite, a loss that explodes and stays up,
and float16 gradients that overflow at every step.

Values are copied to the host while the device works on, and checked once they have arrived: the host waits for them only before a
log or a save. Where several processes train, each of them judges the same values, those of all, at the logs and saves; so all stop
at the same step. Knows packed sequences by number only; the trainer decides what to do.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qlora_helpers.training.health import IN_A_ROW, WINDOW, Health, bound

MOST_OVERFLOWS = 30  # in a row: the loss scaler starts at 2**16 and halves its scale each time, so a few are usual


@dataclass(frozen=True)
class Trouble:
    """What went wrong and where.

    Attributes:
        step: the optimizer step (from 1) at which it began.
        what: a description with the value.
        exploded: whether the loss exploded, so was finite.
        batch, batches: which forward pass of the step (from 1), of how many; None where it is all of them.
        blocks: numbers of its packed sequences in the training data.
        process: the process (from 1) of that forward pass; None where it is all of them, or where only one trains.
        since: the first abnormal step: what the step before left, and all later weights, are spoilt. None where there is none.
        evidence: what was abnormal in that step.
        fix: what a person can do.
    """

    step: int
    what: str
    exploded: bool
    batch: int | None
    batches: int
    blocks: tuple[int, ...]
    process: int | None = None
    since: int | None = None
    evidence: str = ""
    fix: str = "Look at these rows, or lower train.learning_rate"


@dataclass(frozen=True)
class Measured:
    """What one process measured in a step.

    Attributes:
        number: of the optimizer step, from 1.
        losses: of every forward pass, its share of the step's loss.
        norm: of the gradients, before clipping; of several processes the mean gradients', so that it is the same in all.
        blocks: for every forward pass, the numbers of its packed sequences.
    """

    number: int
    losses: list[float]
    norm: float
    blocks: list[tuple[int, ...]]


@dataclass
class _Step:
    number: int
    blocks: list[Any]
    values: torch.Tensor  # on the host: the loss of every forward pass, then the gradient norm
    arrived: Any = None

    def read(self, wait: bool) -> Measured | None:
        if self.arrived is not None:
            if not (wait or self.arrived.query()):
                return None
            self.arrived.synchronize()
        *losses, norm = self.values.tolist()
        blocks = [() if each is None else tuple(int(number) for number in each.tolist()) for each in self.blocks]
        return Measured(self.number, losses, norm, blocks)


@dataclass
class LossWatch:
    """Takes the values of every step and reports the first trouble in them.

    Attributes:
        may_overflow: whether gradients may overflow, as in float16; the loss scaler then skips the step.
        overflows: steps in a row that were skipped for that.
        recent: losses of the last healthy steps.
        suspects: the trouble of each of the last steps in a row whose loss is far too high.
        health: since when the weights are suspect.
    """

    may_overflow: bool = False
    overflows: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    suspects: list[Trouble] = field(default_factory=list)
    health: Health = field(default_factory=Health)
    _losses: list[torch.Tensor] = field(default_factory=list)
    _blocks: list[Any] = field(default_factory=list)
    _waiting: deque[_Step] = field(default_factory=deque)

    def add(self, loss: torch.Tensor, blocks: torch.Tensor | None) -> None:
        """Takes one forward pass: its share of the step's loss, and the numbers of its packed sequences."""
        self._losses.append(loss.detach())
        self._blocks.append(blocks)

    def end_step(self, number: int, grad_norm: torch.Tensor | float) -> None:
        """Closes a step and starts the copy of its values to the host.

        Args:
            number: the number of the coming optimizer step, from 1.
            grad_norm: the norm before clipping.
        """
        if not self._losses:
            return
        device = self._losses[-1].device
        if hasattr(grad_norm, "full_tensor"):  # sharded by FSDP
            grad_norm = grad_norm.full_tensor()
        norm = torch.as_tensor(grad_norm, dtype=torch.float32).detach()
        values = torch.stack(
            [each.to(device, torch.float32, non_blocking=True).reshape(()) for each in (*self._losses, norm)]
        )
        step = _Step(number, self._blocks, values)
        if device.type == "cuda":
            step.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            step.values.copy_(values, non_blocking=True)
            step.arrived = torch.cuda.Event()
            step.arrived.record(torch.cuda.current_stream(device))
        self._waiting.append(step)
        self._losses, self._blocks = [], []

    def look(self, *, wait: bool) -> Trouble | None:
        """Returns the first trouble in the values that have arrived, or None.

        Args:
            wait: whether to wait for the values of all steps so far, as before a log or a save.
        """
        while self._waiting:
            measured = self._waiting[0].read(wait)
            if measured is None:
                return None
            self._waiting.popleft()
            if trouble := self._judge([measured]):
                return trouble
        return None

    def look_together(self, gather: Callable[[list[Measured]], list[list[Measured]]]) -> Trouble | None:
        """Returns the first trouble in the steps so far of all processes, the same one in each of them; waits for the values.

        Args:
            gather: returns what each process handed in, in their order; all processes call this together.
        """
        own = [step.read(wait=True) for step in self._waiting]
        self._waiting.clear()
        of_all = gather([each for each in own if each is not None])
        for measured in zip(*of_all, strict=True):
            if trouble := self._judge(measured):
                return trouble
        return None

    def _judge(self, of_all: Sequence[Measured]) -> Trouble | None:
        """Judges one step.

        Args:
            of_all: what each process measured in it.
        """
        trouble = self._not_finite(of_all)
        if trouble is None and math.isfinite(norm := of_all[0].norm):
            self.health.add(of_all[0].number, _mean_loss(of_all), norm)
        trouble = trouble or self._overflowing(of_all) or self._exploded(of_all)
        if trouble and self.health.since and self.health.since < (trouble.since or math.inf):
            return replace(trouble, since=self.health.since, evidence=self.health.why)
        return trouble

    def _not_finite(self, of_all: Sequence[Measured]) -> Trouble | None:
        passes = [(rank, index) for rank, each in enumerate(of_all) for index in range(len(each.losses))]
        bad = [(rank, index) for rank, index in passes if not math.isfinite(of_all[rank].losses[index])]
        number, norm = of_all[0].number, of_all[0].norm
        # Weights that are bad give no finite loss at all; where some passes have one, the rows of the others are to blame.
        since = number if len(bad) in (0, len(passes)) else None
        if bad:
            value = of_all[bad[0][0]].losses[bad[0][1]]
            what, where = f"the loss is no longer a finite number ({value})", bad[0]
        elif not math.isfinite(norm) and not self.may_overflow:
            what, where = f"grad_norm is no longer a finite number ({norm})", None
        else:
            return None
        trouble = _trouble(of_all, where, what)
        return trouble if since is None else replace(trouble, since=since, evidence=f"{what} at step {since}")

    def _overflowing(self, of_all: Sequence[Measured]) -> Trouble | None:
        self.overflows = 0 if math.isfinite(of_all[0].norm) else self.overflows + 1
        if self.overflows <= MOST_OVERFLOWS:
            return None
        learned = of_all[0].number - self.overflows
        found = f"float16 gradients overflowed in {self.overflows} steps in a row, first"
        what = f"nothing was learned since step {learned}: {found}"
        fix = "Lower train.learning_rate, or give a new run model.compute_dtype=float32"
        return replace(_trouble(of_all, None, what), step=learned + 1, blocks=(), fix=fix)

    def _exploded(self, of_all: Sequence[Measured]) -> Trouble | None:
        loss = _mean_loss(of_all)
        if loss <= bound(self.recent):
            self.recent.append(loss)
            self.suspects = []
            return None
        worst = max(
            ((rank, index) for rank, each in enumerate(of_all) for index in range(len(each.losses))),
            key=lambda place: of_all[place[0]].losses[place[1]],
        )
        what = f"the loss exploded to {loss:.2f}, where {statistics.median(self.recent):.2f} was usual"
        trouble, number = _trouble(of_all, worst, what, exploded=True), of_all[0].number
        self.suspects.append(replace(trouble, since=number, evidence=f"the loss exploded at step {number}"))
        return self.suspects[0] if len(self.suspects) >= IN_A_ROW else None


def _mean_loss(of_all: Sequence[Measured]) -> float:
    """The loss of a step: of several processes the mean, as Trainer logs it."""
    return sum(sum(each.losses) for each in of_all) / len(of_all)


def _trouble(
    of_all: Sequence[Measured], where: tuple[int, int] | None, what: str, *, exploded: bool = False
) -> Trouble:
    """Trouble in one forward pass, given by its process and number (from 0), or in all."""
    if where is None:
        blocks = tuple(number for each in of_all for numbers in each.blocks for number in numbers)
        return Trouble(of_all[0].number, what, exploded, None, len(of_all[0].losses), blocks)
    rank, index = where
    own = of_all[rank]
    process = rank + 1 if len(of_all) > 1 else None
    return Trouble(own.number, what, exploded, index + 1, len(own.losses), own.blocks[index], process)


def rows_in_words(blocks: Sequence[int], row_ids: Sequence[Sequence[str]], *, most: int = 12) -> str:
    """Names packed sequences and their rows, so that a reader can look them up.

    Args:
        blocks: numbers of the packed sequences in the training data.
        row_ids: the ids of the rows in each.
        most: how many rows to name.
    """
    parts, named = [], 0
    for number, ids in zip(blocks, row_ids, strict=True):
        if named >= most:
            break
        parts.append(
            f"sequence {number} (rows {', '.join(ids[: most - named])}{', ...' if len(ids) > most - named else ''})"
        )
        named += len(ids)
    left = len(blocks) - len(parts)
    return "; ".join(parts) + (f"; and {left} more sequences" if left else "")
