"""Holds a model's configuration against the tensors that its files have, before anything is built or memory is taken.

A configuration is a few numbers that anybody can write, and each of them is a loop or an allocation. Its tensors are there or not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.stored_tensors import FLOATS, StoredTensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PACKED = {"I32": 16, "U8": 4, "I8": 4}  # weights that a value of a quantised checkpoint may hold: down to 2 bits each
MOST_LOOPS = 64  # times that a model may go through a stack of layers
SPARE_WEIGHTS, SPARE_BUFFER_BYTES = 1_000_000, 512 * 1024**2
_OTHER_FILES = "Get its files again: they are incomplete, or belong to another model than its config.json describes."


def need_layers(config: PretrainedConfig, tensors: Mapping[str, StoredTensor], name: str) -> None:
    """Compares the number of decoder layers with the highest number in the names of tensors, before a loop runs over them.

    A model that goes through its layers several times (`hrm_text`) names two numbers: of layers, and of passes through them.
    """
    numbers = [int(found[1]) for found in (re.search(r"\.(\d{1,6})\.", f".{each}") for each in tensors) if found]
    layers = getattr(config, "num_hidden_layers", None)
    if not (numbers and isinstance(layers, int)):
        return
    held = max(numbers) + 1
    is_loop = layers <= MOST_LOOPS * held and any(
        "layers" in key and value == held and not isinstance(value, bool) for key, value in vars(config).items()
    )
    if layers > held and not is_loop:
        raise ModelError(
            f"{name} lacks some of its weights: its files hold {held} layers, its config.json names {layers}",
            next_step=_OTHER_FILES,
        )


def need_weights(config: PretrainedConfig, tensors: Mapping[str, StoredTensor], name: str) -> None:
    """Builds the model on the meta device, where weights have shapes and take no memory, and compares it with the files."""
    import torch

    from qlora_helpers.model.blueprint import model_class

    with torch.device("meta"):
        model = model_class(config).from_config(config)
    held = sum(tensor.values * PACKED.get(tensor.dtype, 1) for tensor in tensors.values())
    for key, weight in model.named_parameters():
        stored = tensors.get(key)
        if stored is not None and stored.dtype in FLOATS and stored.shape != tuple(weight.shape):
            raise ModelError(
                f"{name} could not be loaded: its weights have other sizes than its config.json says, {key} first",
                expected=str(tuple(weight.shape)),
                got=str(stored.shape),
                next_step=_OTHER_FILES,
            )
    asked = sum(weight.numel() for weight in model.parameters())
    if asked > 2 * held + SPARE_WEIGHTS:  # a tied output head is stored once
        raise ModelError(
            f"the config.json of {name} asks for more than its files hold",
            expected=f"at most {held:,} weights",
            got=f"{asked:,}",
            next_step=_OTHER_FILES,
        )
    tables = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if tables > 2 * held + SPARE_BUFFER_BYTES:
        raise ModelError(
            f"the config.json of {name} asks for tables that are larger than the model, for positions or masks",
            got=f"{tables / 1024**3:.1f} GiB",
            next_step=_OTHER_FILES,
        )
