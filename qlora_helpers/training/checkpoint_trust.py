"""Refuses a checkpoint that would run code or mislead Trainer, before Trainer reads it. Unpickles nothing.

A seal only says that a checkpoint is as it was written, and whoever changed it may have sealed it again.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.records import LARGEST_WHOLE

if TYPE_CHECKING:
    from transformers import TrainerState

# Trainer reads these where they lie beside the files that it writes here; none is written by a run of this package.
_FOREIGN = re.compile(r"(?!training_args\.bin$).*\.(bin|pkl|pickle|ckpt|distcp)|\.metadata|.*\.index\.json")


def refuse_code(checkpoint: Path) -> None:
    """Refuses pickles that hold anything but tensors and plain values, before Trainer reads them.

    Trainer reads them with `weights_only=True`, which would refuse them too, with another message. Nothing is unpickled here.

    Raises:
        RunError: a file would run code, or its form can't be checked; or the trainer's state is damaged.
    """
    import torch
    from transformers.trainer_pt_utils import safe_globals

    for path in sorted(checkpoint.iterdir()):
        if path.is_symlink() or not path.is_file() or _FOREIGN.fullmatch(path.name):
            raise RunError(
                f"{checkpoint.name}/{path.name[:100]} is not to be trusted",
                expected="files that this package writes into a checkpoint",
                got="a pickle that it never writes"
                if path.is_file() and not path.is_symlink()
                else "a folder or a link",
                next_step="Nothing was run. Delete this checkpoint if it is not yours.",
            )
    for path in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]):
        try:
            with safe_globals():
                unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception as error:  # an old kind of pickle, or any other bytes
            unsafe = [f"something unreadable ({type(error).__name__})"]
        if unsafe:
            raise RunError(
                f"{checkpoint.name}/{path.name} is not to be trusted: it asks for {', '.join(map(repr, unsafe[:3]))}",
                expected="tensors and plain values",
                next_step="Nothing was run. Delete this checkpoint if it is not yours.",
            )
    read_trainer_state(checkpoint)


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """Reads the trainer's state, of which Trainer itself checks no value.

    Raises:
        RunError: a value is not of its kind.
    """
    from transformers import TrainerState

    try:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        counts = (state.global_step, state.max_steps, state.num_train_epochs, state.num_input_tokens_seen)
        epoch, history = state.epoch, state.log_history
        if not all(type(count) is int and 0 <= count <= LARGEST_WHOLE for count in counts):
            raise ValueError("a count is not a number")
        if state.global_step != int(checkpoint.name.rsplit("-", 1)[1]):
            raise ValueError(f"it holds step {state.global_step}")
        if epoch is not None and not (type(epoch) in (int, float) and 0 <= epoch <= LARGEST_WHOLE):
            raise ValueError("the epoch is not a number")
        if not (isinstance(history, list) and all(isinstance(entry, dict) for entry in history)):
            raise ValueError("the log is not a list")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError and len(str(error)) < 60 else type(error).__name__
        raise RunError(
            f"{checkpoint.name}/trainer_state.json is damaged ({reason})",
            next_step="Delete this checkpoint.",
        ) from error
    return state
