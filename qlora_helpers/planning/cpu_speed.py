"""How long training takes on a CPU, by one measured rate; memory is not planned there. Imports no torch."""

from __future__ import annotations

import os

from qlora_helpers.machine.telemetry import cpu_cores
from qlora_helpers.model.shapes.decoder import ModelSizes

OPERATIONS_PER_CORE = 51e9
"""Operations a second of each core: the demo's session on two cores, its evaluations included (`benchmarks/demo_two_cores.json`:
32,266 tokens of SmolLM2-135M in 141.9 s, 449 million operations a token)."""


def cpu_threads() -> int:
    """Returns how many cores training may use: those of this process, and no more than `OMP_NUM_THREADS` says."""
    cores, limit = cpu_cores(), os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(limit)) if limit.isdecimal() and int(limit) else cores


def operations_per_token(sizes: ModelSizes, trained_share: float, *, checkpointed: bool = False) -> float:
    """Counts the operations of a forward and a backward pass through frozen weights: four a weight, six where it is recomputed.

    Args:
        sizes: of the model.
        trained_share: share of the tokens that count in the loss; only these go through the output layer.
        checkpointed: whether layers recompute their activations.
    """
    weights = sizes.linear_parameters_per_layer + sizes.expert_parameters_per_layer * sizes.experts_per_token / max(
        1, sizes.experts
    )
    return (6 if checkpointed else 4) * sizes.layers * weights + 4 * trained_share * sizes.vocab * sizes.hidden


def cpu_seconds(
    sizes: ModelSizes, tokens: float, trained_share: float, cores: int, *, checkpointed: bool = False
) -> float:
    """Estimates the seconds of a training on a CPU.

    Args:
        sizes: of the model.
        tokens: that go through it, in all epochs.
        trained_share, checkpointed: as for `operations_per_token`.
        cores: that compute.
    """
    operations = tokens * operations_per_token(sizes, trained_share, checkpointed=checkpointed)
    return operations / (OPERATIONS_PER_CORE * cores)
