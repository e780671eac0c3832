"""Which GPU each part of a model is loaded onto, where the decoder layers are shared out by number.

accelerate's `device_map="auto"` shares a model out by its weights; training also holds activations, which no weight tells of. The
plan counts both, and here its numbers become a map that `from_pretrained` takes. Knows nothing of memory or runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_helpers.nf4 import falcon_linears_as_plain


def layer_map(config: Any, counts: Sequence[int]) -> dict[str, int] | None:
    """A device map that gives each GPU so many decoder layers, in their order.

    What stands before the layers (the embedding) goes to the first GPU, what stands after them (the last norm, the output layer) to
    the last. An output layer that shares the embedding's weights stays with it, and what has no weights stands with the first.

    Args:
        config: the model's transformers configuration.
        counts: decoder layers of each GPU; an empty one may be 0.

    Returns:
        GPU numbers by module name, or None where the model has another number of layers.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from qlora_helpers.fast_step.layers import decoder_layers

    with falcon_linears_as_plain(), init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    layers = decoder_layers(model)
    if len(layers) != sum(counts):
        return None
    holders = [gpu for gpu, count in enumerate(counts) for _ in range(count)]
    gpu_of = {id(layer): gpu for layer, gpu in zip(layers, holders, strict=True)}
    if config.get_text_config().tie_word_embeddings:
        gpu_of[id(model.get_output_embeddings())] = 0
    found: dict[str, int] = {}
    _place(model, "", gpu_of, (0, len(counts) - 1), found)
    return found


def _place(module: Any, path: str, gpu_of: dict[int, int], ends: tuple[int, int], found: dict[str, int]) -> bool:
    """Places a module's children; whether the layers are among them. `ends`: GPUs of what stands before and after the layers."""
    reached = False
    for name, child in module.named_children():
        place = f"{path}{name}"
        if id(child) in gpu_of:
            found[place] = gpu_of[id(child)]
            reached = True
        elif any(id(inner) in gpu_of for inner in child.modules()):
            reached = _place(child, f"{place}.", gpu_of, ends, found) or reached
        else:
            weightless = next(child.parameters(), None) is None
            found[place] = ends[1] if reached and not weightless else ends[0]
    return reached
