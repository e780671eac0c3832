"""Turns the libraries' errors while a model loads into one `ModelError` each."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from qlora_helpers.base.errors import ModelError, UserError


@contextlib.contextmanager
def load_errors_explained(name: str) -> Iterator[None]:
    """Turns whatever goes wrong while a checkpoint's files are read into one `ModelError`."""
    try:
        yield
    except _out_of_memory() as error:
        raise ModelError(
            f"{name} does not fit on the GPU",
            next_step="Choose a smaller model or a larger GPU; notebook 08 shows what holds GPU memory.",
        ) from error
    except UserError:
        raise
    except Exception as error:  # a stranger's file makes transformers raise anything, KeyError and ImportError among it
        text = str(error)
        if isinstance(error, ImportError):
            raise ModelError(
                f"{name} needs a package that is not installed ({(text.strip().splitlines() or ['?'])[0]})",
                next_step="Install it beside this package, or choose another model.",
            ) from error
        if "dispatched on the CPU or the disk" in text:
            raise ModelError(
                f"{name} does not fit on the GPUs within the limit",
                next_step="Raise model.max_memory_per_gpu_gib, use more or larger GPUs, or a smaller model.",
            ) from error
        if "custom code" in text or "trust_remote_code" in text or "model type" in text.lower():
            raise ModelError(
                f"{name} needs code that transformers does not include, or is not a causal language model",
                next_step="Code that comes with a model is never run here: choose a model that transformers supports itself.",
            ) from error
        if "attention implementation" in text:
            raise ModelError(
                f"{name} does not have that attention implementation", next_step="Set model.attention=auto."
            ) from error
        if "You set `ignore_mismatched_sizes`" in text:
            text = "its weights have other sizes than its config.json says"
        reason = (text.strip().splitlines() or [""])[0]
        if not isinstance(error, (ValueError, OSError, RuntimeError)) or not reason:  # a KeyError's text is a bare name
            reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        raise ModelError(
            f"{name} could not be loaded ({reason})", next_step="Get its files again, or choose another model."
        ) from error


def _out_of_memory() -> tuple[type[BaseException], ...]:
    """Returns the error of a full GPU; none in a process that never imported torch, such as that of a preview."""
    torch = sys.modules.get("torch")
    return () if torch is None else (torch.cuda.OutOfMemoryError,)
