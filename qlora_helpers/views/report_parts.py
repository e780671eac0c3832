"""What the report page is made of: the files of a run folder, read once.

This module knows nothing of what the page says about them. It imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.records import read_object, read_values
from qlora_helpers.data.prepared_file import PreparedFile, prepared_path
from qlora_helpers.evaluation.evaluation_file import read_evaluation
from qlora_helpers.evaluation.votes import read_votes
from qlora_helpers.runs.folder import Run, Status
from qlora_helpers.runs.plan_file import PlanFile
from qlora_helpers.views.monitor import LossCurve, loss_curve


@dataclass(frozen=True)
class Parts:
    """The contents of a run folder; a dict is empty if its file is missing. `votes` says in sentences what people voted for."""

    run: Run
    config: RunConfig
    status: Status
    curve: LossCurve
    plan: dict[str, Any]
    evaluation: dict[str, Any]
    prepared: dict[str, Any]
    adapter: dict[str, Any]
    votes: tuple[str, ...] = ()

    @property
    def measured(self) -> dict[str, Any]:
        """What training measured; empty before that."""
        return self.plan.get("measured", {})

    @property
    def has_random_weights(self) -> bool:
        """Whether answers and scores mean nothing."""
        return self.evaluation.get("random_weights", self.config.model.name.startswith("random:"))


def read_parts(run: Run) -> Parts:
    """Reads what the run folder holds so far.

    Raises:
        RunError: the run does not exist, or one of its files is damaged.
    """

    def found(path: Path, kind: type) -> dict[str, Any]:
        return read_values(path, kind) if path.exists() else {}

    adapter_path = run.adapter_dir / "adapter_config.json"
    return Parts(
        run,
        run.config(),
        run.status(),
        loss_curve(run),
        found(run.plan_path, PlanFile),
        read_evaluation(run),
        found(prepared_path(run.data_dir), PreparedFile),
        read_object(adapter_path) if adapter_path.exists() else {},
        tuple(read_votes(run).sentences()),
    )
