"""Everything that is asked of the Hugging Face Hub for a model: whether it answers, downloads, uploads.

What goes wrong on the way becomes one `ModelError` that says what to do. Imports no torch, and huggingface_hub only when
the hub is asked. Knows nothing of runs or of what is in a checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.text import Say
from qlora_helpers.base.units import gib

ANSWER_S = 5.0  # timeout for finding out whether the hub answers at all
SIZES_S = 20.0  # timeout for the list of a repository's files and their sizes
CONFIG_S = 3.0  # timeout of each connection while a config.json is fetched
CONFIG_DEADLINE_S = 4.0  # limit on looking up the hub's name and trying all its addresses
DOWNLOADED_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "vocab*", "merges.txt")


def is_hub_id(model: str) -> bool:
    """Whether another machine can download a model of that name: `owner/name`, and not a folder of this machine."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model)) and not Path(model).exists()


TOKENIZER_PATTERNS = (
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.jinja",
)


# Does it answer?


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be reached; asked once per process."""
    from huggingface_hub import constants, errors, get_session

    try:
        answer = get_session().head(constants.ENDPOINT, timeout=ANSWER_S, follow_redirects=True)
    except (errors.HTTPError, errors.OfflineModeIsEnabled):
        return False
    return answer.status_code < 500


def _hub_answers_about(name: str, revision: str | None) -> bool:
    """Whether the hub says anything about this model, even if it refuses it; asked once.

    `hf_hub_download` asks six times, for half a minute, before it reports that there is no network. A firewall that drops
    packets lets each address of the hub take its whole timeout, so the request has a deadline and is abandoned after it.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    url = hf_hub_url(name, "config.json", revision=revision)
    asked: Future[None] = Future()

    def ask() -> None:
        try:
            get_hf_file_metadata(url, timeout=CONFIG_S)
            asked.set_result(None)
        except Exception as error:  # raised again below, in the thread that judges it
            asked.set_exception(error)

    Thread(target=ask, daemon=True).start()
    try:
        asked.result(timeout=CONFIG_DEADLINE_S)
    except HfHubHTTPError as error:
        return error.response.status_code < 500 and error.response.status_code not in (408, 429)
    except (HTTPError, OfflineModeIsEnabled, TimeoutError):
        return False
    return True


# Downloads


def cached_model(name: str, revision: str | None) -> Path | None:
    """The folder of a model that was downloaded before, or None where it or its weights are not in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError, ValueError):
        folder = Path(
            snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=list(DOWNLOADED_FILES))
        )
        if list(folder.glob("*.safetensors")):
            return folder
    return None


def download_model(name: str, revision: str | None, *, say: Say = print) -> Path:
    """Downloads a model's safetensors, settings and tokenizer into the hub's cache.

    Args:
        name: the hub id.
        revision: branch, tag or commit; None takes the default branch.
        say: receives a line before the download starts.

    Returns:
        The folder; its name is the commit.

    Raises:
        ModelError: unknown, gated or unreachable repository, no safetensors, or not enough disk space.
    """
    from huggingface_hub import snapshot_download

    with hub_errors_explained(name):
        _check_space(name, revision)
        say(f"Downloading {name} ...")
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(DOWNLOADED_FILES)))


def download_tokenizer(name: str, revision: str | None) -> Path:
    """Fetches a model's tokenizer and `config.json` alone, after a look at whether its weights could follow.

    Returns:
        The folder; its name is the commit.

    Raises:
        ModelError: as for `download_model`, or the repository has no config.json.
    """
    from huggingface_hub import snapshot_download

    with hub_errors_explained(name):
        _check_space(name, revision)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(TOKENIZER_PATTERNS)))
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name} has no config.json", next_step="Check model.name.")
    return folder


def _check_space(name: str, revision: str | None) -> None:
    """Compares the size of a repository's weights with the free space of the hub's cache, before the first byte is sent."""
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=SIZES_S)
    files = [file for file in info.siblings or [] if file.rfilename.endswith(".safetensors")]
    if not files:
        raise ModelError(
            f"{name} has no weights as safetensors",
            next_step="Pickled .bin weights can run code when loaded and are refused: choose another repository.",
        )
    needed = sum(file.size or 0 for file in files)
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise _not_enough_space(name, needed, free)


def download_config(name: str, revision: str | None) -> Path:
    """Fetches a model's `config.json` alone, a few kilobytes, from the hub's cache where the hub does not answer in time.

    Raises:
        ModelError: unknown, gated or unreachable repository, or it has no config.json.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with hub_errors_explained(name), _without_hub_messages():
        try:
            offline = not _hub_answers_about(name, revision)
            return Path(
                hf_hub_download(name, "config.json", revision=revision, etag_timeout=CONFIG_S, local_files_only=offline)
            )
        except RemoteEntryNotFoundError as error:
            raise ModelError(f"{name} has no config.json") from error


# Uploads


def check_repository(repository: str) -> None:
    """Checks the form of a repository's name, so that a typing error is found before any long work; asks no hub.

    Raises:
        ModelError: it can't be the name of a repository.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ModelError("that is not the name of a repository", expected="owner/name", got=repr(repository)) from error


def upload_folder(folder: Path, repository: str, *, private: bool = True) -> str:
    """Uploads a folder in one commit and creates the repository where it does not exist yet.

    The token is huggingface_hub's own (`hf auth login`, or HF_TOKEN): it is never taken, kept or shown here.

    Args:
        folder: what is uploaded.
        repository: `owner/name`.
        private: whether a new repository is private.

    Returns:
        The repository's address.

    Raises:
        ModelError: the hub refuses or can't be reached.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=f"Upload {folder.name}")
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else "no code"
        raise ModelError(
            f"the hub refuses to write {repository} ({code})",
            next_step="Log in with a token that may write there: `hf auth login`.",
        ) from None  # the request inside the error has the token in its header
    except (errors.OfflineModeIsEnabled, errors.HTTPError) as error:
        raise ModelError(
            f"the hub can't be reached to write {repository}",
            next_step=f"The folder {folder.name}/ is complete: try again.",
        ) from error
    return f"{api.endpoint}/{repository}"


# Errors


@contextlib.contextmanager
def hub_errors_explained(name: str) -> Iterator[None]:
    """Turns whatever goes wrong while the hub is asked for a model into one `ModelError`."""
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
            f"the hub has no model {name}, or does not show it to you",
            next_step="Check model.name and model.revision; for a private model log in with `hf auth login`.",
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(
            "that is not the name of a model",
            expected="a hub id (owner/name), a folder, a .gguf file or random:NAME",
            got=repr(name),
            next_step="Check model.name.",
        ) from error
    # errors.HTTPError belongs to the client that huggingface_hub is built on: httpx, since its version 2 httpx2.
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        raise ModelError(
            f"{name} is not in the cache, and the model hub can't be reached",
            next_step="Without a network: set model.name to a local folder, a .gguf file or random:NAME, or use "
            "QLORA_PROFILE=tiny, which downloads nothing.",
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _not_enough_space(name, None, None) from error
        raise


def _not_enough_space(name: str, needed: int | None, free: int | None) -> ModelError:
    """The error for a full disk; `needed` and `free` in bytes, None where they are not known."""
    return ModelError(
        f"there is not enough disk space for {name}",
        expected=f"{gib(needed):.1f} GiB" if needed is not None else "",
        got=f"{gib(free):.1f} GiB free" if free is not None else "",
        next_step="Free some (notebook 08), or set HF_HOME to a larger volume (notebook 00).",
    )


@contextlib.contextmanager
def _without_hub_messages() -> Iterator[None]:
    """Silences huggingface_hub's own log lines, so that a failure is reported once, by us."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
