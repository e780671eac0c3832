"""A trained run made ready to leave the machine: adapter, merged 16-bit model, what servers take, the hub.

Composes `workflow` and the steps below it. Refuses without a certificate that passed and still fits the files.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers import hosting, rescue, workflow
from qlora_helpers.adapter_files import load_adapter
from qlora_helpers.certificate import FILE, SETTINGS, WEIGHTS, Certificate, require_certificate, write_hashes
from qlora_helpers.checkpoints import Checkpoint, base_fingerprint, find_checkpoint
from qlora_helpers.comparison import answered, compared
from qlora_helpers.config import RunConfig, config_from_dict
from qlora_helpers.errors import ModelError, UserError
from qlora_helpers.merging import SHARD_GIB, MergeReport, merge, tokenizer_files
from qlora_helpers.report import short_name
from qlora_helpers.run import Run
from qlora_helpers.tables import text_table
from qlora_helpers.tensor_files import stored_tensors
from qlora_helpers.units import gib
from qlora_helpers.whole_files import read_json, replaced_folder, write_json

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_helpers.models import LoadedModel

DRIFT_PROMPTS = 8
SPACE_MARGIN = 1.02  # of the merged model's size, for its index and tokenizer
MEMORY_MARGIN = 1.2  # of a 16-bit model's size, where drift loads it
FOLDER = "export"
PARTS = {"adapter", "merged", "model.tar.gz", "serving.json", "export.json"}
_CARD_NOTE = "Answers need the prompt that was trained; see `qlora_helpers`, template `{template}`."


@dataclass(frozen=True)
class Drift:
    """How far two forms of the tuned model are apart, on the run's held-out prompts.

    Attributes:
        first, second: the forms.
        prompts: asked.
        largest_difference: between next-token logits.
        kl_nats: mean of KL(first || second) over the next token's probabilities.
        same_answers: short greedy answers equal to the letter.
    """

    first: str
    second: str
    prompts: int
    largest_difference: float
    kl_nats: float
    same_answers: int


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far the merged model is from the one that was trained; `export.json`."""

    folder: Path
    adapter_sha256: str
    merged: MergeReport | None
    drift: tuple[Drift, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        lines = [f"{self.folder.name}/: " + ", ".join(sorted(item.name for item in self.folder.iterdir()))]
        lines += [repr(self.merged)] if self.merged else []
        if self.drift:
            header = ["from", "to", "largest logit difference", "KL, nats", "equal answers"]
            rows = [[d.first, d.second, f"{d.largest_difference:.3g}", f"{d.kl_nats:.2g}", f"{d.same_answers} of {d.prompts}"]
                    for d in self.drift]  # fmt: skip
            lines.append(text_table(header, rows, numbers=range(2, 5)))
        return "\n".join([*lines, *self.notes])


def export(
    run: Run, *, out: Path | None = None, merged: bool = True, drift: bool = True, shard_gib: float = SHARD_GIB,
    say: workflow.Say = print,
) -> ExportReport:  # fmt: skip
    """Writes `export/`: the adapter with its card and certificate, the merged model, and what servers need; whole or not at all.

    Args:
        run: a trained run.
        out: the folder, new, empty or an earlier export; none takes `export` in the run's.
        merged: whether to write the merged model.
        drift: whether to measure how far it is from the adapter on 4 and on 16 bits, where memory allows.
        shard_gib: size of a file of the merged model.
        say: told what takes long.

    Raises:
        RunError: the run has no adapter yet.
        ModelError: no certificate, or not this adapter's or base model's; the adapter can't be merged; no space; `out` holds
            something else.
    """
    out = (out or run.folder / FOLDER).resolve()
    _refuse_other_content(out)
    run.need(run.adapter_dir / WEIGHTS, "Notebook 04_train (or `python -m qlora_helpers train`)")
    certificate = require_certificate(run.adapter_dir)
    checkpoint = find_checkpoint(run.config().model, say=say)
    _check_base(checkpoint, certificate)
    report, notes = None, []
    with replaced_folder(out) as folder:
        _write_adapter(run, folder / "adapter", certificate)
        if merged:
            report = _write_merged(run, checkpoint, folder / "merged", certificate, shard_gib, say)
        notes += _write_serving(run, folder, merged)
        found: tuple[Drift, ...] = ()
        if merged and drift:
            found, reason = _measured_drift(run, folder / "merged", say)
            notes += [reason] if reason else []
        values = {"adapter_sha256": certificate.weights_sha256, "merged": asdict(report) if report else None}
        write_json(folder / "export.json", values | {"drift": [asdict(one) for one in found], "notes": notes})
    return ExportReport(out, certificate.weights_sha256, report, found, tuple(notes))


def _refuse_other_content(out: Path) -> None:
    """The export takes the folder's place, with all that is in it: that may be an earlier export, and nothing else."""
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    other = sorted(names - PARTS) or sorted(names if "export.json" not in names else ())
    if other:
        raise ModelError(
            f"{out} is not written over", expected="a new or empty folder, or an earlier export",
            got=f"{', '.join(other[:3])}{' and more' if len(other) > 3 else ''} in it",
            next_step=f"Name a folder of its own, such as {out / 'export'}.",
        )  # fmt: skip


def _check_base(checkpoint: Checkpoint, certificate: Certificate) -> None:
    found = base_fingerprint(checkpoint.folder)
    if found != certificate.base_sha256:
        raise ModelError(
            f"the files of {checkpoint.name} are not those that the adapter was trained on",
            expected=f"sha256 {(certificate.base_sha256 or 'none')[:12]}, revision {certificate.base_revision}",
            got=f"{(found or 'none')[:12]}, revision {checkpoint.revision}",
            next_step="Set model.revision to that revision, or train again.",
        )


def _write_adapter(run: Run, folder: Path, certificate: Certificate) -> None:
    folder.mkdir()
    for name in (WEIGHTS, SETTINGS, FILE):
        shutil.copyfile(run.adapter_dir / name, folder / name)
    if (run.adapter_dir / "config.json").exists():
        trained = config_from_dict(read_json(run.adapter_dir / "config.json"))
        write_json(folder / "config.json", _without_folders(trained).to_dict())
    for path in tokenizer_files(run.adapter_dir):
        shutil.copyfile(path, folder / path.name)
    (folder / "README.md").write_text(_card(run, certificate, merged=False), encoding="utf-8")


def _without_folders(config: RunConfig) -> RunConfig:
    """Settings that name a local model or data file by its last part: where it lies on this machine leaves with nothing."""
    names = {"model.name": config.model.name, "data.source": config.data.source}
    return config.with_settings({key: short_name(name, keep_owner=True) for key, name in names.items()})


def _write_merged(
    run: Run, checkpoint: Checkpoint, folder: Path, certificate: Certificate, shard_gib: float, say: workflow.Say
) -> MergeReport:
    if checkpoint.shape is not None:
        raise ModelError(
            f"{checkpoint.name} has no files to merge into",
            next_step="Export the adapter alone (merged=False, --no-merge).",
        )
    needed = 2 * sum(tensor.values for tensor in stored_tensors(checkpoint.folder).values())
    free = shutil.disk_usage(folder.parent).free
    if SPACE_MARGIN * needed > free:
        raise ModelError(
            "there is not enough disk space for the merged model", expected=f"{gib(needed):.1f} GiB",
            got=f"{gib(free):.1f} GiB free", next_step="Free some (notebook 08), or name another folder with `out`.",
        )  # fmt: skip
    say(f"Merging into {gib(needed):.2f} GiB of 16-bit weights ...")
    folder.mkdir()
    try:
        report = merge(checkpoint.folder, run.adapter_dir, folder, shard_gib=shard_gib)
    except OSError as error:  # what was free is so no more
        raise ModelError(
            f"the merged model could not be written ({error.strerror or error})",
            next_step="Nothing is left of it: free some space (notebook 08), or name another folder with `out`.",
        ) from error
    write_hashes(folder)
    (folder / "README.md").write_text(_card(run, certificate, merged=True), encoding="utf-8")
    shutil.copyfile(run.adapter_dir / FILE, folder / FILE)
    return report


def _card(run: Run, certificate: Certificate, *, merged: bool) -> str:
    """The model card: what it is, of what, how good on what, and what it is not."""
    config, adapter = run.config(), run.config().adapter
    prepared = run.data_dir / "prepared.json"
    source = read_json(prepared)["source"] if prepared.exists() else "dialogues"  # a name and licence, never a path
    head = ["---", f"base_model: {certificate.base_model}"]
    head += [] if merged else ["library_name: peft"]
    head += ["pipeline_tag: text-generation", f"base_model_relation: {'merge' if merged else 'adapter'}", "---"]
    what = "The base model with its adapter merged in, bfloat16" if merged else "A LoRA adapter"
    lines = [
        *head, "", f"# {run.name}", "",
        f"{what} (r={adapter.r}, alpha={adapter.lora_alpha}) for {certificate.base_model} at revision "
        f"{certificate.base_revision or 'unknown'}, trained on {source} to summarise dialogues.",
        "", _CARD_NOTE.format(template=config.data.template), "",
    ]  # fmt: skip
    if run.evaluation_path.exists():
        values = read_json(run.evaluation_path)
        header = ["model", "ROUGE-1", "ROUGE-2", "ROUGE-L", "answers that end"]
        lines += [
            f"On {len(values['rows'])} held-out rows:",
            "",
            "| " + " | ".join(header) + " |",
            "|---" * len(header) + "|",
        ]
        lines += [f"| {name} | {s['rouge1']:.1f} | {s['rouge2']:.1f} | {s['rouge_l']:.1f} | {s['stop_rate']:.0%} |"
                  for name, s in values["scores"].items()]  # fmt: skip
        verdict = values.get("comparisons", {}).get("base", {}).get("verdict")
        lines += ["", *([f"Tuned against untuned: {verdict}", ""] if verdict else [])]
    lines += [
        f"Certificate: `{FILE}` (adapter sha256 `{certificate.weights_sha256[:16]}`). It makes things up like any such model.",
        "",
    ]
    return "\n".join(lines)


def _write_serving(run: Run, folder: Path, merged: bool) -> list[str]:
    """How vLLM and AWS's LMI container are told of adapter and merged model; what can't be served so is said."""
    config, notes = _without_folders(run.config()), []
    longest = config.data.seq_len_tokens
    commands = {"seq_len_tokens": longest}
    if merged:
        commands["vllm_merged"] = (
            f"vllm serve ./merged --dtype bfloat16 --max-model-len {longest} --served-model-name {run.name}"
        )
        properties = hosting.merged_properties(max_model_len=longest)
        (folder / "merged" / "serving.properties").write_text(properties, encoding="utf-8")
    try:
        archive = hosting.package_adapter(folder / "adapter", config.model.name, folder / "model.tar.gz")
        rank = next(r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= config.adapter.r)
        commands["vllm_adapter"] = (
            f"vllm serve {config.model.name} --enable-lora --max-lora-rank {rank} --lora-modules tuned=./adapter "
            f"--max-model-len {longest}"
        )
        with tarfile.open(archive) as opened:
            commands["lmi_archive"] = sorted(opened.getnames())
    except UserError as error:
        notes.append(f"no archive for an endpoint with the adapter apart: {error}")
    write_json(folder / "serving.json", commands)
    return notes


def _measured_drift(run: Run, merged: Path, say: workflow.Say) -> tuple[tuple[Drift, ...], str]:
    """The adapter on 4-bit weights, on 16-bit weights and merged, each asked alone; or the reason why they were not."""
    config = run.config()
    needed = MEMORY_MARGIN * _loaded_bytes(merged)
    free = _free_bytes()
    if needed > free:
        return (), f"drift not measured: the 16-bit model takes {gib(needed):.1f} GiB, {gib(free):.1f} GiB are free"
    plain = replace(config.model, quantization="none")
    forms: dict[str, Callable[[], tuple[LoadedModel, PeftModel]]] = {
        "adapter on 4 bits": lambda: _with_adapter(run, config.model),
        "adapter on 16 bits": lambda: _with_adapter(run, plain),
        "merged": lambda: _alone(replace(plain, name=str(merged), revision=None)),
    }
    if config.model.quantization == "none":
        del forms["adapter on 4 bits"]
    found = {}
    for name, load in forms.items():
        say(f"Asking the {name} ...")
        try:
            found[name] = _answers_of(run, load, say)
        except Exception as error:
            if not rescue.ran_out(error):
                raise
            rescue.let_go(error)
        rescue.free_memory()
        if name not in found:  # hours of merging are not thrown away for it
            return (), f"drift not measured: asking the {name} ran out of memory"
    names = list(found)
    pairs = [(first, names[-1]) for first in names[:-1]] + ([(names[0], names[1])] if len(names) > 2 else [])
    return tuple(_drift(first, second, found[first], found[second]) for first, second in pairs), ""


def _answers_of(run: Run, load: Callable[[], tuple[LoadedModel, PeftModel]], say: workflow.Say) -> tuple[list, list]:
    """What a form answers to the run's held-out prompts; the model is gone afterwards."""
    loaded, model = load()
    data = workflow.prepare_data(run, loaded.tokenizer, shape=loaded.model.config.to_dict(), say=say)
    return answered(run, model, loaded, data, DRIFT_PROMPTS)


def _with_adapter(run: Run, config: Any) -> tuple[LoadedModel, PeftModel]:
    from qlora_helpers.models import load_model

    loaded = load_model(config, say=lambda text: None)
    return loaded, load_adapter(run, loaded)


def _alone(config: Any) -> tuple[LoadedModel, Any]:
    from qlora_helpers.models import load_model

    loaded = load_model(config, say=lambda text: None)
    return loaded, loaded.model


def _drift(first: str, second: str, one: tuple[list, list], other: tuple[list, list]) -> Drift:
    import torch

    kl = []
    for a, b in zip(one[0], other[0], strict=True):
        log_a, log_b = torch.log_softmax(a.double(), -1), torch.log_softmax(b.double(), -1)
        kl.append(float((log_a.exp() * (log_a - log_b)).sum()))
    shared = compared(one, other)
    return Drift(
        first, second, shared["prompts"], shared["largest_difference"], sum(kl) / len(kl), shared["same_answers"]
    )


def _loaded_bytes(folder: Path) -> int:
    """Bytes of a 16-bit model in memory: 32-bit on a CPU, as products are there."""
    import torch

    values = sum(tensor.values for tensor in stored_tensors(folder).values())
    return values * (2 if torch.cuda.is_available() else 4)


def _free_bytes() -> int:
    import psutil
    import torch

    if torch.cuda.is_available():
        return sum(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    return psutil.virtual_memory().available
