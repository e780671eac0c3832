"""Writes a run for one place where it goes next: one folder a target, with all that this place needs, whole or not at all.

Each folder holds its model card with the exact commands, the licences of base model and data, the certificate, and `export.json`
with what was proved. What a target can't take is refused before anything is merged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.base.files import read_json, replaced_folder
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.text import Say
from qlora_helpers.export.adapter import need_adapter
from qlora_helpers.export.bundle import check_base, held_out
from qlora_helpers.export.certificate import require_certificate
from qlora_helpers.export.export_job import GGUF_TARGETS, SUMMARY, ExportJob
from qlora_helpers.export.how_to_run import RunCommand
from qlora_helpers.export.licences import licences_of
from qlora_helpers.export.merge import SHARD_GIB
from qlora_helpers.export.serving_template import serving_template
from qlora_helpers.model.checkpoints import find_checkpoint
from qlora_helpers.model.tokenizers import tokenizer_of
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.guard import refuse_links

TARGETS = ("adapter", "merged", "gguf", "ollama", "vllm", "lmi", "hub")
ADAPTER_ALONE = ("adapter", "gguf", "vllm", "lmi", "hub")  # targets that take an adapter beside its base model


@dataclass(frozen=True)
class Leaving(Tabular):
    """What was written for a target; stored in `export.json`.

    Attributes:
        folder: the new folder.
        to: the target.
        ways: how to run it, and what was tried.
        proofs: what was compared here, in words.
        notes: what a person who serves it should know.
        values: further values of `export.json`.
    """

    folder: Path
    to: str
    ways: tuple[RunCommand, ...]
    proofs: tuple[str, ...]
    notes: tuple[str, ...]
    values: dict[str, Any]

    def table(self) -> Table:
        """Returns the ways to run what was written, and what was proved."""
        files = ", ".join(sorted(item.name for item in self.folder.iterdir()))
        rows = [[each.name, each.commands.splitlines()[0], each.tried] for each in self.ways]
        return Table(
            ["with", "command", "tried"],
            rows,
            caption=f"{self.folder.name}/: {files}",
            notes=[*self.proofs, *self.notes],
        )


def leave(
    run: Run,
    to: str,
    *,
    quantize: str | None = None,
    out: Path | None = None,
    merged: bool = True,
    shard_gib: float = SHARD_GIB,
    say: Say = print,
) -> Leaving:
    """Writes a run's model for one target: a folder that its program takes as it is.

    Args:
        run: a trained run.
        to: one of `TARGETS`; `hub` writes what is to be published.
        quantize: of GGUF files, the type of their values; None takes F16.
        out: the folder: new, empty or an earlier export; None takes `export-TO` in the run's folder.
        merged: False writes the adapter alone.
        shard_gib: size of a file of the merged model, GiB.
        say: receives a line before anything that takes long.

    Raises:
        RunError: the run has no adapter yet.
        ModelError: there is no certificate that passed and fits, or the target can't take this model.
        UserError: the arguments don't go together.
    """
    refuse_links(run.folder)
    merged = merged and to != "adapter"
    kind = _checked(to, quantize, merged)
    out = (out or run.folder / f"export-{to}").resolve()
    _refuse_other_content(out)
    need_adapter(run)
    certificate = require_certificate(run.adapter_dir)
    checkpoint = find_checkpoint(run.config().model, say=say)
    check_base(checkpoint, certificate)
    tokenizer = tokenizer_of(checkpoint)
    rows = held_out(run)
    template = serving_template(run.config().data, tokenizer, rows)
    job = ExportJob(
        run, to, kind, merged, certificate, checkpoint, tokenizer, template, rows, licences_of(run, checkpoint)
    )
    if to in GGUF_TARGETS:
        job.refuse_gguf(say)
    with replaced_folder(out) as folder:
        job.write(folder, shard_gib, say)
    return Leaving(out, to, job.ways, tuple(job.proofs), tuple(job.notes), job.values)


def _checked(to: str, quantize: str | None, merged: bool) -> str:
    """Returns the type of values of a GGUF file; refuses arguments that don't go together."""
    from qlora_helpers.export.quantize import check_kind

    if to not in TARGETS:
        raise UserError("that is no target of an export", expected=", ".join(TARGETS), got=repr(to))
    if quantize is not None and (to not in GGUF_TARGETS or not merged):
        raise UserError(
            "only GGUF files of whole models are quantised", next_step="Use --to gguf or --to ollama with --quantize."
        )
    if not merged and to not in ADAPTER_ALONE:
        raise UserError(
            f"{to} takes no adapter alone", next_step=f"Leave --no-merge out, or use --to {' or '.join(ADAPTER_ALONE)}."
        )
    kind = quantize or "f16"
    if to in GGUF_TARGETS:
        check_kind(kind)
    return kind


def _refuse_other_content(out: Path) -> None:
    """Refuses a folder with anything but an earlier export in it, because the export replaces the whole folder."""
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    listed: Iterable[str] = ()
    if SUMMARY in names:
        values = read_json(out / SUMMARY)
        listed = values.get("files", ()) if isinstance(values, dict) else ()
    other = sorted(names - set(listed) - {SUMMARY}) if SUMMARY in names else sorted(names)
    if other:
        raise ModelError(
            f"{out} is not overwritten",
            expected="a new or empty folder, or an earlier export to the same target",
            got=f"{', '.join(other[:3])}{' and more' if len(other) > 3 else ''} in it",
            next_step=f"Name a folder of its own, such as {out / 'export'}.",
        )
