"""Measures what one step of a loaded model costs: seconds, matrix multiplications, and what is kept for the backward pass.

It serves to study one part of the fast step at a time, on any machine. Knows nothing of data, settings or runs.
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
    "qlora_helpers::linear_unless_recomputing": 0,
    "qlora_helpers::linear_4bit_unless_recomputing": 0,
    "qlora_helpers::fp8_linear_unless_recomputing": 0,
    "aten::_scaled_mm": 0,
}
"""Operators that multiply matrices, and which of their arguments is the first factor. Attention's kernels are not among them.

`torch.utils.flop_counter` knows neither bitsandbytes' operator nor ours, nor `addmm_`.
"""


@dataclass(frozen=True)
class StepCost:
    """One forward and one backward pass.

    Attributes:
        loss: nats per trained token.
        gradient: the gradient of all adapter weights, as one vector.
        seconds: the time of the fastest repetition.
        gflop: of matrix multiplications, a multiplication and an addition counted as 1 each; attention's kernels are not counted.
        kept_mib: what the forward pass keeps for the backward pass, each tensor once, without weights.
    """

    loss: float
    gradient: torch.Tensor
    seconds: float
    gflop: float
    kept_mib: float

    def __repr__(self) -> str:
        return f"{self.seconds:6.2f} s, {self.gflop:7,.1f} GFLOP, {self.kept_mib:7,.1f} MiB kept, loss {self.loss:.5f}"

    def same_as(self, other: StepCost, tolerance: float = 1e-3) -> bool:
        """Whether loss and gradient equal another step's, up to rounding.

        Args:
            other: the step to compare with.
            tolerance: largest difference, as a share of the other's value.
        """
        apart = (self.gradient - other.gradient).norm() / other.gradient.norm()
        return abs(self.loss - other.loss) <= tolerance * other.loss and float(apart) <= tolerance


def step_cost(model: torch.nn.Module, batch: dict[str, Any], *, repeats: int = 2) -> StepCost:
    """Repeats a step and measures it; the model's weights don't change, its gradients do.

    Matrix multiplications are counted as PyTorch dispatches them, so layers must not be compiled. What is kept is counted by
    `torch.autograd.graph.saved_tensors_hooks`.

    Args:
        model: with adapters and whatever is open on it.
        batch: on the model's device.
        repeats: how many steps are timed, after the one that is counted.
    """
    kept = _Kept(model)
    with _Matmuls() as matmuls:
        loss, gradient = loss_and_gradient(model, batch, forward=kept.watched())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        loss_and_gradient(model, batch)  # on a GPU this waits for the loss; gradients may still be computed
        if gradient.is_cuda:
            torch.cuda.synchronize(gradient.device)
        seconds.append(time.perf_counter() - started)
    return StepCost(loss, gradient, min(seconds), matmuls.flop / 1e9, kept.n_bytes / 1024**2)


class _Kept:
    """Counts the bytes of the tensors that a forward pass saves, each storage once, without the model's own.

    A backward pass must follow, to free what was saved: the tensors are not copied here.
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
    """While open, counts the operations of matrix multiplications in `flop`."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        factor = _FIRST_FACTOR.get(name := func.name().partition(".")[0])
        if factor is not None and not (name.endswith("_unless_recomputing") and recomputing()):
            matmul = args[0] if out is None else out
            self.flop += 2 * matmul.numel() * args[factor].shape[-1]
        return out
