"""A model's `config.json` without its weights: catalogued, in a local folder, or a few kilobytes from the hub."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

from qlora_helpers.base.config import ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.hub import _quiet_hub, clear_hub_errors
from qlora_helpers.model.shapes.catalog import HUB_NAMES, known_shape, unknown_shape

HUB_TIMEOUT_S = 3.0  # for each connection
HUB_DEADLINE_S = 4.0  # for the name look-up and all addresses together


def find_shape(config: ModelConfig) -> dict[str, Any]:
    """Returns the `config.json` of a model.

    Args:
        config: `name` and `revision` are used.

    Raises:
        ModelError: no such model, its config.json is damaged, or it is not catalogued and the hub can't be reached.
    """
    if (shape := known_shape(config.name)) is not None:
        return shape
    if config.name.startswith("random:"):
        raise unknown_shape(config.name)
    folder = Path(config.name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"the folder {folder.name} holds no model", expected="config.json in it")
    if folder.suffix == ".gguf":
        raise ModelError(
            "a .gguf file can't be planned",
            expected="the model's hub id, or a folder with its config.json",
            next_step="Give the hub id of the model that the file was made from.",
        )
    path = folder / "config.json" if folder.is_dir() else _from_hub(config)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(
            f"the config.json of {config.name} can't be read ({type(error).__name__})", next_step="Download it again."
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"the config.json of {config.name} is not a JSON object", next_step="Download it again.")
    return found


def _from_hub(config: ModelConfig) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        with clear_hub_errors(config.name), _quiet_hub():
            try:
                return Path(
                    hf_hub_download(
                        config.name,
                        "config.json",
                        revision=config.revision,
                        etag_timeout=HUB_TIMEOUT_S,
                        local_files_only=not _hub_answers(config),
                    )
                )
            except RemoteEntryNotFoundError as error:
                raise ModelError(f"{config.name} has no config.json") from error
    except ModelError as error:
        known = ", ".join(sorted(HUB_NAMES)[:3])
        raise ModelError(
            f"the shape of {config.name} is not catalogued and can't be downloaded: {error.problem}",
            next_step=f"Give a catalogued model ({known}, ...), or a folder that holds the model's config.json.",
        ) from error


def _hub_answers(config: ModelConfig) -> bool:
    """Whether the hub answers a question about this model, even with no; it is asked once.

    `hf_hub_download` asks six times, for half a minute, before it says that there is no network. Behind a firewall
    that drops packets each address of the hub takes its whole timeout, so the question has a deadline and is then abandoned.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    url = hf_hub_url(config.name, "config.json", revision=config.revision)
    asked: Future[None] = Future()

    def ask() -> None:
        try:
            get_hf_file_metadata(url, timeout=HUB_TIMEOUT_S)
            asked.set_result(None)
        except Exception as error:  # raised again by `result` below
            asked.set_exception(error)

    Thread(target=ask, daemon=True).start()
    try:
        asked.result(timeout=HUB_DEADLINE_S)
    except HfHubHTTPError as error:
        return error.response.status_code < 500 and error.response.status_code not in (408, 429)
    except (HTTPError, OfflineModeIsEnabled, TimeoutError):
        return False
    return True
