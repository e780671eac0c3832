"""Writes the files of one export into its folder, and keeps what was proved on the way.

`leaving` says what is refused before, and puts the folder in its place.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.files import write_json, write_text
from qlora_helpers.base.folders import copy_regular
from qlora_helpers.base.text import Say
from qlora_helpers.base.units import gib
from qlora_helpers.data.examples import Example
from qlora_helpers.data.prompts import question
from qlora_helpers.export import vllm
from qlora_helpers.export.bundle import without_folders, write_adapter, write_merged
from qlora_helpers.export.card import export_card
from qlora_helpers.export.certificate import FILE, Certificate, write_hashes
from qlora_helpers.export.how_to_run import RunCommand, run_commands, run_section
from qlora_helpers.export.licences import Licences
from qlora_helpers.export.serving_files import check_serving_files, generation_settings, sampling, write_serving_files
from qlora_helpers.export.serving_template import ServingTemplate
from qlora_helpers.model.adapter_files import read_adapter_settings
from qlora_helpers.model.checkpoints import Checkpoint
from qlora_helpers.model.stored_formats import usable_folder
from qlora_helpers.runs.folder import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GGUF_TARGETS = ("gguf", "ollama")
SUMMARY = "export.json"


@dataclass
class ExportJob:
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
        self.ways: tuple[RunCommand, ...] = ()

    @property
    def config(self) -> RunConfig:
        """The run's settings without this machine's folders, as they may leave it."""
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
        on_experts = bool(read_adapter_settings(self.run.adapter_dir).get("target_parameters"))
        about = {"gguf": gguf, "adapter": not self.merged, "on_experts": on_experts, "question": self.question}
        self.ways = run_commands(self.to, self.run.name, self.config, **about)
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
            "ways": [dataclasses.asdict(each) for each in self.ways],
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
        from qlora_helpers.export.llama_cpp_check import checked_by_llama_cpp
        from qlora_helpers.export.modelfile import modelfile

        copy_regular(self.run.adapter_dir / FILE, folder / FILE)
        if not self.merged:
            base = usable_folder(self.checkpoint.folder, self.checkpoint.name, packed=False, say=say)
            path = folder / f"{self.run.name}-adapter-f32.gguf"
            report = write_adapter_gguf(base, self.run.adapter_dir, path, self.run.name)
            self.values["gguf"] = dataclasses.asdict(report)
            return
        path = self._write_whole_gguf(folder, shard_gib, say)
        self.proofs.append(checked_by_llama_cpp(path, self.config.data, self.template, self.tokenizer, self.rows))
        if self.to == "ollama":
            text, notes = modelfile(path.name, self.template, self.tokenizer, self.config, str(self.licences))
            write_text(folder / "Modelfile", text)
            self.notes += notes
            self.proofs.append("the Modelfile's template writes ten conversations as the chat template does")

    def _write_whole_gguf(self, folder: Path, shard_gib: float, say: Say) -> Path:
        """Merges the model and writes it as one GGUF file; a K-quant is made of a file in bfloat16."""
        from qlora_helpers.export.gguf_file import About, write_gguf
        from qlora_helpers.export.quantize import K_QUANTS, quantize

        merged = folder / ".merged"
        write_merged(self.run, self.checkpoint, merged, self.certificate, shard_gib, say)
        licences, settings = self.licences, sampling(self.config.evaluation)
        about = About(self.run.name, self.config.model.name, licences.base, licences.data, settings)
        path = folder / f"{self.run.name}-{self.kind}.gguf"
        first = folder / f".{self.run.name}-bf16.gguf" if self.kind in K_QUANTS else path
        say(f"Writing {path.name} ...")
        written = "bf16" if self.kind in K_QUANTS else self.kind
        report = write_gguf(merged, first, self.tokenizer, self.template, about, kind=written)
        _removed(merged)
        values = dataclasses.asdict(report) | {"file": path.name, "kind": self.kind}
        read_back = "every weight was read back"
        if first != path:
            read_back += " before it was quantised"
            del values["largest_error"]
            values["root_mean_square_error"] = quantize(first, path, self.kind)
            values["size_gib"] = gib(path.stat().st_size)
            first.unlink()
        self.values["gguf"] = values
        self.proofs.append(
            f"{read_back}, {report.tensors} tensors, within {report.largest_error:.2g} of its block's largest"
        )
        return path


def _removed(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
