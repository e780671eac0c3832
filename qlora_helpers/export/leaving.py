"""Writes a run for one place where it goes next: one folder a target, with all that this place needs, whole or not at all.

Each folder holds its model card with the exact commands, the licences of base model and data, the certificate, and `export.json`
with what was proved. What a target can't take is refused before anything is merged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.base.files import read_json, replaced_folder, write_json, write_text
from qlora_helpers.base.folders import copy_regular
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.text import Say
from qlora_helpers.base.units import gib
from qlora_helpers.data.examples import Example
from qlora_helpers.data.prompts import question
from qlora_helpers.export import vllm
from qlora_helpers.export.adapter import need_adapter
from qlora_helpers.export.bundle import check_base, held_out, without_folders, write_adapter, write_merged
from qlora_helpers.export.card import export_card
from qlora_helpers.export.certificate import FILE, Certificate, require_certificate, write_hashes
from qlora_helpers.export.how_to_run import Way, run_section, ways
from qlora_helpers.export.licences import Licences, licences_of
from qlora_helpers.export.merge import SHARD_GIB
from qlora_helpers.export.serving_files import check_serving_files, generation_settings, sampling, write_serving_files
from qlora_helpers.export.serving_template import ServingTemplate, serving_template
from qlora_helpers.model.checkpoints import Checkpoint, find_checkpoint
from qlora_helpers.model.stored_formats import usable_folder
from qlora_helpers.model.tokenizers import tokenizer_of
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.guard import refuse_links

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TARGETS = ("adapter", "merged", "gguf", "ollama", "vllm", "lmi", "hub")
ADAPTER_ALONE = ("adapter", "gguf", "vllm", "lmi", "hub")  # targets that take an adapter beside its base model
GGUF_TARGETS = ("gguf", "ollama")
SUMMARY = "export.json"


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
    ways: tuple[Way, ...]
    proofs: tuple[str, ...]
    notes: tuple[str, ...]
    values: dict[str, Any]

    def table(self) -> Table:
        """Returns the ways to run what was written, and what was proved."""
        files = ", ".join(sorted(item.name for item in self.folder.iterdir()))
        rows = [[way.name, way.commands.splitlines()[0], way.tried] for way in self.ways]
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
    job = _Job(run, to, kind, merged, certificate, checkpoint, tokenizer, template, rows, licences_of(run, checkpoint))
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


@dataclass
class _Job:
    """One export, and what was found while it was written."""

    run: Run
    to: str
    kind: str
    merged: bool
    certificate: Certificate
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    template: ServingTemplate
    rows: tuple[Example, ...]
    licences: Licences

    def __post_init__(self) -> None:
        self.notes = list(self.template.notes)
        self.proofs: list[str] = []
        self.values: dict[str, Any] = {"adapter_sha256": self.certificate.weights_sha256}
        self.ways: tuple[Way, ...] = ()

    @property
    def config(self) -> RunConfig:
        return without_folders(self.run.config())

    @property
    def question(self) -> str:
        """What the model is asked, with the instruction of the run's rows and none of their texts."""
        asked = question("YOUR TEXT", self.config.data, self.rows)
        return next(message.content for message in asked.messages if message.role == "user")

    def refuse_gguf(self, say: Say) -> None:
        """Refuses what can't be written as GGUF, or as a Modelfile, before anything is merged."""
        from transformers import AutoConfig

        from qlora_helpers.export.gguf_families import gguf_family
        from qlora_helpers.export.gguf_vocabulary import vocabulary
        from qlora_helpers.export.modelfile import turns_of

        base = usable_folder(self.checkpoint.folder, self.checkpoint.name, packed=False, say=say)
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        gguf_family(config)
        if self.merged:
            vocabulary(self.tokenizer, config.vocab_size)
        if self.to == "ollama":
            turns_of(self.template, self.tokenizer)

    def write(self, folder: Path, shard_gib: float, say: Say) -> None:
        """Writes all of the target's files."""
        if self.to in GGUF_TARGETS:
            self._write_gguf(folder, shard_gib, say)
        else:
            self._write_folder(folder, shard_gib, say)
        gguf = self.values.get("gguf", {}).get("file", "")
        self.ways = ways(
            self.to, self.run.name, self.config, gguf=gguf, adapter=not self.merged, question=self.question
        )
        card = export_card(
            self.run,
            self.certificate,
            merged=self.merged,
            licences=str(self.licences),
            run_it=run_section(self.ways),
            notes=self.notes,
        )
        write_text(folder / "README.md", card)
        self.values |= {
            "to": self.to,
            "licences": dataclasses.asdict(self.licences),
            "generation": generation_settings(self.template, self.config.evaluation, self.tokenizer),
            "ways": [dataclasses.asdict(way) for way in self.ways],
            "proofs": self.proofs,
            "notes": self.notes,
        }
        if self.merged and self.to not in GGUF_TARGETS:
            write_hashes(folder)
        files = sorted({*(path.name for path in folder.iterdir()), SUMMARY})
        write_json(folder / SUMMARY, self.values | {"files": files})

    def _write_folder(self, folder: Path, shard_gib: float, say: Say) -> None:
        """Writes the adapter, or the merged model, as transformers and vLLM read it."""
        if self.merged:
            folder.rmdir()  # it is made again with the model
            report = write_merged(self.run, self.checkpoint, folder, self.certificate, shard_gib, say)
            self.values["merged"] = dataclasses.asdict(report)
        else:
            folder.rmdir()
            write_adapter(self.run, folder, self.certificate)
        write_serving_files(folder, self.template, self.config.evaluation, self.tokenizer)
        if self.merged:
            self.proofs.append(str(check_serving_files(folder, self.config.data, self.tokenizer, self.rows)))
        if self.to == "lmi" and self.merged:
            longest = self.config.data.seq_len_tokens
            write_text(folder / "serving.properties", vllm.merged_properties(max_model_len=longest))
        elif self.to == "lmi":
            vllm.package_adapter(folder, self.config.model.name, folder / "model.tar.gz")
            self.notes.append(
                "the container renders messages with the base model's own template: send it prompts as text"
            )

    def _write_gguf(self, folder: Path, shard_gib: float, say: Say) -> None:
        """Writes the GGUF file, and for Ollama the Modelfile beside it."""
        from qlora_helpers.export.gguf_adapter import write_adapter_gguf
        from qlora_helpers.export.gguf_file import About, write_gguf
        from qlora_helpers.export.llama_cpp_check import checked_by_llama_cpp
        from qlora_helpers.export.modelfile import modelfile
        from qlora_helpers.export.quantize import K_QUANTS, quantize

        copy_regular(self.run.adapter_dir / FILE, folder / FILE)
        if not self.merged:
            base = usable_folder(self.checkpoint.folder, self.checkpoint.name, packed=False, say=say)
            path = folder / f"{self.run.name}-adapter-f32.gguf"
            report = write_adapter_gguf(base, self.run.adapter_dir, path, self.run.name)
            self.values["gguf"] = dataclasses.asdict(report)
            return
        merged = folder / ".merged"
        write_merged(self.run, self.checkpoint, merged, self.certificate, shard_gib, say)
        about = About(
            self.run.name,
            self.config.model.name,
            self.licences.base,
            self.licences.data,
            sampling(self.config.evaluation),
        )
        path = folder / f"{self.run.name}-{self.kind}.gguf"
        first = folder / f".{self.run.name}-bf16.gguf" if self.kind in K_QUANTS else path
        say(f"Writing {path.name} ...")
        written = "bf16" if self.kind in K_QUANTS else self.kind
        report = write_gguf(merged, first, self.tokenizer, self.template, about, kind=written)
        _removed(merged)
        values = dataclasses.asdict(report) | {"file": path.name, "kind": self.kind}
        read_back = (
            "every weight was read back" if first == path else "every weight was read back before it was quantised"
        )
        if first != path:
            del values["largest_error"]
            values["root_mean_square_error"] = quantize(first, path, self.kind)
            values["size_gib"] = gib(path.stat().st_size)
            first.unlink()
        self.values["gguf"] = values
        self.proofs.append(
            f"{read_back}, {report.tensors} tensors, within {report.largest_error:.2g} of its block's largest"
        )
        self.proofs.append(checked_by_llama_cpp(path, self.config.data, self.template, self.tokenizer, self.rows))
        if self.to == "ollama":
            text, notes = modelfile(path.name, self.template, self.tokenizer, self.config, str(self.licences))
            write_text(folder / "Modelfile", text)
            self.notes += notes
            self.proofs.append("the Modelfile's template writes ten conversations as the chat template does")


def _removed(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
