"""Several runs' adapters on one base model: loads them by name, switches between them, and tells them and their bases apart.

An adapter is known by what it holds, never by its run's name alone: a run that was trained again is another adapter, and an adapter
for another base model is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.base.records import read_object
from qlora_helpers.model.adapter_files import ADAPTER_WEIGHTS, check_adapter, read_adapter_settings
from qlora_helpers.model.checkpoints import Checkpoint, base_fingerprint, find_checkpoint
from qlora_helpers.runs.folder import Run

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

CERTIFICATE = "certificate.json"
SCALES = ("r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
"""Settings of an adapter that change its answers beside its tensors."""
TRAINED_BY = "Notebook 04_train (or `python -m qlora_helpers train`)"


def saved_mark(folder: Path) -> str:
    """Returns a digest of a saved adapter: its tensors' names and values, and its scales.

    Raises:
        ModelError: the files are damaged, or not those of a LoRA adapter.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_adapter(folder)
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{folder.name}/{ADAPTER_WEIGHTS} can't be read ({error})", next_step="Train the run again."
        ) from error
    return _mark(tensors, read_adapter_settings(folder))


def live_mark(model: PeftModel) -> str:
    """Returns the digest of the active adapter of a model in memory: that of the file that it would be saved as."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False, adapter_name=_active(model))
    return _mark(tensors, model.active_peft_config.to_dict())


def _mark(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([settings.get(key) or 0 for key in SCALES], sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().float().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def adapter_name(run: Run) -> str:
    """Returns the name under which a run's saved adapter lies in a model: made from what it holds, so that none is stale."""
    return f"saved_{saved_mark(run.adapter_dir)[:16]}"


def add_saved_adapter(model: PeftModel, run: Run) -> str:
    """Loads another run's saved adapter beside those that the model has, which stay as they are; the active one stays active.

    Args:
        model: the base model with an adapter; `refuse_other_base` has compared the bases.
        run: the other run.

    Returns:
        The adapter's name in the model, made from what it holds: the same adapter is loaded once.

    Raises:
        RunError: the run has no adapter yet.
        ModelError: its files are damaged, or don't fit the model.
    """
    from safetensors import SafetensorError

    run.need(run.adapter_dir / ADAPTER_WEIGHTS, TRAINED_BY)
    name = adapter_name(run)
    if name in model.peft_config:
        return name
    try:
        with _trainable_as_before(model):
            model.load_adapter(str(run.adapter_dir), adapter_name=name, is_trainable=False)
            _refuse_other_tensors(model, name, run)
    except (ModelError, SafetensorError, ValueError, TypeError, RuntimeError, OSError, KeyError) as error:
        if name in model.peft_config:
            model.delete_adapter(name)
        if isinstance(error, ModelError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the adapter of {run.name!r} does not fit this model ({reason})",
            next_step="Compare runs that were trained on one base model.",
        ) from error
    return name


def _refuse_other_tensors(model: PeftModel, name: str, run: Run) -> None:
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    expected = get_peft_model_state_dict(model, save_embedding_layers=False, adapter_name=name)
    with safe_open(run.adapter_dir / ADAPTER_WEIGHTS, framework="pt") as file:
        odd = sorted(set(expected) ^ set(file.keys()))
    if odd:
        raise ModelError(
            f"the adapter of {run.name!r} does not fit this model: {len(odd)} tensors are in one and not in the other, "
            f"{odd[0]} first",
            next_step="Compare runs that were trained on one base model.",
        )


def _active(model: PeftModel) -> str:
    return model.active_adapters[0]


@contextlib.contextmanager
def _trainable_as_before(model: torch.nn.Module) -> Iterator[None]:
    """Gives each parameter back its `requires_grad`, which peft sets when adapters are loaded or switched."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before.get(name, False))


@contextlib.contextmanager
def answering_as(model: PeftModel, adapter: str | None) -> Iterator[None]:
    """While open, the model answers with one of its adapters, or as the base model; then it is as it was.

    Args:
        model: the base model with adapters.
        adapter: its name in the model; None for none.
    """
    if adapter is None:
        with model.disable_adapter():
            yield
        return
    before = _active(model)
    if adapter == before:
        yield
        return
    with _trainable_as_before(model):
        model.set_adapter(adapter, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter(before, inference_mode=True)


def refuse_other_base(run: Run, other: Run, checkpoint: Checkpoint | None = None) -> None:
    """Refuses a run that was trained on another base model than this one, or on the same one held otherwise in memory.

    What counts is the fingerprint that each adapter's certificate has of its base model, or the files themselves where there is no
    certificate; a name proves nothing.

    Args:
        run: the run whose base model answers.
        other: the run whose adapter is to be put beside.
        checkpoint: the base model in memory; None takes what `run` was trained on.

    Raises:
        RunError: the other run has no adapter yet.
        ModelError: the bases differ.
    """
    other.need(other.adapter_dir / ADAPTER_WEIGHTS, TRAINED_BY)
    storage, its = run.config().model.quantization, other.config().model.quantization
    there = checkpoint is not None and (checkpoint.shape is not None or base_fingerprint(checkpoint.folder) is not None)
    ours = _fingerprint(checkpoint) if checkpoint is not None and there else trained_base(run)
    theirs = trained_base(other)
    if ours == theirs and storage == its:
        return
    what = "another base model" if ours != theirs else "its base model in another form"
    raise ModelError(
        f"{other.name!r} can't be compared with {run.name!r} on one model: it was trained on {what}",
        expected=f"{run.config().model.name} in {storage}, fingerprint {ours[:12]}",
        got=f"{other.config().model.name} in {its}, fingerprint {theirs[:12]}",
        next_step="Choose runs of one base model, or evaluate each by itself.",
    )


def trained_base(run: Run) -> str:
    """Returns the fingerprint of the base model that a run's adapter was trained on: by its certificate, else by the files."""
    with contextlib.suppress(UserError):
        found = read_object(run.adapter_dir / CERTIFICATE).get("base_sha256")
        if isinstance(found, str) and found:
            return found
    return _fingerprint(find_checkpoint(run.config().model, say=lambda text: None))


def _fingerprint(checkpoint: Checkpoint) -> str:
    """The fingerprint of a model's weights; of random weights that were never written, a digest of what they are made from."""
    shape = json.dumps(checkpoint.shape, sort_keys=True, default=str)
    return base_fingerprint(checkpoint.folder) or hashlib.sha256(shape.encode()).hexdigest()


def base_mark(run: Run, checkpoint: Checkpoint) -> str:
    """Returns a digest of a base model and of how a run holds it: quantisation, compute type and attention."""
    settings = run.config().to_dict()["model"]
    kept = {key: settings[key] for key in ("quantization", "double_quantization", "compute_dtype", "attention")}
    return hashlib.sha256(json.dumps([checkpoint.marks, kept], sort_keys=True).encode()).hexdigest()
