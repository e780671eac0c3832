"""Importing: every module loads, and what a form, a plan or the setup report needs loads no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qlora_helpers

FOLDER = Path(qlora_helpers.__file__).parent
# They subclass and decorate with torch and transformers.
HEAVY = {"evaluation", "training", "training_callback", "training_step", "summary_trainer", "loss_watch", "probes"} | {
    "fast_step", "fast_step.adapters", "fast_step.layers", "fast_step.loss", "fast_step.patching", "fast_step.rows",
    "fast_answers", "fast_answers.attention", "fast_answers.cache",
    "fast_answers.decoder", "fast_answers.graphs", "fast_answers.weights", "fast_step.embeddings", "fast_step.graphs",
    "fast_step.products",
    "cuda_graphs", "step_cost",
}  # fmt: skip
SLOW_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "tensorboardX", "datasets")


def modules() -> list[str]:
    """Every module of the package, those in folders too."""
    found = [path.relative_to(FOLDER).with_suffix("") for path in FOLDER.rglob("*.py")]
    return sorted(".".join(path.parts).removesuffix("__init__").rstrip(".") for path in found)


def loaded_after(names: list[str]) -> set[str]:
    """What is in `sys.modules` of a new process after it imported modules of the package."""
    lines = [f"importlib.import_module({('qlora_helpers.' + name).rstrip('.')!r})" for name in names]
    code = "\n".join(["import importlib, json, sys", *lines, "print(json.dumps(sorted(sys.modules)))"])
    done = subprocess.run([sys.executable, "-W", "error::DeprecationWarning:qlora_helpers", "-c", code],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    (printed,) = done.stdout.splitlines()  # importing prints nothing
    return set(json.loads(printed))


def test_every_module_loads():
    names = modules()
    assert len(names) >= 30
    loaded = loaded_after(names)
    assert {f"qlora_helpers.{name}".rstrip(".") for name in names} <= loaded
    assert "torch" in loaded  # so that the test below can fail


def test_all_but_the_heavy_steps_load_no_torch():
    names = [name for name in modules() if name not in HEAVY]
    assert len(names) >= 30
    loaded = loaded_after(names)
    assert not loaded.intersection(SLOW_LIBRARIES)


@pytest.mark.parametrize("name", ["config", "run", "environment", "workspace", "cuda_paths", "telemetry", "errors"])
def test_what_runs_before_the_requirements_are_installed_needs_the_standard_library_alone(name):
    loaded = loaded_after([name])
    others = {module.split(".")[0] for module in loaded} - set(sys.stdlib_module_names) - {"qlora_helpers", "__main__"}
    others = {module for module in others if not module.startswith(("_", "sitecustomize", "zipimport"))}
    assert not others


@pytest.mark.parametrize("name", sorted(HEAVY))
def test_a_heavy_step_is_heavy(name):
    """One that no longer is should leave the list."""
    path = FOLDER / name.replace(".", "/")
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    assert re.search(r"^(import torch|from transformers)", text.split("TYPE_CHECKING:")[0], re.MULTILINE)


def test_the_version_is_the_distribution_s():
    import importlib.metadata

    assert importlib.metadata.version("qlora_helpers") == qlora_helpers.__version__
