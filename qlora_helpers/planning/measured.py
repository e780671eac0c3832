"""What a run measured, kept in its `plan.json` beside the prediction, with the versions of the libraries."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.machine.environment import versions
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.plan_file import add_to_plan

if TYPE_CHECKING:
    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.model.loading import LoadedModel
    from qlora_helpers.model.parameter_counts import ParameterCount
    from qlora_helpers.training.result import TrainResult

log = logging.getLogger(__name__)


def write_measured(
    run: Run, count: ParameterCount, loaded: LoadedModel, result: TrainResult, data: PreparedData
) -> None:
    """Writes what was measured into `plan.json`, and on GPUs the prediction for the same step."""
    measured = {
        "weights_gib": loaded.audit.gib_by_device,
        "peak_gib": result.peak_gib,
        "reserved_gib": result.reserved_gib,
        "seconds": round(result.seconds, 1),
        "tokens_per_s": round(result.tokens_per_s, 1),
        "steps": result.steps,
        "trainable_parameters": count.trainable,
        "parameters": count.total,
        "published_parameters": count.published_total,
        "machine": result.machine,
        "fast_step": result.fast_step.splitlines(),
        "versions": versions(),
    }
    add_to_plan(run, measured=measured)
    if not result.fast_step or result.machine == "CPU":
        return
    from qlora_helpers.planning.run_plan import predicted_step
    from qlora_helpers.planning.running import running

    holding = sum(name.startswith("cuda") for name in loaded.audit.gib_by_device)  # of several processes one
    try:
        here = running(run.config().train.share, holding=holding)
        predicted: Any = predicted_step(
            run.config(),
            hardware=here.hardware(),
            compiled=result.compiled,
            captured=result.captured,
            checkpointed=result.checkpointed,
            fp8=result.fp8,
            trained_share=data.report.trained_tokens / data.report.tokens,
            fill=data.report.tokens / (len(data.train) * data.seq_len_tokens) if data.packed else 1.0,
            layout=here.layout,
        )
    except UserError as error:  # a shape that is not catalogued, or no NVML: the run itself is fine
        log.warning("no prediction beside the measured memory: %s", error)
    else:
        if here.layout.processes > 1:  # all hold as much
            for held in ("allocated_gib", "reserved_gib"):
                (each,) = predicted[held].values()
                predicted[held] = dict.fromkeys(result.reserved_gib, each)
        add_to_plan(run, predicted=predicted)
