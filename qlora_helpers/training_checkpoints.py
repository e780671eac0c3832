"""Trainer's checkpoints in a run folder: one counts once it is verified, and only then is an older one removed.

A verified checkpoint holds `verified.json` with the size and SHA-256 of every file. Resuming takes the newest that still matches;
a damaged one is passed over with a warning. `training_args.bin`, a pickle, is never read and therefore not kept.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers.errors import RunError
from qlora_helpers.run import read_json, write_json

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainerState

NEEDED = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
SEAL = "verified.json"


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint folder's name."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def all_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest step first; verified or not."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def verify(checkpoint: Path) -> None:
    """Looks at a freshly written checkpoint and seals it.

    Raises:
        RunError: a file is missing, unreadable or holds a value that is not finite.
    """
    # Two saves at one step (asked for, and at the end of an epoch) leave the first one's seal here.
    for name in ("training_args.bin", SEAL):
        (checkpoint / name).unlink(missing_ok=True)
    missing = [name for name in NEEDED if not (checkpoint / name).is_file()]
    if missing:
        raise RunError(f"{checkpoint.name} is incomplete: {', '.join(missing)} is missing")
    state = read_json(checkpoint / "trainer_state.json")
    if state.get("global_step") != step_of(checkpoint):
        raise RunError(f"{checkpoint.name} holds step {state.get('global_step')}")
    if not adapter_is_finite(checkpoint / "adapter_model.safetensors"):
        raise RunError(
            f"{checkpoint.name} holds weights that are not finite", next_step="Lower train.learning_rate and resume."
        )
    files = {path.name: _fingerprint(path) for path in sorted(checkpoint.iterdir()) if path.is_file()}
    write_json(checkpoint / SEAL, {"files": files})


def adapter_is_finite(path: Path) -> bool:
    """Whether every value of a safetensors file is a finite number."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return bool(names) and all(bool(torch.isfinite(file.get_tensor(name)).all()) for name in names)


def is_good(checkpoint: Path) -> bool:
    """Whether a checkpoint was sealed and is still as it was then."""
    try:
        files = read_json(checkpoint / SEAL)["files"]
        return bool(files) and all(_fingerprint(checkpoint / name) == mark for name, mark in files.items())
    except (RunError, OSError, KeyError, TypeError):
        return False


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint that can be trusted, or None; warns of newer ones that can't."""
    for checkpoint in reversed(all_checkpoints(folder)):
        if is_good(checkpoint):
            return checkpoint
        warnings.warn(f"{checkpoint.name} is incomplete or damaged; going on from an older one", stacklevel=2)
    return None


def load_finished(model: PeftModel, checkpoint: Path) -> TrainerState:
    """Puts a checkpoint's adapter into a peft model, and returns the state that Trainer had then."""
    from peft import load_peft_weights, set_peft_model_state_dict
    from transformers import TrainerState

    set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device="cpu"))
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def rotate(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` good checkpoints, and leftovers older than the newest good one."""
    good = [path for path in all_checkpoints(folder) if is_good(path)]
    if not good:
        return
    kept = set(good[-keep:])
    for path in all_checkpoints(folder):
        if path not in kept and step_of(path) < step_of(good[-1]):
            shutil.rmtree(path)


def _fingerprint(path: Path) -> list[int | str]:
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
