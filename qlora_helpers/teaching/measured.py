"""A learner's trained run in numbers, for the picture in which a class lays its runs together: no name, no text, no answer.

A learner commits a prediction of the evaluation loss with `predict` while nothing is measured yet, and hands the run's numbers over
with `share` once it is trained. The loss is the run's own, read from its progress; nobody types it. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.files import content_digest, not_written
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.opening import existing_run, run_at
from qlora_helpers.teaching import attempts
from qlora_helpers.teaching.sending import send_soon

KIND, PREDICTIONS = "measured", "predictions.jsonl"
MOST_OF_A_SEAT = 20
HIGHEST_LOSS = 1000.0
OF_TRAINING = ("epochs", "max_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim")
EVALUATED = ("eval_steps", "patience")  # the lowest of more evaluations is lower
OF_THE_MODEL = ("name", "revision", "quantization", "double_quantization")


@dataclass(frozen=True)
class Measured:
    """One trained run.

    Attributes:
        seat: who shared it, by a name that says nothing about the person.
        recipe: a digest of all settings and data that decide what is learned, without rank, learning rate and seed: runs of one
            recipe can be compared.
        rank: of the adapters.
        learning_rate: the peak.
        seed: of the training. Two runs of one recipe and seed are one run done twice.
        loss: the lowest evaluation loss, nats a token.
        predicted: what the learner had committed before it was measured; None where nothing was.
        time: seconds since 1970.
    """

    seat: str
    recipe: str
    rank: int
    learning_rate: float
    seed: int
    loss: float
    predicted: float | None
    time: float


def predict(run: Run | str | os.PathLike[str], loss: float) -> str:
    """Commits a prediction of a run's lowest evaluation loss, and returns a sentence about it.

    Args:
        run: the run, or its name: it may be training, or not exist yet.
        loss: what is predicted, nats a token.

    Raises:
        UserError: a loss is measured already, or the prediction can't be one.
    """
    run = run if isinstance(run, Run) else run_at(run)
    if not (isinstance(loss, int | float) and 0 <= loss <= HIGHEST_LOSS):
        raise UserError("that can't be a loss", expected=f"a number from 0 to {HIGHEST_LOSS:,.0f}", got=repr(loss))
    if _losses(run):
        raise UserError(
            f"{run.name} has an evaluation loss already, so that this would be no prediction",
            next_step="Commit one for the next run, before it trains.",
        )
    folder = attempts.learner_folder()
    line = json.dumps({"run": _mark(run), "loss": float(loss), "time": round(time.time(), 1)}) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(folder / PREDICTIONS, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise not_written(folder / PREDICTIONS, error) from error
    return f"Committed: {loss:g} for {run.name}{'' if run.exists() else ', which does not exist yet'}. Share it when it is trained."


def share(run: Run | str | os.PathLike[str]) -> Measured:
    """Keeps a trained run's numbers in the learner's folder, sends them to the board where there is one, and returns them.

    Raises:
        RunError: the run does not exist, its training has not finished, or the learner's folder can't be written.
    """
    found = measure(run if isinstance(run, Run) else existing_run(run))
    if not attempts.append({"kind": KIND} | asdict(found)):
        raise RunError(
            "the run's numbers can't be kept in the learner's folder",
            next_step="Name one that can be written: QLORA_LEARNER.",
        )
    send_soon()
    return found


def measure(run: Run) -> Measured:
    """Reads a run's numbers from its settings and its progress.

    Raises:
        RunError: the run does not exist, its training has not finished, or it has no evaluation loss.
    """
    config, state = run.config(), run.status().state
    if state != "finished":
        raise RunError(f"{run.name} can't be compared with others", expected="a training that finished", got=state)
    losses = _losses(run)
    if not losses:
        raise RunError(f"{run.name} has no evaluation loss", next_step="Set train.eval_steps, and train it anew.")
    lowest = min(loss for _, loss in losses)
    predicted = [each["loss"] for each in _predictions() if each["run"] == _mark(run) and each["time"] < losses[0][0]]
    return Measured(
        attempts.seat(),
        recipe_of(config),
        config.adapter.r,
        config.train.learning_rate,
        config.train.seed,
        round(lowest, 4),
        predicted[-1] if predicted else None,
        round(time.time(), 1),
    )


def recipe_of(config: RunConfig) -> str:
    """Returns a digest of all settings that decide what a run learns and how it is measured, without rank, rate and seed."""
    values = config.to_dict()
    train, data = values["train"], dict(values["data"])
    data["source"] = content_digest(config.data.source) or config.data.source
    known = {
        "model": {name: values["model"][name] for name in OF_THE_MODEL},
        "adapter": {name: value for name, value in values["adapter"].items() if name != "r"},
        "data": data,
        "train": {name: train[name] for name in (*OF_TRAINING, *EVALUATED)},
        "sequences": train["micro_batch_size"] * train["gradient_accumulation_steps"],
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:12]


def read_measured(content: bytes) -> list[Measured]:
    """Returns the runs in a file's content; lines of another kind, and numbers that can't be, are passed over."""
    return [found for line in content.splitlines() if (found := _read(line)) is not None][-MOST_OF_A_SEAT:]


def _read(line: bytes) -> Measured | None:
    try:
        value = json.loads(line)
        if value["kind"] != KIND:
            return None
        predicted = value["predicted"]
        found = Measured(
            str(value["seat"])[:20],
            str(value["recipe"])[:12],
            int(value["rank"]),
            float(value["learning_rate"]),
            int(value["seed"]),
            float(value["loss"]),
            None if predicted is None else float(predicted),
            float(value["time"]),
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return found if _can_be(found) else None


def _can_be(found: Measured) -> bool:
    losses = [found.loss] if found.predicted is None else [found.loss, found.predicted]
    return (
        all(0 <= loss <= HIGHEST_LOSS for loss in losses)
        and 1 <= found.rank <= 1024
        and 1e-8 <= found.learning_rate <= 1
        and 0 <= found.seed < 2**32
        and math.isfinite(found.time)
        and found.recipe.isascii()
        and found.recipe.isalnum()
    )


def distinct_runs(found: Iterable[Measured]) -> list[Measured]:
    """Returns each run once, as a seat shared it last: the same run of the same seat is no second measurement."""
    last = {(each.seat, each.recipe, each.rank, each.learning_rate, each.seed): each for each in found}
    return list(last.values())


def _mark(run: Run) -> str:
    return hashlib.sha256(os.fsencode(Path(run.folder).absolute())).hexdigest()


def _losses(run: Run) -> list[tuple[float, float]]:
    """When each evaluation loss was measured, and the loss, in order."""
    return [(record.get("time", 0.0), record["eval_loss"]) for record in run.progress() if "eval_loss" in record]


def _predictions() -> list[dict[str, Any]]:
    try:
        with open(attempts.learner_folder() / PREDICTIONS, "rb") as file:
            lines = file.read(attempts.MOST_BYTES).splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
            found.append({"run": str(value["run"]), "loss": float(value["loss"]), "time": float(value["time"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return found
