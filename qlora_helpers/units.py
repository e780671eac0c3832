"""Units: one constant for GiB, so that every number with that name means the same."""

from __future__ import annotations

BYTES_IN_GIB = 1024**3


def gib(n_bytes: float) -> float:
    """Bytes as GiB (1024³ bytes)."""
    return n_bytes / BYTES_IN_GIB
