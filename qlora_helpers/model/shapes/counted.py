"""The sizes of models that arithmetic does not know: kept for the catalogue, else counted once on what transformers builds.

Counting takes a process of its own, a few seconds and no weights (`model.built_sizes`); what it finds is kept by the digest of the
configuration and the version of transformers. So this room imports no torch, and a configuration of any origin is built where it
can neither stay for ever nor fill this machine's memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import reprlib
import subprocess
import sys
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from qlora_helpers import __version__
from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.base.files import cache_root, write_text
from qlora_helpers.base.text import plain
from qlora_helpers.model.shapes.decoder import LinearLayer, ModelSizes
from qlora_helpers.model.shapes.values import Shape, family_of

COUNT_S = 180.0  # for building a model on the meta device; a few seconds on an idle machine
COUNT_BYTES = 16 * 1024**3  # of address space; PyTorch with CUDA maps several GiB that it never touches
KEPT = "counted.json"
COUNTING = 4  # raised whenever more, or something else, is counted: what was kept before is counted anew
_NO_SIZES = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
}


def digest(config: Shape) -> str:
    """Returns a digest of what in a `config.json` may set a size."""
    sizes = {key: value for key, value in config.items() if key not in _NO_SIZES and not key.endswith("token_id")}
    return hashlib.sha256(json.dumps(sizes, sort_keys=True, default=str).encode()).hexdigest()[:24]


def counted_sizes(config: Shape) -> ModelSizes:
    """Returns the sizes of a model as transformers builds it, counted at most once for each version of transformers.

    Args:
        config: a model's `config.json`.

    Raises:
        ModelError: transformers can't build it, or not within `COUNT_S` and `COUNT_BYTES`; the message has its reason.
    """
    family = family_of(config)
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", str(config.get("model_type") or "")):
        raise ModelError(
            "a config.json names no family of models",
            expected="model_type, a name such as llama",
            got=reprlib.repr(config.get("model_type")),
            next_step="Give the model's own config.json; other kinds of models than causal language models can't be planned.",
        )
    key = digest(config)
    return _kept(key) or _counted(key, json.dumps(config, default=str), family)


def from_plain(found: dict[str, Any]) -> ModelSizes:
    """Returns sizes from plain values, as `dataclasses.asdict` gives them."""
    layers = {name: tuple(LinearLayer(**each) for each in found[name]) for name in ("linears", "expert_stacks")}
    return ModelSizes(**found | layers | {"mixer_packages": tuple(found["mixer_packages"])})


def _kept(key: str) -> ModelSizes | None:
    found = _catalogued().get(key)
    return from_plain(found) if found else None


@lru_cache(maxsize=1)
def _catalogued() -> dict[str, dict[str, Any]]:
    text = resources.files("qlora_helpers.model.shapes").joinpath(KEPT).read_text(encoding="utf-8")
    return dict(json.loads(text)["sizes"])


@lru_cache(maxsize=64)
def _counted(key: str, config: str, family: str) -> ModelSizes:
    version = metadata.version("transformers")
    path = cache_root() / "counted" / f"{key}-{version}-{__version__}-{COUNTING}.json"
    if (known := _read(path)) is not None:
        return known
    found = _count(config, family)
    if "refused" in found:
        raise ModelError(
            f"a model of the family {family} can't be planned: transformers {version} does not build it",
            expected="a causal language model that this version of transformers knows",
            got=plain(str(found["refused"])),
            next_step="Give the model's own config.json, or choose another model.",
        )
    with contextlib.suppress(UserError):  # on a full or read-only disk it is counted again the next time
        write_text(path, json.dumps(found))
    return from_plain(found)


def _read(path: Path) -> ModelSizes | None:
    """Returns what was counted before; None where nothing was, or the file is damaged."""
    try:
        return from_plain(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _count(config: str, family: str) -> dict[str, Any]:
    """Counts in a process of its own.

    Raises:
        ModelError: it took too long or too much memory; this is not kept, since another machine may manage.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "qlora_helpers.model.built_sizes", str(COUNT_BYTES)],
            input=config,
            capture_output=True,
            text=True,
            timeout=COUNT_S,
            env=environment,
            check=False,
        )
        found = json.loads(done.stdout.strip().rpartition("\n")[2])
    except (subprocess.TimeoutExpired, ValueError) as error:
        late = isinstance(error, subprocess.TimeoutExpired)
        why = f"after {COUNT_S:.0f} s it was not done" if late else plain(done.stderr.strip()[-200:]) or "it was ended"
        raise ModelError(
            f"the weights of a model of the family {family} could not be counted",
            expected=f"transformers' model without weights, within {COUNT_S:.0f} s and {COUNT_BYTES // 1024**3} GiB",
            got=why,
            next_step="Give the model's own config.json, or choose another model.",
        ) from error
    return dict(found)
