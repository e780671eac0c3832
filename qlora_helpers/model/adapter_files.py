"""Reads an adapter's files as a stranger's: known settings with checked values, names taken literally, no pickled weights.

peft takes many texts of `adapter_config.json` as regular expressions and one as a module to import, allocates what the file
asks for, and falls back to a pickle where the safetensors are missing. So a folder is checked here before peft sees it. Imports
no peft and no torch, and knows nothing of models.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.stored_tensors import tensors_in

ADAPTER_SETTINGS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST_BYTES = 16 * 1024**2  # a list with the name of every layer of a large model takes less
MOST_RANK = 65536
INITIAL_WEIGHTS = ("gaussian", "orthogonal", "olora", "eva", "pissa")
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
_AGAIN = "Train the run again, or get the adapter from where it was published."


def check_adapter(folder: Path) -> None:
    """Checks the files of an adapter that is about to be loaded.

    Raises:
        ModelError: the weights are not a plain safetensors file, or the settings are not those of a LoRA adapter, or ask for
            more than the weights hold.
    """
    settings = read_adapter_settings(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = sorted(path.name for path in folder.glob("adapter_model*.bin"))
        raise ModelError(
            f"{folder.name}/ has no {ADAPTER_WEIGHTS}",
            got=pickled[0] if pickled else "",
            next_step="Pickled weights can run code when loaded and are refused: convert them to safetensors first."
            if pickled
            else _AGAIN,
        )
    try:
        tensors = tensors_in([folder / ADAPTER_WEIGHTS])
    except ModelError as error:  # its own advice is for a model's files
        raise ModelError(error.problem, next_step=_AGAIN) from error
    stored = max(
        (tensor.rows for name, tensor in tensors.items() if re.search(r"lora_(embedding_)?A", name)), default=0
    )
    asked = max([settings["r"], *(settings.get("rank_pattern") or {}).values()])
    if asked > stored:
        raise ModelError(
            f"{ADAPTER_SETTINGS} asks for a rank that {ADAPTER_WEIGHTS} does not hold",
            expected=f"at most {stored}",
            got=str(asked),
            next_step=_AGAIN,
        )


def read_adapter_settings(folder: Path) -> dict[str, Any]:
    """Reads an adapter's `adapter_config.json`.

    Returns:
        Its values, all of them checked; `r` and `lora_alpha` are there.

    Raises:
        ModelError: it is missing or damaged, it is not the settings of a LoRA adapter, or a value is not one that is known.
    """
    path = folder / ADAPTER_SETTINGS
    if not path.is_file():
        raise ModelError(f"{folder.name}/ has no {ADAPTER_SETTINGS}", next_step=_AGAIN)
    try:
        with open(path, "rb") as file:
            settings = json.loads(file.read(MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{ADAPTER_SETTINGS} is damaged ({error})", next_step=_AGAIN) from error
    if not isinstance(settings, dict):
        raise ModelError(
            f"{ADAPTER_SETTINGS} is damaged", expected="an object", got=type(settings).__name__, next_step=_AGAIN
        )
    _need(settings)
    return settings


def _need(settings: dict[str, Any]) -> None:
    for key in ("peft_type", "r", "lora_alpha"):
        settings.setdefault(key, None)
    wrong = [key for key, value in settings.items() if not _KNOWN.get(key, _is_empty)(value)]
    if wrong:
        shown = ", ".join(f"{key[:60]}={repr(settings.get(key))[:60]}" for key in wrong[:3])
        raise ModelError(
            f"{ADAPTER_SETTINGS} has settings that are not taken from a file",
            expected="those of a LoRA adapter for text, with the names of layers written out and no regular expressions",
            got=shown,
            next_step=_AGAIN,
        )


# One test for each setting; a setting without one may be there if it is empty


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value == {} or value == []


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _one_of(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: any(value is one or (isinstance(one, str) and value == one) for one in allowed)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1e6 and math.isfinite(value)


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1000 and _NAME.fullmatch(value) is not None


def _names(value: Any) -> bool:
    return value is None or isinstance(value, list) and all(map(_is_name, value))


def _by_name(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        value is None
        or isinstance(value, dict)
        and all(_is_name(name) and is_right(each) for name, each in value.items())
    )


def _indices(value: Any) -> bool:
    return value is None or isinstance(value, list) and all(map(_is_index, value))


_KNOWN: dict[str, Callable[[Any], bool]] = {
    "peft_type": _one_of("LORA"),
    "task_type": _one_of("CAUSAL_LM", None),
    "r": _is_rank,
    "lora_alpha": _is_number,
    "lora_dropout": lambda value: _is_number(value) and value < 1,
    "bias": _one_of("none", "all", "lora_only"),
    "target_modules": _names,
    "exclude_modules": _names,
    "modules_to_save": _names,
    "target_parameters": _names,
    "layers_pattern": lambda value: _is_name(value) or _names(value),
    "layers_to_transform": lambda value: _is_index(value) or _indices(value),
    "rank_pattern": _by_name(_is_rank),
    "alpha_pattern": _by_name(_is_number),
    "trainable_token_indices": lambda value: _indices(value) or _by_name(_indices)(value),
    "init_lora_weights": _one_of(True, False, *INITIAL_WEIGHTS),
    **dict.fromkeys(
        ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "inference_mode", "ensure_weight_tying"), _is_bool
    ),
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version"), _is_text),
    "auto_mapping": lambda value: True,  # only peft's AutoPeftModel reads it, which is not used here
    "megatron_core": _is_text,  # a module that peft would import if `megatron_config` were not empty
    "qalora_group_size": lambda value: True,  # counts only with `use_qalora`, which has to be off
}
