"""Examines a saved adapter beside the model that it was saved from, and writes its certificate.

Knows nothing of runs, data or how a model is asked: the answers given with the file's weights are handed in.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.export.certificate import FILE, SETTINGS, TRAIN_AGAIN, WEIGHTS, Certificate, sha256
from qlora_helpers.training.processes import from_first

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

BOOKKEEPING = {  # settings of an adapter that change nothing in its answers
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "lora_dropout",
}


def expected_tensors(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the tensors that the model's adapter is saved as."""
    return {name: tuple(value.shape) for name, value in _adapter_tensors(model).items()}


def expected_settings(model: PeftModel) -> dict[str, Any]:
    """Returns the settings of the model's adapter in the form that JSON holds."""
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
    """Examines a saved adapter and writes its certificate into its folder, whether it passed or not.

    Args:
        folder: the adapter's folder.
        expected: names and shapes of its tensors (`expected_tensors`).
        settings: the settings of the live model's adapter (`expected_settings`).
        asked: `prompts`, `largest_difference` and `same_answers` of the file's weights against the live ones.
        base: `name`, `revision` and `sha256` of the base model.
        data_fingerprint: identifies the prepared data.
        versions: of the packages.

    Raises:
        ModelError: the folder has no readable adapter.
    """
    from safetensors import SafetensorError

    try:
        shapes, unmoved, not_finite = _examine_weights(folder / WEIGHTS)
        settings_changed = _changed_settings(settings, read_json(folder / SETTINGS))
    except (SafetensorError, OSError, UserError) as error:
        raise ModelError(f"{folder.name}/ has no readable adapter ({error})", next_step=TRAIN_AGAIN) from error
    difference = asked["largest_difference"]
    found = Certificate(
        weights_sha256=sha256(folder / WEIGHTS),
        settings_sha256=sha256(folder / SETTINGS),
        tensors=len(shapes),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        missing=tuple(sorted(name for name, shape in expected.items() if shapes.get(name) != shape)),
        unexpected=tuple(sorted(set(shapes) - set(expected))),
        unmoved=unmoved,
        not_finite=not_finite,
        settings_changed=settings_changed,
        prompts=asked["prompts"],
        largest_difference=difference if difference is not None and math.isfinite(difference) else None,
        same_answers=asked["same_answers"],
        base_model=base["name"],
        base_revision=base["revision"],
        base_sha256=base["sha256"],
        data_fingerprint=data_fingerprint,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions,
    )
    write_json(folder / FILE, asdict(found) | {"passed": found.passed, "problems": list(found.problems)})
    return found


def _examine_weights(path: Path) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...], tuple[str, ...]]:
    """Returns the shapes of a file's tensors by name, the B matrices that are all zero, and the tensors that are not finite."""
    import torch
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    unmoved, not_finite = [], []
    with safe_open(path, framework="pt") as weights:
        for name in list(weights.keys()):
            value = weights.get_tensor(name)
            shapes[name] = tuple(value.shape)
            if not torch.isfinite(value).all():
                not_finite.append(name)
            if "lora_B" in name and not value.any():
                unmoved.append(name)
    return shapes, tuple(unmoved), tuple(not_finite)


def _changed_settings(live: Mapping[str, Any], saved: Any) -> tuple[str, ...]:
    """Returns the settings that decide what an adapter computes and that differ; lists of names may be in any order."""
    if not isinstance(saved, dict):
        raise ModelError(f"{SETTINGS} has no settings", expected="an object", got=type(saved).__name__)
    names = sorted((set(live) | set(saved)) - BOOKKEEPING)
    both = [(name, _as_text(live, name), _as_text(saved, name)) for name in names]
    return tuple(f"{name}: {before} -> {after}" for name, before, after in both if before != after)


def _as_text(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "missing"
    value = settings[name]
    is_names = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return json.dumps(sorted(value) if is_names else value)


@contextlib.contextmanager
def saved_weights_in_place(model: PeftModel, folder: Path) -> Iterator[None]:
    """While open, the live model answers with the saved adapter's weights; tensors that the file lacks are NaN.

    The base model is frozen, so it need not be loaded again to find out whether an adapter was saved completely.
    """
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from qlora_helpers.model.sharding import is_sharded

    # Where layers are shared out, all processes ask together, and what the first one reads is what all get.
    saved = from_first(lambda: load_file(folder / WEIGHTS)) if is_sharded(model) else load_file(folder / WEIGHTS)
    live = {name: value.detach().clone() for name, value in _adapter_tensors(model).items()}
    try:
        with torch.no_grad():
            set_peft_model_state_dict(model, {name: torch.full_like(value, math.nan) for name, value in live.items()})
            set_peft_model_state_dict(model, saved)
        yield
    finally:
        set_peft_model_state_dict(model, live)


def _adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    # 'auto' would ask the hub whether the embedding was resized; it never is here.
    return get_peft_model_state_dict(model, save_embedding_layers=False)
