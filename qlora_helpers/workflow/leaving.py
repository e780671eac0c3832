"""Writes what leaves a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers.base.text import Say
from qlora_helpers.export.merge import SHARD_GIB
from qlora_helpers.runs.folder import Run
from qlora_helpers.workflow import preparing

if TYPE_CHECKING:
    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.export.bundle import ExportReport
    from qlora_helpers.export.leaving import Leaving
    from qlora_helpers.model.loading import LoadedModel


def export_run(
    run: Run,
    *,
    out: Path | None = None,
    merged: bool = True,
    drift: bool = True,
    shard_gib: float = SHARD_GIB,
    say: Say = print,
) -> ExportReport:
    """Exports what leaves the run: the adapter, the merged model and the files that servers need (`export.bundle`).

    Args:
        run: a trained run.
        out: the folder, which is new, empty or an earlier export; None takes `export` in the run's folder.
        merged, drift: whether to write the merged model, and to measure how far it is from the adapter on its base.
        shard_gib: size of a file of the merged model, GiB.
        say: as for `train`.

    Raises:
        UserError: as for `export.bundle.export`.
    """
    from qlora_helpers.export.bundle import export

    def prepare(loaded: LoadedModel) -> PreparedData:
        return preparing.prepare_data(run, loaded.tokenizer, shape=loaded.shape, say=say)

    return export(run, out=out, merged=merged, prepare=prepare if drift else None, shard_gib=shard_gib, say=say)


def export_to(
    run: Run,
    to: str,
    *,
    quantize: str | None = None,
    out: Path | None = None,
    merged: bool = True,
    say: Say = print,
) -> Leaving:
    """Writes the run's model for one place where it goes next, with the commands that run it there (`export.leaving`).

    Args:
        run: a trained run.
        to: `adapter`, `merged`, `gguf`, `ollama`, `vllm`, `lmi` or `hub`.
        quantize: of GGUF files, the type of their values, such as `q8_0` or `q4_k_m`; None takes F16.
        out: the folder, which is new, empty or an earlier export; None takes `export-TO` in the run's folder.
        merged: False writes the adapter alone.
        say: as for `train`.

    Raises:
        UserError: as for `export.leaving.leave`.
    """
    from qlora_helpers.export.leaving import leave

    return leave(run, to, quantize=quantize, out=out, merged=merged, say=say)
