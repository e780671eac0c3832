"""Shows a training as one bar with what is left, and its losses as a table, in place of Trainer's bar and raw dictionaries."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from qlora_helpers.base.phases import Show


class PhaseCallback(TrainerCallback):
    """Tells a `Show` of steps, losses and what is being done.

    Args:
        show: what shows them.
    """

    def __init__(self, show: Show) -> None:
        self.show = show
        self.trainer: Any = None  # set by `train`, for its token count
        self._bar: Any = None
        self._began, self._first = 0.0, 0
        self._mark = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began, self._first = time.monotonic(), state.global_step
        self._mark = (self._began, int(self.trainer.tokens_seen) if self.trainer is not None else 0)
        self._bar = self.show.training(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(1)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.set_postfix_str("evaluating")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.set_postfix_str("")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        names = ("loss", "eval_loss", "learning_rate", "grad_norm")
        found = {name: float(logs[name]) for name in names if logs and name in logs}
        if not {"loss", "eval_loss"} & found.keys():
            return
        now, done = time.monotonic(), state.global_step - self._first
        pace = (now - self._began) / done if done else None
        values: dict[str, Any] = {"step": state.global_step, "max_steps": state.max_steps, **found}
        if pace is not None:
            values["seconds_left"] = round(pace * (state.max_steps - state.global_step), 1)
        if "loss" in found and self.trainer is not None:
            tokens, processes = int(self.trainer.tokens_seen), self.trainer.accelerator.num_processes
            values["tokens_per_s"] = round((tokens - self._mark[1]) * processes / max(1e-9, now - self._mark[0]), 1)
            self._mark = (now, tokens)
        self.show.step(values)

    def close(self) -> None:
        """Ends the bar, for a training that failed, too."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
