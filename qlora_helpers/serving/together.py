"""Which runs one server may serve, and under which names. Imports no torch and no web framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qlora_helpers.base.errors import ModelError, RunError, UserError
from qlora_helpers.export.certificate import Certificate, require_certificate
from qlora_helpers.runs.folder import Run

BASE = "base"
"""The name by which the untuned model is asked, in the prompt of the first run."""
_FORM = ("quantization", "double_quantization", "compute_dtype", "attention")


def runs_to_serve(run: Run, also: Sequence[Run]) -> list[Run]:
    """Returns the runs of one server, each once.

    Raises:
        UserError: a run has no adapter with a certificate, two have one name, or their bases differ.
    """
    runs = [run, *also]
    if len({each.folder.resolve() for each in runs}) < len(runs):
        raise RunError("a run is named twice", next_step="Name each run once.")
    served_names(runs)
    refuse_other_bases(runs)
    return runs


def served_names(runs: Sequence[Run]) -> tuple[str, ...]:
    """Returns the names that a server of some runs answers for, `base` first.

    Raises:
        UserError: a name would be given twice.
    """
    names = (BASE, *(run.name for run in runs))
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                "two of the models would have one name",
                got=repr(name),
                next_step="Copy or rename the folder of one of the runs.",
            )
    return names


def refuse_other_bases(runs: Sequence[Run]) -> list[Certificate]:
    """Returns the certificates of runs that were all trained on one base model in one form, and refuses any other.

    Raises:
        ModelError: an adapter has no certificate that fits, or was trained on another base or in another form than the first.
    """
    found = [require_certificate(run.adapter_dir) for run in runs]
    first = runs[0]
    for run, certificate in zip(runs[1:], found[1:], strict=True):
        if certificate.base_sha256 is None or certificate.base_sha256 != found[0].base_sha256:
            raise ModelError(
                f"the runs {first.name!r} and {run.name!r} can't be served together: their base models differ",
                expected=f"{found[0].base_model} ({(found[0].base_sha256 or 'no fingerprint')[:12]})",
                got=f"{certificate.base_model} ({(certificate.base_sha256 or 'no fingerprint')[:12]})",
                next_step="Serve them one by one.",
            )
        form, other = (dataclasses.asdict(each.config().model) for each in (first, run))
        differ = [f"model.{key}={form[key]!r}, not {other[key]!r}" for key in _FORM if form[key] != other[key]]
        if differ:
            raise ModelError(
                f"the runs {first.name!r} and {run.name!r} can't be served together: they were trained on the same base "
                "in different forms",
                got="; ".join(differ),
                next_step="Serve them one by one.",
            )
    return found
