"""Makes a training step run out of memory at a chosen place, on a GPU or a CPU: by asking the allocator for far too much."""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
from collections.abc import Iterator
from typing import Any

PLACES = {
    "forward": "forward of layer 2 of ",
    "loss": "loss",
    "backward": "backward",
    "optimizer": "optimizer",
    "evaluation": "evaluation, forward of layer 2 of ",
}
"""Each place with the beginning of the words that must name it."""


class Exhausted:
    """Counts how often the place was passed, and allocates too much when it was passed `after` times."""

    def __init__(self, device: Any, after: int) -> None:
        self.device, self.left, self.held = device, after, []

    def __call__(self, *args: Any) -> None:
        import torch

        self.left -= 1
        if self.left < 0:
            large = torch.ones(1000, 1000, device=self.device)  # what a frame of the failed step holds
            self.held.append(_weakly(large))
            torch.empty(1 << 50, dtype=torch.uint8, device=self.device)

    @property
    def freed(self) -> bool:
        """Whether what the failing frame held is gone."""
        return bool(self.held) and all(each() is None for each in self.held)


def _weakly(tensor: Any) -> Any:
    import weakref

    return weakref.ref(tensor)


def _called_from(function: str) -> bool:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None


@contextlib.contextmanager
def exhausted_at(place: str, model: Any, *, after: int = 0) -> Iterator[Exhausted]:
    """While open, a training step of this model runs out of memory at a place of `PLACES`, once it was passed `after` times."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from qlora_helpers.model.wiring import decoder_layers
    from qlora_helpers.training.fast_step import loss as token_loss

    inner = model.get_base_model()
    exhaust = Exhausted(inner.get_input_embeddings().weight.device, after)
    layer, right = decoder_layers(inner)[1], token_loss.token_losses
    hooks = []

    def in_training(module: Any, inputs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            exhaust()

    def in_evaluation(module: Any, inputs: Any) -> None:
        if not module.training and _called_from("evaluation_loop"):  # the checks before training evaluate too
            exhaust()

    def in_backward(module: Any, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if module.training and first.requires_grad:
            first.register_hook(exhaust)

    def in_loss(*args: Any, **more: Any) -> Any:
        if model.training:
            exhaust()
        return right(*args, **more)

    try:
        if place == "forward":
            hooks.append(layer.register_forward_pre_hook(in_training))
        elif place == "evaluation":
            hooks.append(layer.register_forward_pre_hook(in_evaluation))
        elif place == "backward":
            hooks.append(layer.register_forward_hook(in_backward))
        elif place == "optimizer":
            hooks.append(register_optimizer_step_pre_hook(exhaust))
        else:
            token_loss.token_losses = in_loss
        yield exhaust
    finally:
        token_loss.token_losses = right
        for hook in hooks:
            hook.remove()


def held_bytes() -> int:
    """Bytes of all tensors that are alive: the allocator's own count on a GPU, else every storage that Python can reach."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    sizes = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is deprecated and looks at itself when it is asked for its type
        for each in gc.get_objects():
            with contextlib.suppress(Exception):
                if isinstance(each, torch.Tensor):
                    storage = each.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
