"""Loads a saved adapter onto a base model, and refuses one that does not belong to it.

Knows of the adapter's folder only; `lora` adds new adapters, `adapter_files` checks the files themselves.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.adapter_files import check_adapter, read_adapter_settings
from qlora_helpers.model.lora import remove_adapters, without_deprecation_noise

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def load_adapter(
    model: torch.nn.Module | PeftModel, folder: str | os.PathLike[str], *, name: str = "default"
) -> PeftModel:
    """Adds a saved adapter to a freshly loaded base model, or one more to a model that has adapters of other names.

    Args:
        model: the base model; or what this function returned, which then stays as it was but for the adapter that it gets:
            `model.set_adapter(name)` chooses the one that answers.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        name: peft's name for it.

    Raises:
        ModelError: the files are damaged, or belong to an adapter for another model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    from qlora_helpers.model.expert_adapters import open_all, stacks_adapted
    from qlora_helpers.model.peft_names import take_names_literally

    has_adapters = isinstance(model, PeftModel)
    base = model.get_base_model() if has_adapters else model
    take_names_literally(base)
    try:
        check_adapter(Path(folder))
        open_all(base, _stacks_in(Path(folder), base))
        with without_deprecation_noise(), stacks_adapted(base):
            if has_adapters:
                model.load_adapter(str(folder), name, is_trainable=False)
                loaded = model
            else:
                loaded = PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=False)
    except ModelError as error:
        raise ModelError(
            f"the saved adapter could not be loaded ({error.problem})",
            expected=error.expected,
            got=error.got,
            next_step=error.next_step,
        ) from error
    except (SafetensorError, ValueError, TypeError, RuntimeError, OSError) as error:
        if has_adapters and name in model.peft_config:
            model.delete_adapter(name)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the saved adapter could not be loaded ({reason})",
            next_step="Train the run again: it takes its newest good checkpoint and saves the adapter once more.",
        ) from error
    _refuse_other_tensors(loaded, Path(folder), name)
    return loaded


def _stacks_in(folder: Path, base: torch.nn.Module) -> tuple[str, ...]:
    """Returns the paths of the stacks of experts that an adapter's settings name."""
    from qlora_helpers.model import targets
    from qlora_helpers.model.shapes.expert_targets import ends

    names = read_adapter_settings(folder).get("target_parameters") or ()
    return tuple(path for path in targets.stacks(base) if any(ends(path, name) for name in names))


def _refuse_other_tensors(model: PeftModel, folder: Path, name: str) -> None:
    """Refuses an adapter of which the model lacks tensors, or which lacks some of the model's; peft only warns of it."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    expected = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        held = set(file.keys())
    for names, what in ((expected - held, "lacks {} of"), (held - expected, "has {} beyond those of")):
        if names:
            if len(model.peft_config) > 1:
                model.delete_adapter(name)
            else:
                remove_adapters(model)
            raise ModelError(
                f"the saved adapter {what.format(f'{len(names)} tensor' + 's' * (len(names) > 1))} the model, {min(names)} first",
                next_step="Load the model that it was trained on, or train the run again.",
            )
