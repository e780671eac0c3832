"""Whether a run's budget is used up: dollars, minutes, or evaluations without a better loss. It only computes."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from qlora_helpers.base.config import TrainConfig
from qlora_helpers.base.errors import RunError
from qlora_helpers.base.units import duration
from qlora_helpers.runs.status import Status


class Budget:
    """The limits of one session, and how much of them is used.

    Dollars count over all sessions of the run, minutes in this one alone. `patience` counts the evaluations of this session that
    did not improve on the run's best loss, so that a person can go on after such a stop.

    Args:
        config: the limits.
        status: says when the session began, what earlier ones cost, and the price.
        eval_losses: the evaluation losses of the run so far.
    """

    def __init__(self, config: TrainConfig, status: Status, eval_losses: Iterable[float] = ()) -> None:
        self.config = config
        self.started_at = status.started_at or time.time()
        self.earlier_usd = status.spent_usd
        self.usd_per_hour = config.usd_per_hour if status.usd_per_hour is None else status.usd_per_hour
        self.best = min(eval_losses, default=float("inf"))
        self.without_better = 0

    def evaluated(self, loss: float) -> None:
        """Counts an evaluation with its loss."""
        self.without_better = 0 if loss < self.best else self.without_better + 1
        self.best = min(self.best, loss)

    def used(self, now: float | None = None) -> dict[str, Any]:
        """Returns `seconds` of this session, `usd` of all sessions and `evaluations_without_better`, for a line of progress.

        Dollars are missing where the price is unknown, the count where `patience` is not set.

        Args:
            now: seconds since 1970; None takes the clock.
        """
        seconds = (time.time() if now is None else now) - self.started_at
        found: dict[str, Any] = {"seconds": round(seconds, 1)}
        if self.usd_per_hour is not None:
            found["usd"] = round(self.earlier_usd + self.usd_per_hour * seconds / 3600, 4)
        if self.config.patience is not None:
            found["evaluations_without_better"] = self.without_better
        return found

    def exhausted(self, now: float | None = None) -> str | None:
        """Returns a sentence on the limit that is reached, or None."""
        used, config = self.used(now), self.config
        if config.stop_at_usd is not None and used.get("usd", 0.0) >= config.stop_at_usd:
            return f"{used['usd']:.2f} USD of train.stop_at_usd={config.stop_at_usd:g} are used"
        if config.stop_at_minutes is not None and used["seconds"] >= 60 * config.stop_at_minutes:
            return f"{duration(used['seconds'])} of train.stop_at_minutes={config.stop_at_minutes:g} are over"
        if config.patience is not None and self.without_better >= config.patience:
            return (
                f"no better evaluation loss than {self.best:.4f} in {self.without_better} evaluations (train.patience)"
            )
        return None


def refuse_spent_budget(config: TrainConfig, status: Status) -> None:
    """Refuses to begin a session whose budget in dollars is used up.

    Raises:
        RunError: it is used up.
    """
    used = status.used_usd
    if config.stop_at_usd is not None and used is not None and used >= config.stop_at_usd:
        raise RunError(
            f"the run has used {used:.2f} USD, and train.stop_at_usd is {config.stop_at_usd:g}",
            next_step="Raise train.stop_at_usd to go on.",
        )
