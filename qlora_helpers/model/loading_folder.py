"""Hands transformers exactly the files that were checked, and refuses a configuration that asks for more than the weights hold.

`from_pretrained` looks for many files: weights in other formats, adapters beside the model, settings for answers. A stranger's
folder may hold any of them, so transformers is given a folder of links instead: the weights that are fingerprinted, and a
`config.json` and `generation_config.json` without what is decided here. Knows nothing of quantisation, devices or training.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.checkpoints import Checkpoint
from qlora_helpers.model.config_check import need_layers, need_weights
from qlora_helpers.model.shapes.config_file import read_config_file
from qlora_helpers.model.stored_tensors import INDEX, StoredTensor, tensors_in, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OURS = re.compile(
    r"_?(attn|experts)_implementation.*|transformers_weights|auto_map|distributed_config|use_kernels|kernel_config"
)
"""Keys of a `config.json` that choose files, kernels or code; those are chosen by settings of a run."""


def model_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """Returns a checkpoint's configuration with transformers' defaults filled in, held against the names of its tensors.

    Raises:
        ModelError: it can't be read, or asks for more layers than the files hold.
    """
    with loading_folder(checkpoint, whole=False) as folder:
        return _config(folder)


@contextlib.contextmanager
def loading_folder(checkpoint: Checkpoint, *, whole: bool = True) -> Iterator[Path]:
    """Opens a temporary folder from which the model can be loaded, with nothing in it but what was checked.

    Args:
        checkpoint: a model that has files.
        whole: whether the sizes of all tensors are compared with those of a model that is built without memory for its weights;
            else the numbers of layers alone.

    Raises:
        ModelError: a file is damaged, or the configuration asks for more than the weights hold.
    """
    source, name = checkpoint.folder, checkpoint.name
    files = weight_files(source)
    values = read_config_file(source / "config.json", name)
    with tempfile.TemporaryDirectory(prefix="qlora-model-") as place:
        folder = Path(place)
        for path in files:
            (folder / path.name).symlink_to(path.resolve())
        if not (folder / "model.safetensors").exists() and files:
            (folder / INDEX).symlink_to((source / INDEX).resolve())
        kept = {key: value for key, value in values.items() if not OURS.fullmatch(key)}
        (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
        config = _config(folder)
        text = config.get_text_config()
        if (source / "generation_config.json").is_file():
            tokens = _token_ids(source / "generation_config.json", name, getattr(text, "vocab_size", 2**31))
            (folder / "generation_config.json").write_text(json.dumps(tokens), encoding="utf-8")
        if checkpoint.origin != "random":  # that one we have written ourselves
            tensors = _tensors(files, name)
            need_layers(text, tensors, name)
            if whole:
                need_weights(config, tensors, name)
        yield folder


def _config(folder: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _tensors(files: list[Path], name: str) -> dict[str, StoredTensor]:
    try:
        return tensors_in(files)
    except ModelError as error:
        raise ModelError(
            f"{name} could not be loaded ({error.problem})", next_step="Get its files again, or choose another model."
        ) from error


def _token_ids(path: Path, name: str, vocabulary: int) -> dict[str, Any]:
    """Returns what is taken of a `generation_config.json`: the tokens at which an answer begins and ends.

    How answers are drawn is set by the run, so that a file of the model can't change a comparison.
    """
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(1 << 20))
        kept = {key: found[key] for key in ("bos_token_id", "eos_token_id") if found.get(key) is not None}
    except (ValueError, RecursionError, OSError, AttributeError) as error:
        raise ModelError(
            f"the generation_config.json of {name} can't be read ({type(error).__name__})",
            next_step="Download it again, or delete it.",
        ) from error
    wrong = [token for value in kept.values() for token in _listed(value) if type(token) is not int]
    if wrong:
        raise ModelError(
            f"the generation_config.json of {name} names a token that is not a number",
            got=repr(wrong[0])[:40],
            next_step="Download it again, or delete it.",
        )
    # A number beyond the vocabulary can't be generated, so it never ends an answer; some published files name one.
    inside = {key: [token for token in _listed(value) if 0 <= token < vocabulary] for key, value in kept.items()}
    return {key: tokens[0] if len(tokens) == 1 else tokens for key, tokens in inside.items() if tokens}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
