"""Is this adapter what it should be: a certificate beside it, made after training and asked for before it leaves the machine.

Owns what is checked of an adapter's file and what `certificate.json` holds. Knows nothing of runs, data or how a model is asked:
what the model answered with the file's weights is handed in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.base.tables import Table, Tabular

if TYPE_CHECKING:
    from peft import PeftModel

FILE, HASHES = "certificate.json", "sha256.json"
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
LOGIT_TOLERANCE = 1e-4
REMAKE = "Train the run again: it takes its newest good checkpoint, saves the adapter and certifies it."
BOOKKEEPING = {  # keys of the adapter's settings that change nothing of what it answers
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "lora_dropout",
}


@dataclass(frozen=True)
class Certificate(Tabular):
    """What was found of a saved adapter.

    Attributes:
        weights_sha256, settings_sha256: of the adapter's two files.
        tensors, parameters: in the weights' file.
        missing, unexpected: tensors that the model has and the file has not (in this shape), and the other way round.
        unmoved: B matrices that are all zero.
        not_finite: tensors with a value that is no finite number.
        settings_changed: settings of the file that are not the live model's, as `lora_alpha: 32 -> 320`; all keys count but
            `BOOKKEEPING`.
        prompts, largest_difference, same_answers: prompts asked with the file's weights and with the live ones, the largest
            difference of their next-token logits (None where that is no number), and answers equal to the letter.
        base_model, base_revision, base_sha256: what the adapter belongs to; the hash is of the files' names, sizes and samples.
        data_fingerprint: of the prepared data that it was trained on.
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
        """What speaks against the adapter; empty when all is well."""
        found = []
        for names, what in (
            (self.missing, "missing from the file"),
            (self.unexpected, "in the file, but not of this model"),
            (self.unmoved, "still zero, so never trained"),
            (self.not_finite, "not finite"),
            (self.settings_changed, f"in {SETTINGS} other than in the model"),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                found.append(f"{what}: {names[0]}{more}")
        if not self.prompts:
            found.append("the saved adapter was never asked")
        elif not (self.largest_difference is not None and self.largest_difference <= LOGIT_TOLERANCE):
            by = "no number" if self.largest_difference is None else f"{self.largest_difference:.3g}"
            found.append(f"the saved adapter's logits differ from the trained one's by {by}")
        if self.same_answers < self.prompts:
            found.append(f"{self.prompts - self.same_answers} of {self.prompts} answers of the saved adapter differ")
        return tuple(found)

    @property
    def passed(self) -> bool:
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
    """Of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expected_tensors(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the model's adapter is saved as."""
    from peft import get_peft_model_state_dict

    return {name: tuple(value.shape) for name, value in _state(get_peft_model_state_dict, model).items()}


def expected_settings(model: PeftModel) -> dict[str, Any]:
    """The settings of the model's adapter, as JSON holds them."""
    return json.loads(json.dumps(model.active_peft_config.to_dict(), default=sorted))  # peft keeps names in sets


def certify(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    *,
    settings: Mapping[str, Any],
    asked: Mapping[str, Any],
    base: Mapping[str, Any],
    data_fingerprint: str | None,
    versions: dict[str, str],
) -> Certificate:
    """Looks at a saved adapter and writes its certificate into its folder, whether it passed or not.

    Args:
        folder: of the adapter.
        expected: names and shapes of its tensors (`expected_tensors`).
        settings: of the live model's adapter (`expected_settings`).
        asked: `prompts`, `largest_difference` and `same_answers` of the file's weights against the live ones.
        base: `name`, `revision` and `sha256` of the base model.
        data_fingerprint: of the prepared data.
        versions: of the packages.

    Raises:
        ModelError: there is no readable adapter.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    unmoved, not_finite = [], []
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            for name in list(weights.keys()):
                value = weights.get_tensor(name)
                shapes[name] = tuple(value.shape)
                if not torch.isfinite(value).all():
                    not_finite.append(name)
                if "lora_B" in name and not value.any():
                    unmoved.append(name)
        settings_changed = _differences(settings, read_json(folder / SETTINGS))
    except (SafetensorError, OSError, UserError) as error:
        raise ModelError(f"{folder.name}/ holds no readable adapter ({error})", next_step=REMAKE) from error
    difference = asked["largest_difference"]
    finite = difference is not None and math.isfinite(difference)
    found = Certificate(
        sha256(folder / WEIGHTS),
        sha256(folder / SETTINGS),
        len(shapes),
        sum(math.prod(shape) for shape in shapes.values()),
        tuple(sorted(name for name, shape in expected.items() if shapes.get(name) != shape)),
        tuple(sorted(set(shapes) - set(expected))),
        tuple(unmoved),
        tuple(not_finite),
        settings_changed,
        asked["prompts"],
        difference if finite else None,
        asked["same_answers"],
        base["name"],
        base["revision"],
        base["sha256"],
        data_fingerprint,
        datetime.now(UTC).isoformat(timespec="seconds"),
        versions,
    )
    write_json(folder / FILE, asdict(found) | {"passed": found.passed, "problems": list(found.problems)})
    return found


def _differences(live: Mapping[str, Any], saved: Any) -> tuple[str, ...]:
    """Settings that decide what an adapter computes and are not the same in both; lists of names in any order."""
    if not isinstance(saved, dict):
        raise ModelError(f"{SETTINGS} holds no settings", expected="an object", got=type(saved).__name__)

    names = sorted((set(live) | set(saved)) - BOOKKEEPING)
    both = [(name, _as_text(live, name), _as_text(saved, name)) for name in names]
    return tuple(f"{name}: {before} -> {after}" for name, before, after in both if before != after)


def _as_text(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "missing"
    value = settings[name]
    is_names = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return json.dumps(sorted(value) if is_names else value)


def read_certificate(folder: Path) -> Certificate | None:
    """What `certify` wrote, or None where there is none that can be read, or one whose verdict is not that of its values."""
    try:
        values = read_json(folder / FILE)
        read: dict[str, Any] = {item.name: values[item.name] for item in fields(Certificate)}
        read = {key: tuple(value) if isinstance(value, list) else value for key, value in read.items()}
        found = Certificate(**read)
        return found if found.passed == values["passed"] else None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None


def require_certificate(folder: Path, *, next_step: str = REMAKE) -> Certificate:
    """The certificate of an adapter that is fit to leave the machine.

    Args:
        folder: of the adapter, the run's own or an exported one.
        next_step: what to do where it is not; the end of the message.

    Raises:
        ModelError: there is none, it did not pass, or the adapter's files are no longer those that it speaks of.
    """
    found = _passed(folder, next_step)
    hashes = {WEIGHTS: found.weights_sha256, SETTINGS: found.settings_sha256}
    _refuse_other_files(folder, hashes, "the certificate", next_step)
    return found


def require_merged(folder: Path, *, next_step: str) -> Certificate:
    """The certificate of the adapter in a merged model whose files are those that were exported.

    Args:
        folder: of the merged model.
        next_step: as for `require_certificate`.

    Raises:
        ModelError: there is none, it did not pass, or the files are no longer those that `write_hashes` saw.
    """
    found = _passed(folder, next_step)
    unlisted = {path.name: "none" for path in sorted(folder.glob("*.safetensors"))}
    try:
        hashes = unlisted | dict(read_json(folder / HASHES))
    except (OSError, ValueError, TypeError, UserError) as error:
        raise ModelError(f"{folder.name}/ has no readable {HASHES}", next_step=next_step) from error
    _refuse_other_files(folder, hashes, HASHES, next_step)
    return found


def write_hashes(folder: Path) -> None:
    """Writes `sha256.json` into a merged model's folder: the hash of every file that is in it."""
    write_json(folder / HASHES, {path.name: sha256(path) for path in sorted(folder.iterdir())})


def _passed(folder: Path, next_step: str) -> Certificate:
    found = read_certificate(folder) if (folder / FILE).exists() else None
    if found is None:
        raise ModelError(f"{folder.name}/ has no certificate", expected=f"a readable {FILE}", next_step=next_step)
    if not found.passed:
        raise ModelError("the adapter did not pass its certificate", got="; ".join(found.problems), next_step=next_step)
    return found


def _refuse_other_files(folder: Path, hashes: Mapping[str, str], listed_in: str, next_step: str) -> None:
    for name, expected in hashes.items():
        got = sha256(folder / name) if (folder / name).is_file() else "no file"
        if got != expected:
            raise ModelError(
                f"{name} is not the file that {listed_in} speaks of",
                expected=f"sha256 {str(expected)[:12]}",
                got=got[:12],
                next_step=next_step,
            )


@contextlib.contextmanager
def saved_weights_in_place(model: PeftModel, folder: Path) -> Iterator[None]:
    """While open, the live model answers with the saved adapter's weights; what the file lacks is not a number.

    The base model is frozen, so nothing of it need be loaded again to see whether an adapter was saved whole.
    """
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    live = {name: value.detach().clone() for name, value in _state(get_peft_model_state_dict, model).items()}
    try:
        with torch.no_grad():
            set_peft_model_state_dict(model, {name: torch.full_like(value, math.nan) for name, value in live.items()})
            set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
        yield
    finally:
        set_peft_model_state_dict(model, live)


def _state(get: Any, model: PeftModel) -> dict[str, Any]:
    # 'auto' would ask the hub whether the embedding was resized; it never is here.
    return get(model, save_embedding_layers=False)
