"""An exercise of notebook 11: tell a certified adapter from one that has changed by a byte."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import ModelError
from qlora_helpers.export.certificate import FILE, SETTINGS, WEIGHTS, Certificate, require_certificate, sha256
from qlora_helpers.teaching.exercise import Exercise, Wrong, call


def is_certified(folder):
    """The solution of `one_byte`."""
    import hashlib
    import json

    found = json.loads((folder / "certificate.json").read_text())
    hashes = {
        "adapter_model.safetensors": found["weights_sha256"],
        "adapter_config.json": found["settings_sha256"],
    }
    same = [hashlib.sha256((folder / name).read_bytes()).hexdigest() == known for name, known in hashes.items()]
    return found["passed"] and all(same)


def _judge_certified(function: Any) -> str:
    changes: list[tuple[str, Callable[[Path], None]]] = [
        ("refuses-all", lambda folder: None),
        ("reads-the-verdict-alone", _flip_a_byte),
        ("weights-alone", _change_a_setting),
        ("hashes-alone", _fail),
        ("refuses-all", lambda folder: None),
    ]
    refusal = ""
    for code, change in changes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name, "adapter")
            _write_adapter(folder)
            change(folder)
            try:
                right = bool(require_certificate(folder))
            except ModelError as error:
                right = False
                refusal = refusal or error.problem
            got = call(function, folder)
        if bool(got) != right:
            raise Wrong(code)
    return f"Five adapters agree with what `export` says, which of the flipped byte is: {refusal}."


def _write_adapter(folder: Path) -> None:
    """Writes an adapter of a few drawn numbers with a certificate that passes."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    drawn = np.random.default_rng()
    tensors = {f"lora_{name}.weight": drawn.normal(size=(8, 8)).astype("float32") for name in "AB"}
    save_file(tensors, folder / WEIGHTS)
    (folder / SETTINGS).write_text(json.dumps({"r": 8, "lora_alpha": 16}))
    made = Certificate(
        sha256(folder / WEIGHTS),
        sha256(folder / SETTINGS),
        tensors=2,
        parameters=128,
        missing=(),
        unexpected=(),
        unmoved=(),
        not_finite=(),
        settings_changed=(),
        prompts=3,
        largest_difference=0.0,
        same_answers=3,
        base_model="drawn",
        base_revision=None,
        base_sha256=None,
        data_fingerprint=None,
        made="now",
        versions={},
    )
    _write_certificate(folder, made)


def _write_certificate(folder: Path, made: Certificate) -> None:
    (folder / FILE).write_text(json.dumps(asdict(made) | {"passed": made.passed}))


def _flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-random.randrange(1, 500)] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def _change_a_setting(folder: Path) -> None:
    (folder / SETTINGS).write_text(json.dumps({"r": 8, "lora_alpha": 32}))


def _fail(folder: Path) -> None:
    found = require_certificate(folder)
    _write_certificate(folder, replace(found, unmoved=("lora_B.weight",)))


ONE_BYTE = Exercise(
    name="one_byte",
    title="One byte",
    kind="write",
    minutes=5,
    question="Write is_certified(folder): True where `passed` in certificate.json is true, and its weights_sha256 and "
    "settings_sha256 are the SHA-256 of adapter_model.safetensors and adapter_config.json.",
    judge=_judge_certified,
    misconceptions={
        "refuses-all": "An adapter with a true certificate is refused: its two files are as they were.",
        "reads-the-verdict-alone": "One byte of the weights was flipped, in a file that still loads: `passed` was written "
        "before that. Hash the file.",
        "weights-alone": "The weights are the same, but adapter_config.json has twice the lora_alpha, which doubles what they add.",
        "hashes-alone": "Both files are as they were certified, but the certificate says that the adapter failed.",
    },
    hints=(
        "json.loads((folder / 'certificate.json').read_text()) is a dictionary with the three keys.",
        "hashlib.sha256((folder / name).read_bytes()).hexdigest() is the hash of a file.",
    ),
    solution_is=is_certified,
)
