"""PyTorch's memory on GPUs: segments that grow, so that what is free is one piece and a plan's bytes are enough."""

from __future__ import annotations

import os

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
NAME = "expandable_segments"


def use_expandable_segments() -> bool:
    """Turns expandable segments on, in this process and those that it starts.

    Set after torch was imported, PyTorch's variable changes nothing on CUDA (torch 2.11: a step of the 2023 recipe on Falcon-40B
    reserved 51 GiB, and 41 once the running allocator was told too, as here). Segments that are there stay as they are.
    (PyTorch's notes on CUDA, "Optimizing memory usage with PYTORCH_ALLOC_CONF".)

    Returns:
        False where a variable says that they shall not be used; nothing is changed then.
    """
    import torch

    chosen = [os.environ[name] for name in VARIABLES if os.environ.get(name)]
    if any(f"{NAME}:false" in each.lower() for each in chosen):
        return False
    if not any(NAME in each for each in chosen):
        chosen = [",".join([*chosen[:1], f"{NAME}:True"])]
        os.environ[VARIABLES[0]] = chosen[0]
    tell = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    tell(chosen[0])
    return True


def segments_expand() -> bool:
    """Whether memory that PyTorch holds on a GPU lies in such segments."""
    import torch

    return any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())
