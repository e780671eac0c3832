"""Watches losses and gradient norms for three kinds of trouble: a value that is not finite, a loss that explodes and stays up,
and float16 gradients that overflow at every step.

Values are copied to the host while the device works on, and checked once they have arrived: the host waits for them only before a
log or a save. Knows packed sequences by number only; the trainer decides what to do.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

WINDOW = 32  # steps of the running median
LEAST = 10  # steps needed before a loss can count as exploded
IN_A_ROW = 3  # steps: a single hard batch is not an explosion
RISE_NATS = 2.0  # per token, above the median
SPREADS = 6.0  # of the usual spread, above the median
MOST_OVERFLOWS = 30  # in a row: the loss scaler starts at 2**16 and halves its scale each time, so a few are usual
MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Trouble:
    """What went wrong and where.

    Attributes:
        step: the optimizer step (from 1) at which it began.
        what: a description with the value.
        exploded: whether the loss exploded, so was finite.
        batch, batches: which forward pass of the step (from 1), of how many; None where it is all of them.
        blocks: numbers of its packed sequences in the training data.
        fix: what a person can do.
    """

    step: int
    what: str
    exploded: bool
    batch: int | None
    batches: int
    blocks: tuple[int, ...]
    fix: str = "Look at these rows, or lower train.learning_rate"


@dataclass
class _Step:
    number: int
    blocks: list[Any]
    values: torch.Tensor  # on the host: the loss of every forward pass, then the gradient norm
    arrived: Any = None

    def read(self, wait: bool) -> list[float] | None:
        if self.arrived is not None:
            if not (wait or self.arrived.query()):
                return None
            self.arrived.synchronize()
        return self.values.tolist()


@dataclass
class LossWatch:
    """Takes the values of every step and reports the first trouble in them.

    Attributes:
        may_overflow: whether gradients may overflow, as in float16; the loss scaler then skips the step.
        overflows: steps in a row that were skipped for that.
        recent: losses of the last healthy steps.
        suspects: the trouble of each of the last steps in a row whose loss is far too high.
    """

    may_overflow: bool = False
    overflows: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    suspects: list[Trouble] = field(default_factory=list)
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
            values = self._waiting[0].read(wait)
            if values is None:
                return None
            trouble = self._judge(self._waiting.popleft(), values)
            if trouble is not None:
                return trouble
        return None

    def _judge(self, step: _Step, values: list[float]) -> Trouble | None:
        *losses, norm = values
        bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            return _trouble(step, losses, bad[0], f"the loss is no longer a finite number ({losses[bad[0]]})")
        if not math.isfinite(norm) and not self.may_overflow:
            return _trouble(step, losses, None, f"grad_norm is no longer a finite number ({norm})")
        self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
        if self.overflows > MOST_OVERFLOWS:
            learned = step.number - self.overflows
            found = f"float16 gradients overflowed in {self.overflows} steps in a row, first"
            what = f"nothing was learned since step {learned}: {found}"
            fix = "Lower train.learning_rate, or give a new run model.compute_dtype=float32"
            return Trouble(learned + 1, what, exploded=False, batch=None, batches=len(losses), blocks=(), fix=fix)
        loss = sum(losses)
        limit = bound(self.recent)
        if loss <= limit:
            self.recent.append(loss)
            self.suspects = []
            return None
        worst = max(range(len(losses)), key=losses.__getitem__)
        usual = f"where {statistics.median(self.recent):.2f} was usual"
        self.suspects.append(_trouble(step, losses, worst, f"the loss exploded to {loss:.2f}, {usual}", exploded=True))
        return self.suspects[0] if len(self.suspects) >= IN_A_ROW else None


def _trouble(step: _Step, losses: list[float], batch: int | None, what: str, *, exploded: bool = False) -> Trouble:
    chosen = step.blocks if batch is None else [step.blocks[batch]]
    blocks = tuple(int(number) for each in chosen if each is not None for number in each.tolist())
    return Trouble(step.number, what, exploded, None if batch is None else batch + 1, len(losses), blocks)


def bound(recent: Iterable[float]) -> float:
    """Returns the loss above which a step is suspect: the running median plus a multiple of a robust spread.

    Infinite while too few losses are known. The spread is that of the differences from step to step, so that a falling loss does
    not widen it; two independent losses differ by sqrt(2) times the spread of one.
    """
    values = list(recent)
    if len(values) < LEAST:
        return math.inf
    changes = statistics.median(abs(value - before) for before, value in itertools.pairwise(values))
    spread = MAD_TO_SIGMA * changes / math.sqrt(2)
    return statistics.median(values) + max(RISE_NATS, SPREADS * spread)


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
