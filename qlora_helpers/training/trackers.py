"""Hands a training's figures to Weights & Biases, MLflow or Trackio: the same, under the same names, as TensorBoard's events have.

Where and whether they send anything is their own configuration (`WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`, `TRACKIO_DIR`). A
tracker that can't be opened ends the command before a model is loaded; one that fails later is left out, and training goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from transformers import TrainerCallback

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import RunError
from qlora_helpers.base.text import brief, plain, short_name
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.trackers import NAMES, read_known, refuse_missing, write_known

PROJECT = "qlora_helpers"
MOST_PARAMS = 100  # that MLflow takes at once
log = logging.getLogger(__name__)


class Tracker(Protocol):
    """One tracker's run."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Adds figures at an optimizer step."""

    def close(self, *, failed: bool) -> None:
        """Ends the tracker's session."""


@contextlib.contextmanager
def reporting(run: Run, config: RunConfig) -> Iterator[list[TrainerCallback]]:
    """Opens the trackers that the settings name; yields the callback that hands them the figures, or no callback.

    Args:
        run: the run, under whose name they know it.
        config: its settings, which they get, without folders of this machine.

    Raises:
        UserError: one is not installed.
        RunError: one can't be opened, for example because nobody is logged in.
    """
    with _opened(run, config) as trackers:
        yield [_Reporter(trackers)] if trackers else []


def report_scores(run: Run, config: RunConfig, scores: Mapping[str, float]) -> None:
    """Hands an evaluation's scores to the trackers, at the step that the run has reached.

    Args:
        run, config: as for `reporting`.
        scores: name -> value.
    """
    if not config.train.report_to:
        return
    try:
        with _opened(run, config) as trackers:
            for name, tracker in trackers.items():
                _tried(name, lambda each=tracker: each.log(_named("scores", scores), run.status().step))  # type: ignore[misc]
    except RunError as error:  # the scores are in evaluation.json
        log.warning("%s", error)


@contextlib.contextmanager
def _opened(run: Run, config: RunConfig) -> Iterator[dict[str, Tracker]]:
    refuse_missing(config.train)
    trackers: dict[str, Tracker] = {}
    failed = True
    try:
        for name in config.train.report_to or ():
            try:
                trackers[name] = _OPEN[name](run, _settings(config))
            except Exception as error:  # whatever a tracker raises: no login, no network, a full disk
                raise RunError(
                    f"{NAMES[name]} can't be opened ({brief(error)})",
                    next_step=f"Set it up, or set it to work offline; or leave it out: train.report_to=none. {_HELP[name]}",
                ) from error
        yield trackers
        failed = False
    finally:
        for name, tracker in trackers.items():
            _tried(name, lambda each=tracker: each.close(failed=failed))  # type: ignore[misc]


def _tried(name: str, act: Callable[[], None]) -> bool:
    try:
        act()
    except Exception as error:  # a tracker must not end a training
        log.warning("%s takes no more figures: %s", NAMES[name], brief(error))
        return False
    return True


class _Reporter(TrainerCallback):
    """Hands what Trainer logs to the trackers, until they fail."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self.trackers = dict(trackers)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        found = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        values = {
            f"{'eval' if name.startswith('eval_') else 'train'}/{name.removeprefix('eval_')}": float(value)
            for name, value in found.items()
        }
        for name, tracker in list(self.trackers.items()):
            if values and not _tried(name, lambda each=tracker: each.log(values, state.global_step)):  # type: ignore[misc]
                del self.trackers[name]


def _named(group: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{group}/{name}": value for name, value in values.items()}


def _settings(config: RunConfig) -> dict[str, Any]:
    """The settings by their full names; of paths the last part alone, since a tracker may be on another machine."""
    flat = {
        f"{section}.{key}": value
        for section, values in config.to_dict().items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    for name in ("model.name", "data.source", "evaluation.json_schema"):
        if flat.get(name):
            flat[name] = short_name(flat[name], keep_owner=True)
    return flat | {"profile": config.profile}


class _Wandb:
    """A run of Weights & Biases; its steps may go back, as those of a resumed run do."""

    STEP = "optimizer_step"

    def __init__(self, run: Run, settings: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        known = read_known(run)
        number = known.wandb or secrets.token_hex(4)
        # Its console capture would send what is printed, rows of the data among it.
        quiet = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=number,
            resume="allow",
            config=dict(settings),
            settings=quiet,
        )
        self.run.define_metric(self.STEP)
        self.run.define_metric("*", step_metric=self.STEP)
        write_known(run, dataclasses.replace(known, wandb=number))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({**values, self.STEP: step})

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _MLflow:
    """A run of MLflow, by a client of its own: what a notebook has opened with `mlflow.start_run` is left alone."""

    def __init__(self, run: Run, settings: Mapping[str, Any]) -> None:
        mlflow = importlib.import_module("mlflow")
        self.entities = importlib.import_module("mlflow.entities")
        self.client = mlflow.MlflowClient()
        known = read_known(run)
        self.id = self._resumed(known.mlflow) or self._new(run.name)
        write_known(run, dataclasses.replace(known, mlflow=self.id))
        there = self.client.get_run(self.id).data.params  # a parameter can't change
        new = [self.entities.Param(name, str(value)[:6000]) for name, value in settings.items() if name not in there]
        for first in range(0, len(new), MOST_PARAMS):
            self.client.log_batch(self.id, params=new[first : first + MOST_PARAMS])

    def _resumed(self, number: str | None) -> str | None:
        if number is None:
            return None
        try:
            self.client.update_run(number, status="RUNNING")
        except Exception:  # of another server, or deleted there
            return None
        return number

    def _new(self, name: str) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self.client.create_experiment(experiment)
        return self.client.create_run(number, run_name=name).info.run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self.client.log_batch(
            self.id, metrics=[self.entities.Metric(name, value, now, step) for name, value in values.items()]
        )

    def close(self, *, failed: bool) -> None:
        self.client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")


class _Trackio:
    """A run of Trackio."""

    def __init__(self, run: Run, settings: Mapping[str, Any]) -> None:
        self.library = importlib.import_module("trackio")
        with _unprinted():
            self.run = self.library.init(
                os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=run.name,
                config=dict(settings),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        with _unprinted():
            self.library.finish()  # and not the run's own, which it would end again when this process ends


@contextlib.contextmanager
def _unprinted() -> Iterator[None]:
    """Writes what is printed meanwhile to the log: `--json` prints objects alone."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    finally:
        if lines := plain(text.getvalue()).strip():
            log.info("%s", lines)


_OPEN: dict[str, Callable[[Run, Mapping[str, Any]], Tracker]] = {
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}
_HELP = {
    "wandb": "For Weights & Biases: wandb login, or WANDB_MODE=offline.",
    "mlflow": "For MLflow: MLFLOW_TRACKING_URI names its server, or a file.",
    "trackio": "For Trackio: TRACKIO_DIR names its folder.",
}
