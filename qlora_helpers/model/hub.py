"""What goes wrong between this machine and the model hub, in words that say what to do."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.units import gib


@contextlib.contextmanager
def clear_hub_errors(name: str) -> Iterator[None]:
    """What goes wrong while the hub is asked for a model becomes one `ModelError`."""
    import errno

    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: its licence must be accepted first",
            next_step="Accept it on the model's page, then log in with `hf auth login`, or choose another model.",
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ModelError(
            f"the hub knows no model {name} (or not to you)",
            next_step="Check model.name and model.revision; for a private model log in with `hf auth login`.",
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(
            "that is no name of a model",
            expected="a hub id (owner/name), a folder, a .gguf file or random:NAME",
            got=repr(name),
            next_step="Check model.name.",
        ) from error
    # errors.HTTPError is that of the client that huggingface_hub is built on: httpx, since its version 2 httpx2.
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        raise ModelError(
            f"{name} is not in the cache, and the model hub can't be reached",
            next_step="Without a network: set model.name to a local folder, a .gguf file or random:NAME, or use "
            "QLORA_PROFILE=tiny, which downloads nothing.",
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise no_space(name, None, None) from error
        raise


def no_space(name: str, needed: int | None, free: int | None) -> ModelError:
    """The error for a disk that is too small; `needed` and `free` in bytes, None where they are not known."""
    return ModelError(
        f"there is not enough disk space for {name}",
        expected=f"{gib(needed):.1f} GiB" if needed is not None else "",
        got=f"{gib(free):.1f} GiB free" if free is not None else "",
        next_step="Free some (notebook 08), or set HF_HOME to a larger volume (notebook 00).",
    )


HUB_ANSWER_S = 5.0


@functools.cache
def _hub_answers() -> bool:
    """Whether the model hub is there; asked once a process."""
    from huggingface_hub import constants, errors, get_session

    try:
        answer = get_session().head(constants.ENDPOINT, timeout=HUB_ANSWER_S, follow_redirects=True)
    except (errors.HTTPError, errors.OfflineModeIsEnabled):
        return False
    return answer.status_code < 500


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without huggingface_hub's own lines: what went wrong is told once, by us."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def is_hub_id(model: str) -> bool:
    """Whether a container in AWS can download a model of that name: `owner/name`, and no folder of this machine."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model)) and not Path(model).exists()
