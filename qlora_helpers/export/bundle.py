"""Writes what leaves the machine of a trained run: the adapter, the merged bfloat16 model, and files for servers.

Refuses without a certificate that passed and still fits the files.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import RunConfig, config_from_dict
from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.base.files import read_json, replaced_folder, write_json
from qlora_helpers.base.folders import copy_regular
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.text import Say, short_name
from qlora_helpers.base.units import gib
from qlora_helpers.data.examples import Example
from qlora_helpers.data.prepared_file import read_prepared_file
from qlora_helpers.export import vllm
from qlora_helpers.export.adapter import need_adapter
from qlora_helpers.export.card import export_card
from qlora_helpers.export.certificate import FILE, SETTINGS, WEIGHTS, Certificate, require_certificate, write_hashes
from qlora_helpers.export.drift import Drift, measured_drift
from qlora_helpers.export.merge import SHARD_GIB, MergeReport, merge
from qlora_helpers.export.serving_files import check_serving_files, server_options, write_serving_files
from qlora_helpers.export.serving_template import serving_template
from qlora_helpers.model.checkpoints import Checkpoint, base_fingerprint, find_checkpoint
from qlora_helpers.model.stored_formats import usable_folder
from qlora_helpers.model.stored_tensors import stored_tensors
from qlora_helpers.model.tokenizers import tokenizer_files, tokenizer_of
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.guard import refuse_links

if TYPE_CHECKING:
    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.model.loading import LoadedModel

SPACE_MARGIN = 1.02  # times the merged model's size: its index and tokenizer need space too
FOLDER = "export"
PARTS = {"adapter", "merged", "model.tar.gz", "serving.json", "export.json"}


@dataclass(frozen=True)
class ExportReport(Tabular):
    """What an export wrote, and how far the merged model is from the one that was trained; stored in `export.json`."""

    folder: Path
    adapter_sha256: str
    merged: MergeReport | None
    drift: tuple[Drift, ...]
    notes: tuple[str, ...]

    def table(self) -> Table:
        """Returns the files that were written and, where a model was merged, how far each pair of models is apart."""
        files = f"{self.folder.name}/: " + ", ".join(sorted(item.name for item in self.folder.iterdir()))
        header = ["from", "to", "largest logit difference", "KL, nats", "equal answers"] if self.drift else []
        rows = [
            [d.first, d.second, f"{d.largest_difference:.3g}", f"{d.kl_nats:.2g}", f"{d.same_answers} of {d.prompts}"]
            for d in self.drift
        ]
        merged = [repr(self.merged)] if self.merged else []
        return Table(header, rows, caption=files, notes=[*merged, *self.notes], numbers=range(2, 5))


def export(
    run: Run,
    *,
    out: Path | None = None,
    merged: bool = True,
    prepare: Callable[[LoadedModel], PreparedData] | None = None,
    shard_gib: float = SHARD_GIB,
    say: Say = print,
) -> ExportReport:
    """Writes `export/`: the adapter with its card and certificate, the merged model, and what servers need; whole or not at all.

    Args:
        run: a trained run.
        out: the folder: new, empty or an earlier export; None takes `export` in the run's folder.
        merged: whether to write the merged model.
        prepare: returns the run's prepared data for a loaded model. Where it is given and memory allows, the distance of the
            merged model from the adapter on 4-bit and on bfloat16 weights is measured.
        shard_gib: size of a file of the merged model, GiB.
        say: receives a line before anything that takes long.

    Raises:
        RunError: the run has no adapter yet.
        ModelError: there is no certificate that passed and fits adapter and base model, the adapter can't be merged, the disk is
            too small, or `out` holds something else.
    """
    refuse_links(run.folder)
    out = (out or run.folder / FOLDER).resolve()
    _refuse_other_content(out)
    need_adapter(run)
    certificate = require_certificate(run.adapter_dir)
    checkpoint = find_checkpoint(run.config().model, say=say)
    check_base(checkpoint, certificate)
    tokenizer, rows = tokenizer_of(checkpoint), held_out(run)
    template = serving_template(run.config().data, tokenizer, rows)
    report, notes = None, []
    with replaced_folder(out) as folder:
        write_adapter(run, folder / "adapter", certificate)
        write_serving_files(folder / "adapter", template, run.config().evaluation, tokenizer)
        if merged:
            report = write_merged(run, checkpoint, folder / "merged", certificate, shard_gib, say)
        notes += _write_serving(run, folder, merged)
        found: tuple[Drift, ...] = ()
        if merged and prepare:
            found, reason = measured_drift(run, folder / "merged", prepare=prepare, say=say)
            notes += [reason] if reason else []
        notes += template.notes
        if merged:  # only now: prepared data that was made with the model's own template would not fit this one
            write_serving_files(folder / "merged", template, run.config().evaluation, tokenizer)
            write_hashes(folder / "merged")
            asked = check_serving_files(folder / "merged", run.config().data, tokenizer, rows)
            notes += [str(asked)] if asked.equal < asked.prompts else []
        values = {"adapter_sha256": certificate.weights_sha256, "merged": asdict(report) if report else None}
        write_json(folder / "export.json", values | {"drift": [asdict(one) for one in found], "notes": notes})
    return ExportReport(out, certificate.weights_sha256, report, found, tuple(notes))


def _refuse_other_content(out: Path) -> None:
    """Refuses a folder with anything but an earlier export in it, because the export replaces the whole folder."""
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    other = sorted(names - PARTS) or sorted(names if "export.json" not in names else ())
    if other:
        raise ModelError(
            f"{out} is not overwritten",
            expected="a new or empty folder, or an earlier export",
            got=f"{', '.join(other[:3])}{' and more' if len(other) > 3 else ''} in it",
            next_step=f"Name a folder of its own, such as {out / 'export'}.",
        )


def check_base(checkpoint: Checkpoint, certificate: Certificate) -> None:
    """Refuses a base model whose files are not those that the adapter was trained on.

    Raises:
        ModelError: their fingerprint differs from the certificate's.
    """
    found = base_fingerprint(checkpoint.folder)
    if found != certificate.base_sha256:
        raise ModelError(
            f"the files of {checkpoint.name} are not those that the adapter was trained on",
            expected=f"sha256 {(certificate.base_sha256 or 'none')[:12]}, revision {certificate.base_revision}",
            got=f"{(found or 'none')[:12]}, revision {checkpoint.revision}",
            next_step="Set model.revision to that revision, or train again.",
        )


def write_adapter(run: Run, folder: Path, certificate: Certificate) -> None:
    """Writes a new folder with the adapter, its certificate, settings without this machine's paths, tokenizer and card."""
    folder.mkdir()
    for name in (WEIGHTS, SETTINGS, FILE):
        copy_regular(run.adapter_dir / name, folder / name)
    if (run.adapter_dir / "config.json").exists():
        trained = config_from_dict(read_json(run.adapter_dir / "config.json"))
        write_json(folder / "config.json", without_folders(trained).to_dict())
    for path in tokenizer_files(run.adapter_dir):
        copy_regular(path, folder / path.name)
    (folder / "README.md").write_text(export_card(run, certificate, merged=False), encoding="utf-8")


def without_folders(config: RunConfig) -> RunConfig:
    """Returns settings that name a local model or data file by its last part, so that no path of this machine is exported."""
    names = {"model.name": config.model.name, "data.source": config.data.source}
    return config.with_settings({key: short_name(name, keep_owner=True) for key, name in names.items()})


def write_merged(
    run: Run, checkpoint: Checkpoint, folder: Path, certificate: Certificate, shard_gib: float, say: Say
) -> MergeReport:
    """Writes a new folder with base model and adapter merged in bfloat16, its certificate, card and hashes.

    Args:
        run: a trained run.
        checkpoint: its base model.
        folder: is made.
        certificate: of the adapter.
        shard_gib: size of a file of weights, GiB.
        say: receives a line before anything that takes long.

    Raises:
        ModelError: the base model has no files (random weights), or the disk is too small.
    """
    if checkpoint.shape is not None:
        raise ModelError(
            f"{checkpoint.name} has no files to merge into",
            next_step="Export the adapter alone (merged=False, --no-merge).",
        )
    base = usable_folder(checkpoint.folder, checkpoint.name, packed=False, say=say)  # of NF4 files, an unpacked copy
    needed = 2 * sum(tensor.values for tensor in stored_tensors(base).values())
    free = shutil.disk_usage(folder.parent).free
    if SPACE_MARGIN * needed > free:
        raise ModelError(
            "there is not enough disk space for the merged model",
            expected=f"{gib(needed):.1f} GiB",
            got=f"{gib(free):.1f} GiB free",
            next_step="Free some (notebook 08), or name another folder with `out`.",
        )
    say(f"Merging into {gib(needed):.2f} GiB of bfloat16 weights ...")
    folder.mkdir()
    try:
        report = merge(base, run.adapter_dir, folder, shard_gib=shard_gib)
    except OSError as error:  # the space that was free is taken by now
        raise ModelError(
            f"the merged model could not be written ({error.strerror or error})",
            next_step="Nothing of it is left: free some space (notebook 08), or name another folder with `out`.",
        ) from error
    (folder / "README.md").write_text(export_card(run, certificate, merged=True), encoding="utf-8")
    copy_regular(run.adapter_dir / FILE, folder / FILE)
    write_hashes(folder)
    return report


def held_out(run: Run) -> tuple[Example, ...]:
    """Returns the run's held-out rows."""
    prepared = read_prepared_file(run.data_dir)
    return prepared.test if prepared else ()


def _write_serving(run: Run, folder: Path, merged: bool) -> list[str]:
    """Writes what vLLM and AWS's LMI container need for adapter and merged model; returns notes on what can't be served."""
    config, notes = without_folders(run.config()), []
    longest = config.data.seq_len_tokens
    commands: dict[str, Any] = {"seq_len_tokens": longest}
    if merged:
        commands["vllm_merged"] = (
            f"vllm serve ./merged --dtype bfloat16 --max-model-len {longest} --served-model-name {run.name} "
            f"{server_options(config.evaluation)}"
        )
        properties = vllm.merged_properties(max_model_len=longest)
        (folder / "merged" / "serving.properties").write_text(properties, encoding="utf-8")
    try:
        archive = vllm.package_adapter(folder / "adapter", config.model.name, folder / "model.tar.gz")
        rank = vllm.allowed_rank(config.adapter.r)
        commands["vllm_adapter"] = (
            f"vllm serve {config.model.name} --enable-lora --max-lora-rank {rank} --lora-modules tuned=./adapter "
            f"--max-model-len {longest} --chat-template ./adapter/chat_template.jinja {server_options(config.evaluation)}"
        )
        with tarfile.open(archive) as opened:
            commands["lmi_archive"] = sorted(opened.getnames())
    except UserError as error:
        notes.append(f"no archive for an endpoint with a separate adapter: {error}")
    write_json(folder / "serving.json", commands)
    return notes
