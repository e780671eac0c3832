"""Trainer's checkpoints in a run folder: one counts once it is verified, and only then is an older one removed.

A checkpoint is written under `.unfinished/`, verified there and then renamed, so an interrupted save changes no other one.
A verified checkpoint holds `verified.json` with the size and SHA-256 of every file. Resuming takes the newest one that still
matches; a damaged one is skipped with a warning. `training_args.bin`, a pickle, is never read and therefore not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.base.folders import remove, rename
from qlora_helpers.base.units import gib
from qlora_helpers.runs.folder import FIXED, Run
from qlora_helpers.training.checkpoint_trust import read_trainer_state

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainerState

NEEDED = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
SEAL = "verified.json"
TRAINED_ON = "trained_on.json"
UNFINISHED = ".unfinished"
_REPLACED = ".replaced-"


class SpoiltWeights(RunError):
    """A checkpoint's weights are not finite."""


def step_of(checkpoint: Path) -> int:
    """Returns the optimizer step in a checkpoint folder's name."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def all_checkpoints(folder: Path) -> list[Path]:
    """Lists the checkpoint folders, verified or not, the oldest step first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def verify(checkpoint: Path) -> None:
    """Checks a freshly written checkpoint and seals it.

    Raises:
        RunError: a file is missing, unreadable or holds a value that is not finite.
    """
    # Two saves at one step (one requested, one at the end of an epoch) leave the first one's seal here.
    for name in ("training_args.bin", SEAL):
        (checkpoint / name).unlink(missing_ok=True)
    missing = [name for name in NEEDED if not (checkpoint / name).is_file()]
    if missing:
        raise RunError(f"{checkpoint.name} is incomplete: {', '.join(missing)} is missing")
    state = read_json(checkpoint / "trainer_state.json")
    if state.get("global_step") != step_of(checkpoint):
        raise RunError(f"{checkpoint.name} holds step {state.get('global_step')}")
    if not adapter_is_finite(checkpoint / "adapter_model.safetensors"):
        raise SpoiltWeights(
            f"{checkpoint.name} holds weights that are not finite", next_step="Lower train.learning_rate and resume."
        )
    files = {path.name: _fingerprint(path) for path in sorted(checkpoint.iterdir()) if path.is_file()}
    write_json(checkpoint / SEAL, {"files": files})


@contextlib.contextmanager
def clear_write_errors(checkpoint: Path) -> Iterator[None]:
    """Turns errors while writing a checkpoint (above all a full disk) into one clear error, and frees the space.

    Raises:
        RunError: with the system's reason.
    """
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError, RunError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        free = shutil.disk_usage(checkpoint.parent if checkpoint.parent.exists() else checkpoint.parent.parent).free
        discard(checkpoint.parent)
        reason = getattr(error, "strerror", None) or "its files were not written whole"
        raise RunError(
            f"{checkpoint.name} could not be written ({reason}; {gib(free):.1f} GiB were free)",
            next_step="Free some space and train again; the run goes on from its last good checkpoint.",
        ) from error


def put_in_place(written: Path) -> None:
    """Verifies a checkpoint under `.unfinished/` and moves it beside the others.

    Raises:
        RunError: see `verify`; nothing is moved.
    """
    try:
        _flush(written)
        verify(written)
    except RunError:
        discard(written.parent)
        raise
    folder = written.parent.parent
    place, old = folder / written.name, folder / f"{_REPLACED}{written.name}"
    discard(old)
    if place.exists():  # two saves at one step, or a damaged checkpoint is written again
        rename(place, old, root=folder.parent)
    rename(written, place, root=folder.parent)
    discard(old)
    remove(written.parent, root=folder.parent)


def discard(folder: Path) -> None:
    """Deletes a folder in a run's `checkpoints/` if it is there, as far as that is possible."""
    with contextlib.suppress(OSError):
        remove(folder, root=folder.parent.parent)


def _flush(folder: Path) -> None:
    """Waits until the disk has everything, so that a power cut never leaves a name with empty files."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_back(folder: Path) -> None:
    """Restores the name of an older checkpoint where a process was killed in the middle of `put_in_place`."""
    for old in folder.glob(f"{_REPLACED}checkpoint-*"):
        place = folder / old.name.removeprefix(_REPLACED)
        if place.exists():
            remove(old, root=folder.parent)
        else:
            rename(old, place, root=folder.parent)


def adapter_is_finite(path: Path) -> bool:
    """Whether every value of a safetensors file is a finite number."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return bool(names) and all(bool(torch.isfinite(file.get_tensor(name)).all()) for name in names)


def is_good(checkpoint: Path) -> bool:
    """Whether a checkpoint was sealed, has not changed since, and was not set aside."""
    try:
        seal = read_json(checkpoint / SEAL) if (checkpoint / SEAL).is_file() else {}
        files = seal["files"]
        return (
            "set_aside" not in seal
            and set(NEEDED) <= set(files)
            and all(_is_sealed(checkpoint, name, mark) for name, mark in files.items())
        )
    except (RunError, OSError, KeyError, TypeError, AttributeError, ValueError):  # whatever the file holds instead
        return False


def _is_sealed(checkpoint: Path, name: str, mark: list[int | str]) -> bool:
    """Whether a file of the checkpoint's own is as it was sealed; a device, a pipe or a file elsewhere is not opened."""
    path = checkpoint / name
    if Path(name).name != name or path.is_symlink() or not path.is_file() or path.stat().st_size != mark[0]:
        return False
    return _fingerprint(path) == mark


def newest_good(folder: Path) -> Path | None:
    """Returns the newest checkpoint that can be trusted, or None; warns of newer ones that are damaged."""
    _put_back(folder)
    for checkpoint in reversed(all_checkpoints(folder)):
        if is_good(checkpoint):
            return checkpoint
        if not why_set_aside(checkpoint):  # `checkpoint_choice.choice_in_words` says those
            warnings.warn(f"{checkpoint.name} is incomplete or damaged; resuming from an older one", stacklevel=2)
    return None


def last_good_step(folder: Path) -> int:
    """Returns the step of the newest checkpoint that can be trusted; 0 where there is none."""
    return max((step_of(path) for path in all_checkpoints(folder) if is_good(path)), default=0)


def why_set_aside(checkpoint: Path) -> str:
    """Returns why a checkpoint was set aside; empty where it was not (`checkpoint_choice`)."""
    try:
        return str(read_json(checkpoint / SEAL)["set_aside"])
    except (RunError, KeyError, TypeError):
        return ""


def trained_on(folder: Path) -> dict[str, Any] | None:
    """Returns what the newest checkpoint that records it was trained on: settings and marks that can't change any more."""
    for checkpoint in reversed(all_checkpoints(folder)):
        with contextlib.suppress(RunError):
            found = read_json(checkpoint / TRAINED_ON)
            if isinstance(found, dict):
                return found
    return None


def load_finished(model: PeftModel, checkpoint: Path) -> TrainerState:
    """Loads a checkpoint's adapter into a peft model and returns the state that Trainer had."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
    return read_trainer_state(checkpoint)


def rotate(folder: Path, keep: int, *, suspect_from: int | None = None) -> None:
    """Removes all but the newest `keep` good checkpoints, and leftovers older than the newest good one.

    Args:
        suspect_from: keeps the newest good checkpoint of an earlier step than this as well, which may still be needed.
    """
    good = [path for path in all_checkpoints(folder) if is_good(path)]
    if not good:
        return
    kept = set(good[-keep:])
    if suspect_from is not None:
        kept.update([path for path in good if step_of(path) < suspect_from][-1:])
    for path in all_checkpoints(folder):
        if path not in kept and step_of(path) < step_of(good[-1]):
            remove(path, root=folder.parent)


def _fingerprint(path: Path) -> list[int | str]:
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def has_trained(run: Run) -> bool:
    """Whether a run has a checkpoint or an adapter, so that its data can't change any more."""
    return bool(all_checkpoints(run.checkpoints_dir)) or (run.adapter_dir / "config.json").exists()


def refuse_other_than_trained_on(run: Run, marks: dict[str, str] | None = None) -> dict[str, Any]:
    """Refuses settings and marks other than those of the newest checkpoint, or of the adapter where there is none.

    Args:
        run: the run, trained or not.
        marks: digests of what settings only name: the data file's content, the vocabulary, the model's files; None where they
            are not known yet.

    Returns:
        What a session that begins now is trained on, for its checkpoints.

    Raises:
        RunError: something differs; the message says what.
    """
    settings = run.config().to_dict()
    now = {section: settings[section] for section in FIXED} | {"marks": marks or {}}
    before = trained_on(run.checkpoints_dir)
    if before is None and (run.adapter_dir / "config.json").exists():
        before = read_json(run.adapter_dir / "config.json")
    if isinstance(before, dict):
        run.refuse_differences(before, now)
    return now
