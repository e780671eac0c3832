"""Decides which GPU each part of a model is loaded onto.

accelerate's `device_map="auto"` distributes a model by its weights, but training also holds activations. The plan counts both and
says how many decoder layers each GPU gets; this module turns these numbers into a map that `from_pretrained` takes. Knows nothing
of memory needs or runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qlora_helpers.base.config import ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.units import BYTES_IN_GIB, gib
from qlora_helpers.model.blueprint import meta_model
from qlora_helpers.model.nf4 import quantization_settings

SAME_FREE = 1.05  # ratio of most to least free memory of the cards up to which the plan treats them as equal

Spread = Callable[[int], tuple[int, ...] | None]
"""Number of GPUs -> decoder layers of each GPU, or None to leave it to accelerate."""


def layer_map(config: Any, counts: Sequence[int]) -> dict[str, int] | None:
    """Returns a device map that gives each GPU a number of decoder layers, in their order.

    Modules before the layers (the embedding) go to the first GPU, modules after them (the last norm, the output layer) to the
    last. An output layer that shares the embedding's weights stays with it, and modules without weights go to the first GPU.

    Args:
        config: the model's transformers configuration.
        counts: decoder layers of each GPU; 0 is allowed.

    Returns:
        GPU numbers by module name, or None where the model has another number of layers.
    """
    from qlora_helpers.model.wiring import decoder_layers

    model = meta_model(config)
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
    """Places a module's children, and returns whether decoder layers are among them.

    Args:
        module: whose children are placed.
        path: the module's name with a dot at the end, or empty.
        gpu_of: GPU of each decoder layer, by `id`.
        ends: GPUs for modules before and after the decoder layers.
        found: receives the GPU of each module by its name.
    """
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


def on_a_gpu(config: ModelConfig) -> bool:
    """Whether a model is loaded onto GPUs: this machine has some, and nothing else was asked for."""
    import torch

    return config.device_map == "auto" and torch.cuda.is_available()


def device_map_argument(shape: Any, config: ModelConfig, spread: Spread, *, one_gpu: bool = False) -> Any:
    """Returns the `device_map` for `from_pretrained`.

    A single process spreads the model over all GPUs; under torchrun each process has the whole model on its own GPU. The plan
    assumes equal and empty cards, so accelerate decides where the cards differ, where one is in use, or where a limit on the
    weights is set.

    Args:
        shape: the model's transformers configuration.
        config: placement and limits.
        spread: how many decoder layers each GPU gets.
        one_gpu: whether to take the first GPU alone.
    """
    import torch

    if not on_a_gpu(config):
        return {"": "cpu"}
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None:
        return {"": int(rank)}
    if one_gpu:
        return {"": 0}
    free = [torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())]
    if len(free) < 2 or max(free) > SAME_FREE * min(free) or config.max_memory_per_gpu_gib is not None:
        return "auto"
    counts = spread(len(free))
    return (counts and layer_map(shape, counts)) or "auto"


def memory_limits(config: ModelConfig) -> dict[int, int] | None:
    """Returns the limit on weights in bytes for each GPU, or None where no limit is set."""
    import torch

    if config.max_memory_per_gpu_gib is None:
        return None
    limit = int(config.max_memory_per_gpu_gib * BYTES_IN_GIB)
    return dict.fromkeys(range(torch.cuda.device_count()), limit)


def placement(shape: dict[str, Any], *, gpus: int, limit_gib: float) -> dict[str, float]:
    """Computes where `device_map="auto"` would put a model's weights, on the meta device: it needs no GPU and no weights.

    Args:
        shape: the model's `config.json`.
        gpus: how many GPUs.
        limit_gib: memory allowed on each, GiB; transformers keeps 10 % of it free.

    Returns:
        GiB of weights by GPU.

    Raises:
        ModelError: the weights don't fit.
    """
    import torch
    from transformers import AutoConfig
    from transformers.integrations.accelerate import _get_device_map, compute_module_sizes

    from qlora_helpers.model.quantizer import Nf4Quantizer

    quantizer = Nf4Quantizer(quantization_settings(ModelConfig(), torch.bfloat16), pre_quantized=False)
    model = meta_model(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    quantizer.preprocess_model(model=model, device_map=None)
    limits = {index: int(limit_gib * BYTES_IN_GIB) for index in range(gpus)} | {"cpu": 0}
    try:
        with _without_device_warnings():
            devices = _get_device_map(model, "auto", limits, quantizer)
    except ValueError as error:
        raise ModelError(
            f"the weights don't fit on {gpus} GPU{'s' * (gpus != 1)} of {limit_gib:g} GiB",
            next_step="Use more or larger GPUs, or a smaller model.",
        ) from error
    sizes, _ = compute_module_sizes(model, quantizer)
    found: dict[str, float] = {}
    for module, device in devices.items():
        key = f"cuda:{device}" if isinstance(device, int) else str(device)
        found[key] = found.get(key, 0.0) + gib(sizes[module])
    return found


@contextlib.contextmanager
def _without_device_warnings() -> Iterator[None]:
    """Silences accelerate's warning that this machine lacks the GPUs, which is why the placement is computed."""
    logger = logging.getLogger("accelerate.utils.modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
