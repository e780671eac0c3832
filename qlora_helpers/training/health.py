"""Judges by a run's own losses and gradient norms since which step its weights are suspect.

The evidence of a step is its loss and its gradient norm, both measured on the weights that the step before left. A step is
abnormal where one of them is far above the run's own running level, which abnormal steps never raise. One noisy step means
nothing: suspicion ends when the values are as usual again. It has no consequence before training fails, and then decides which
checkpoints are set aside. Knows nothing of checkpoints.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

WINDOW = 32  # steps of the running median
LEAST = 10  # steps needed before a loss can count as exploded, or for a level that has moved
IN_A_ROW = 3  # steps: a single hard batch is not an explosion, and a single usual one no recovery
RISE_NATS = 2.0  # per token, above the median
SPREADS = 6.0  # of the usual spread, above the median
MAD_TO_SIGMA = 1.4826  # of a normal distribution
JUMP = 10.0  # times the usual gradient norm, at least


@dataclass(frozen=True)
class Evidence:
    """What is known of a run's health at a step; kept with its checkpoint.

    Attributes:
        losses, norms: of the last steps that were as usual, the oldest first.
        before: the loss of the first step, so that of the untrained adapter.
        since: the step since which values are abnormal; 0 where they are as usual.
        why: what was abnormal there.
        collapsed: the step since which every norm was far below its level; 0 where the last one was not.
        later_losses, later_norms: of the last steps since then.
    """

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    before: float | None = None
    since: int = 0
    why: str = ""
    collapsed: int = 0
    later_losses: tuple[float, ...] = ()
    later_norms: tuple[float, ...] = ()


@dataclass
class Health:
    """Takes the loss and gradient norm of every step; attributes as in `Evidence`."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    before: float | None = None
    since: int = 0
    why: str = ""
    collapsed: int = 0
    _later: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=LEAST))

    def add(self, step: int, loss: float, norm: float) -> None:
        """Takes a step's values, both finite: the mean loss in nats per token, and the norm before clipping."""
        if self.before is None:
            self.before = loss
        why = self._abnormal(step, loss, norm)
        low = bool(self.norms) and norm < statistics.median(self.norms) / JUMP
        if not self.since and not why:
            self.collapsed = (self.collapsed or step) if low else 0
            self.losses.append(loss)
            self.norms.append(norm)
            return
        if not self.since:
            self.since, self.why = self.collapsed or step, why
            self.why += f", after the norm had collapsed at step {self.collapsed}" if self.collapsed else ""
            self.collapsed = 0
        self._later.append((loss, norm))
        if usual := self._recovered():
            self.losses.extend(loss for loss, _ in usual)
            self.norms.extend(norm for _, norm in usual)
            self._later.clear()
            self.since, self.why = 0, ""

    @property
    def doubtful_since(self) -> int:
        """The first step that may turn out to be abnormal; 0 where there is none."""
        return self.since or self.collapsed

    def evidence(self) -> Evidence:
        """Returns what a checkpoint keeps."""
        later = tuple(loss for loss, _ in self._later), tuple(norm for _, norm in self._later)
        return Evidence(
            tuple(self.losses), tuple(self.norms), self.before, self.since, self.why, self.collapsed, *later
        )

    def restore(self, kept: Evidence) -> None:
        """Goes on from what a checkpoint kept."""
        self.losses.extend(kept.losses)
        self.norms.extend(kept.norms)
        self._later.extend(zip(kept.later_losses, kept.later_norms, strict=False))
        self.before, self.since, self.why, self.collapsed = kept.before, kept.since, kept.why, kept.collapsed

    def _abnormal(self, step: int, loss: float, norm: float) -> str:
        """Says what is far above its level; empty where nothing is."""
        if loss > self._loss_limit():
            usual = statistics.median(self.losses or [self.before or 0.0])
            return f"the loss rose to {loss:.2f} at step {step}, where {usual:.2f} was usual"
        if norm > norm_bound(self.norms):
            usual = statistics.median(self.norms)
            return f"the gradient norm jumped to {norm:.4g} at step {step}, where {usual:.2g} was usual"
        return ""

    def _loss_limit(self) -> float:
        if self.before is None:
            return math.inf
        if len(self.losses) >= LEAST:
            return bound(self.losses)
        return max([*self.losses, self.before]) + RISE_NATS

    def _recovered(self) -> list[tuple[float, float]]:
        """Returns the last steps if they show that the weights are well, else an empty list.

        They do after three steps in a row whose loss and norm are both near their levels. They also do after ten steps whose loss
        is as usual and whose norms are near one another: the level has moved, as where other data begin. Norms that leap up and
        down never do. A norm far below its level starts no suspicion and ends none; one that a jump follows belongs to it.
        """
        latest, limit = list(self._later), self._loss_limit()
        in_a_row = latest[-IN_A_ROW:]
        level = statistics.median(self.norms) if self.norms else 0.0
        if len(in_a_row) == IN_A_ROW and all(
            loss <= limit and level / JUMP <= norm <= norm_bound(self.norms) for loss, norm in in_a_row
        ):
            return in_a_row
        level = statistics.median(norm for _, norm in latest)
        if len(latest) == LEAST and all(
            loss <= limit and level / JUMP <= norm <= level * JUMP for loss, norm in latest
        ):
            self.norms.clear()
            return latest
        return []


def bound(recent: Iterable[float]) -> float:
    """Returns the loss above which a step is suspect: the running median plus a multiple of a robust spread.

    Infinite while too few losses are known. The spread is that of the differences from step to step, so that a falling loss does
    not widen it; two independent losses differ by sqrt(2) times the spread of one.
    """
    values = list(recent)
    if len(values) < LEAST:
        return math.inf
    return statistics.median(values) + max(RISE_NATS, SPREADS * _spread(values))


def norm_bound(recent: Iterable[float]) -> float:
    """Returns the gradient norm above which a step is suspect; infinite where none above zero is known.

    Norms vary by factors, so their spread is that of their logarithms. While few are known, the highest of them is the level:
    the first one may be far from the later ones, since only B has a gradient while B is zero.
    """
    values = [norm for norm in recent if norm > 0]
    if not values:
        return math.inf
    if len(values) < LEAST:
        return JUMP * max(values)
    spread = SPREADS * _spread([math.log(norm) for norm in values])
    return statistics.median(values) * max(JUMP, math.exp(min(spread, 100.0)))


def _spread(values: list[float]) -> float:
    """The robust standard deviation of values from step to step."""
    changes = statistics.median(abs(value - before) for before, value in itertools.pairwise(values))
    return MAD_TO_SIGMA * changes / math.sqrt(2)
