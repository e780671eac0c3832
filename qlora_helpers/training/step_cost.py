"""What one step of a loaded model costs, measured: seconds, matrix products, and what is kept for the backward pass.

For looking at a way through the model, one part at a time, on any machine. Knows nothing of data, settings, runs or how a step is
made fast.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_helpers.training.fast_step.matmuls import recomputing
from qlora_helpers.training.probes import loss_and_gradient

_FIRST_FACTOR = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::addmm": 1,
    "aten::addmm_": 1,
    "bitsandbytes::gemm_4bit": 0,
    "qlora_helpers::add_matmul_": 1,
    "qlora_helpers::linear_unless_checkpointed": 0,
    "qlora_helpers::linear_4bit_unless_recomputed": 0,
}
"""Operators that multiply matrices, and which of their arguments is the first factor. Attention's kernels are none of them.

`torch.utils.flop_counter` knows neither bitsandbytes' operator nor ours, nor a sum in place.
"""


@dataclass(frozen=True)
class StepCost:
    """One forward and one backward pass.

    Attributes:
        loss: nats a trained token.
        gradient: of all adapter weights, one vector.
        seconds: of the fastest of some.
        gflop: of its matrix products, a multiplication and an addition each 1; those in attention's kernels are not counted.
        kept_mib: what the forward keeps for the backward pass, each tensor once; no weights.
    """

    loss: float
    gradient: torch.Tensor
    seconds: float
    gflop: float
    kept_mib: float

    def __repr__(self) -> str:
        return f"{self.seconds:6.2f} s, {self.gflop:7,.1f} GFLOP, {self.kept_mib:7,.1f} MiB kept, loss {self.loss:.5f}"

    def same_as(self, other: StepCost, tolerance: float = 1e-3) -> bool:
        """Whether loss and gradient are another's, up to rounding.

        Args:
            other: the step to compare with.
            tolerance: largest difference, as a share of the other's size.
        """
        apart = (self.gradient - other.gradient).norm() / other.gradient.norm()
        return abs(self.loss - other.loss) <= tolerance * other.loss and float(apart) <= tolerance


def step_cost(model: torch.nn.Module, batch: dict[str, Any], *, repeats: int = 2) -> StepCost:
    """Takes a step some times over and counts; the model's weights stay as they are, its gradients are left behind.

    Matmuls are counted as PyTorch dispatches them, so layers must not be compiled; what is kept, by
    `torch.autograd.graph.saved_tensors_hooks`.

    Args:
        model: with adapters, as it is at the moment.
        batch: on the model's device.
        repeats: timed steps, after one that is counted.
    """
    kept = _Kept(model)
    with _Matmuls() as matmuls:
        loss, gradient = loss_and_gradient(model, batch, forward=kept.watched())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        loss_and_gradient(
            model, batch
        )  # reads the loss, and on a GPU waits for it; the gradients may still be under way
        if gradient.is_cuda:
            torch.cuda.synchronize(gradient.device)
        seconds.append(time.perf_counter() - started)
    return StepCost(loss, gradient, min(seconds), matmuls.flop / 1e9, kept.n_bytes / 1024**2)


class _Kept:
    """Counts the bytes of the tensors that a forward pass saves, each storage once, without the model's own.

    A backward pass must follow: it lets go of what was saved, which this looks at without a copy.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.n_bytes = 0
        self.seen = {weight.untyped_storage().data_ptr() for weight in [*model.parameters(), *model.buffers()]}

    def watched(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._look, lambda tensor: tensor)

    def _look(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.n_bytes += storage.nbytes()
        return tensor


class _Matmuls(TorchDispatchMode):
    """While open, counts the operations of matrix products; `flop` says how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        place = _FIRST_FACTOR.get(name := func.name().partition(".")[0])
        if place is not None and not (name.endswith("_unless_checkpointed") and recomputing()):
            matmul = args[0] if out is None else out
            self.flop += 2 * matmul.numel() * args[place].shape[-1]
        return out
