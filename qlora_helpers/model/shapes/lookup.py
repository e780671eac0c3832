"""A model's `config.json` without its weights: catalogued, in a local folder, or a few kilobytes from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_helpers.base.config import ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.hub import download_config
from qlora_helpers.model.shapes.catalog import HUB_NAMES, known_shape, near_names, unknown_shape
from qlora_helpers.model.shapes.config_file import read_config_file


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
    return read_config_file(path, config.name)


def _from_hub(config: ModelConfig) -> Path:
    try:
        return download_config(config.name, config.revision)
    except ModelError as error:
        known = ", ".join(near_names(config.name) or sorted(HUB_NAMES)[:3])
        raise ModelError(
            f"the shape of {config.name} is not catalogued and can't be downloaded: {error.problem}",
            next_step=f"Give a catalogued model ({known}, ...), or a folder that holds the model's config.json.",
        ) from error
