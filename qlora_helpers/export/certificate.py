"""The certificate beside a saved adapter, which every export and every upload asks for.

Owns the content of `certificate.json` and `sha256.json`, and decides when they count; `export.certify` makes a certificate. Knows
nothing of runs, data or models, and imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.base.files import write_json
from qlora_helpers.base.records import read_object, read_record
from qlora_helpers.base.tables import Table, Tabular

FILE, HASHES = "certificate.json", "sha256.json"
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
LOGIT_TOLERANCE = 1e-4
TRAIN_AGAIN = "Train the run again: it takes its newest good checkpoint, saves the adapter and certifies it."


@dataclass(frozen=True)
class Certificate(Tabular):
    """What an examination of a saved adapter found.

    Attributes:
        weights_sha256, settings_sha256: of the adapter's two files.
        tensors, parameters: how many the weights' file holds.
        missing: tensors of the model that the file lacks, or holds in another shape.
        unexpected: tensors of the file that the model lacks.
        unmoved: B matrices that are all zero.
        not_finite: tensors with an infinite value or a NaN.
        settings_changed: settings of the file that differ from the live model's, such as `lora_alpha: 32 -> 320`; all keys
            count except `certify.BOOKKEEPING`.
        prompts: how many prompts were asked with the file's weights and with the live ones.
        largest_difference: between their next-token logits; None where it is not finite or nothing was asked.
        same_answers: answers that are equal to the letter.
        base_model, base_revision, base_sha256: the base model; the hash covers its files' names, sizes and samples.
        data_fingerprint: identifies the prepared data that it was trained on.
        made: when, UTC.
        versions: of the packages.
    """

    weights_sha256: str
    settings_sha256: str
    tensors: int
    parameters: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    unmoved: tuple[str, ...]
    not_finite: tuple[str, ...]
    settings_changed: tuple[str, ...]
    prompts: int
    largest_difference: float | None
    same_answers: int
    base_model: str
    base_revision: str | None
    base_sha256: str | None
    data_fingerprint: str | None
    made: str
    versions: dict[str, str]

    @property
    def problems(self) -> tuple[str, ...]:
        """Lists what is wrong with the adapter; empty if nothing is."""
        found = []
        for names, what in (
            (self.missing, "missing from the file"),
            (self.unexpected, "in the file, but not in this model"),
            (self.unmoved, "still zero, so never trained"),
            (self.not_finite, "not finite"),
            (self.settings_changed, f"{SETTINGS} differs from the model"),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                found.append(f"{what}: {names[0]}{more}")
        if not self.prompts:
            found.append("the saved adapter was never asked")
        elif not (self.largest_difference is not None and self.largest_difference <= LOGIT_TOLERANCE):
            by = "" if self.largest_difference is None else f" by {self.largest_difference:.3g}"
            found.append(f"the saved adapter's logits differ from the trained one's{by or ' and are not finite'}")
        if self.same_answers < self.prompts:
            found.append(f"{self.prompts - self.same_answers} of {self.prompts} answers of the saved adapter differ")
        return tuple(found)

    @property
    def passed(self) -> bool:
        """Whether `problems` is empty."""
        return not self.problems

    def table(self) -> Table:
        """Returns what was checked and found, and the verdict."""
        verdict = "PASS" if self.passed else "FAIL: " + "; ".join(self.problems)
        moved = "all B moved off zero, all finite" if not (self.unmoved or self.not_finite) else "see the verdict"
        asked = (
            f"{self.same_answers} of {self.prompts} answers equal, logits within {self.largest_difference or 0:.1e}"
            if self.prompts
            else "-"
        )
        lines = [
            ("adapter", f"{self.parameters:,} parameters in {self.tensors} matrices, {moved}"),
            ("saved and live", asked),
            ("base", f"{self.base_model}, revision {self.base_revision or 'not from the hub'}"),
            ("data", (self.data_fingerprint or "unknown")[:12]),
            ("sha256", self.weights_sha256[:12]),
            ("verdict", verdict),
        ]
        return Table((), lines)


def sha256(path: Path) -> str:
    """Hashes a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_certificate(folder: Path) -> Certificate | None:
    """Reads what `certify` wrote; None if there is no readable certificate, or its verdict contradicts its values."""
    try:
        found = read_record(folder / FILE, Certificate)
        return found if found.passed == read_object(folder / FILE).get("passed") else None
    except UserError:
        return None


def require_certificate(folder: Path, *, next_step: str = TRAIN_AGAIN) -> Certificate:
    """Returns the certificate of an adapter that may leave the machine, and refuses any other.

    Args:
        folder: the adapter's folder, the run's own or an exported one.
        next_step: ends the message of a refusal.

    Raises:
        ModelError: there is no certificate, it did not pass, or the adapter's files have changed since.
    """
    found = _passed_certificate(folder, next_step)
    hashes = {WEIGHTS: found.weights_sha256, SETTINGS: found.settings_sha256}
    _refuse_changed_files(folder, hashes, "the certificate", next_step)
    return found


def require_merged(folder: Path, *, next_step: str) -> Certificate:
    """Returns the certificate of the adapter in a merged model whose files are still the exported ones.

    Args:
        folder: the merged model's folder.
        next_step: ends the message of a refusal.

    Raises:
        ModelError: there is no certificate, it did not pass, or the files have changed since `write_hashes`.
    """
    found = _passed_certificate(folder, next_step)
    unlisted = {path.name: "none" for path in sorted(folder.glob("*.safetensors"))}
    try:
        hashes = unlisted | read_object(folder / HASHES)
    except UserError as error:
        raise ModelError(f"{folder.name}/ has no readable {HASHES}", next_step=next_step) from error
    _refuse_changed_files(folder, hashes, HASHES, next_step)
    return found


def write_hashes(folder: Path) -> None:
    """Writes `sha256.json` into a merged model's folder: the hash of every other file in it."""
    files = sorted(path for path in folder.iterdir() if path.name != HASHES)
    write_json(folder / HASHES, {path.name: sha256(path) for path in files})


def _passed_certificate(folder: Path, next_step: str) -> Certificate:
    found = read_certificate(folder) if (folder / FILE).exists() else None
    if found is None:
        raise ModelError(f"{folder.name}/ has no certificate", expected=f"a readable {FILE}", next_step=next_step)
    if not found.passed:
        raise ModelError("the adapter did not pass its certificate", got="; ".join(found.problems), next_step=next_step)
    return found


def _refuse_changed_files(folder: Path, hashes: Mapping[str, str], listed_in: str, next_step: str) -> None:
    for name, expected in hashes.items():
        got = sha256(folder / name) if (folder / name).is_file() else "no file"
        if got != expected:
            raise ModelError(
                f"{name} is not the file that {listed_in} describes",
                expected=f"sha256 {str(expected)[:12]}",
                got=got[:12],
                next_step=next_step,
            )
