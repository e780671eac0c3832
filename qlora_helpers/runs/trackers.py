"""Which experiment trackers a run reports to, whether they are installed, and under which number each of them knows the run."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from qlora_helpers.base.config import TrainConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.files import write_json
from qlora_helpers.base.records import read_record
from qlora_helpers.runs.folder import Run

NAMES = {"wandb": "Weights & Biases", "mlflow": "MLflow", "trackio": "Trackio"}
FILE = "trackers.json"


@dataclass(frozen=True)
class Known:
    """What `trackers.json` holds: the run's number in each tracker, so that a resumed run goes on under it."""

    wandb: str | None = None
    mlflow: str | None = None

    @property
    def is_plausible(self) -> bool:
        """Whether the numbers can be those of runs."""
        return all(
            each is None or (each.isalnum() and each.isascii() and len(each) <= 64) for each in vars(self).values()
        )


def read_known(run: Run) -> Known:
    """Reads under which numbers trackers know the run.

    Raises:
        RunError: the file is damaged.
    """
    path = run.folder / FILE
    return (
        read_record(path, Known, next_step="Delete it; the trackers then begin a new run.")
        if path.exists()
        else Known()
    )


def write_known(run: Run, known: Known) -> None:
    """Writes under which numbers trackers know the run."""
    write_json(run.folder / FILE, known)


def refuse_missing(config: TrainConfig) -> None:
    """Refuses settings that name a tracker which is not installed.

    Raises:
        UserError: it is not; with what installs it.
    """
    missing = [name for name in config.report_to or () if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"train.report_to names what is not installed: {', '.join(NAMES[name] for name in missing)}",
            next_step=f"Install it: pip install {' '.join(missing)}. Or leave it out: train.report_to=none; TensorBoard "
            "has the same figures.",
        )
