"""Units: one constant for GiB, so that every number in GiB means the same."""

from __future__ import annotations

BYTES_IN_GIB = 1024**3


def gib(n_bytes: float) -> float:
    """Converts bytes to GiB (1024³ bytes)."""
    return n_bytes / BYTES_IN_GIB


def size_text(n_bytes: float) -> str:
    """Formats a file's size for a person: `812 bytes`, `14.2 KiB`, `1.50 GiB`."""
    if n_bytes < 1024:
        return f"{n_bytes:.0f} bytes"
    for unit, power in (("KiB", 1), ("MiB", 2)):
        if n_bytes < 1024 ** (power + 1):
            return f"{n_bytes / 1024**power:.1f} {unit}"
    return f"{gib(n_bytes):.2f} GiB"


def duration(seconds: float) -> str:
    """Formats seconds for a person: `38 s`, `4 min 12 s`, `1 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if whole >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
