"""Whether the installed PyTorch has kernels for this machine's GPUs.

A build of PyTorch holds compiled kernels (`sm_75`) for the cards that its makers chose, and sometimes code from which the driver
compiles more (`compute_120`). On any other card everything installs and starts, and the first operation on the GPU fails
("no kernel image is available"). Imports no torch: another process asks it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence

from qlora_helpers.machine.telemetry import GpuReading

ASKING_S = 120.0
_QUESTION = "import torch; print(torch._C._cuda_getArchFlags() or '')"


def built_for() -> tuple[str, ...] | None:
    """Returns what the installed PyTorch was built for, such as `("sm_75", "sm_80", "compute_120")`; None if it does not say.

    `torch.cuda.get_arch_list` returns the same, but nothing where PyTorch finds no GPU that it can use.
    """
    try:
        done = subprocess.run([sys.executable, "-P", "-c", _QUESTION], capture_output=True, text=True, timeout=ASKING_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.findall(r"\b(?:sm|compute)_\d+[a-z]?\b", done.stdout)
    return tuple(found) if done.returncode == 0 and found else None


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a build runs on a card.

    Args:
        capability: the card's compute capability, such as `(8, 6)`.
        architectures: what PyTorch was built for.

    Returns:
        Kernels run on cards of the same major number and the same or a higher minor one; code for the driver's compiler on any
        later card. Those with a letter run on that card alone, and on its family (CUDA C++ Programming Guide, 'Compatibility').
    """
    for each in architectures:
        kind, number, only = re.fullmatch(r"(sm|compute)_(\d+)([a-z]?)", each).groups()  # type: ignore[union-attr]
        built = divmod(int(number), 10)
        if built == capability:
            return True
        if not only and built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def cards_without_kernels(gpus: Sequence[GpuReading], architectures: Sequence[str]) -> list[GpuReading]:
    """Returns the cards that the installed PyTorch can't use; one that does not report its capability is not judged."""
    return [
        gpu
        for gpu in gpus
        if gpu.compute_capability is not None and not has_kernels(gpu.compute_capability, architectures)
    ]
