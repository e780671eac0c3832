"""What merging an adapter into a model at true size holds in memory, and how long it takes.

    python benchmarks/export_memory.py OUT.json falcon-7b [llama-3.1-8b ...] [--folder SCRATCH] [--working-gib 0.25]

Writes a bfloat16 checkpoint with random weights and an adapter with random A and B into a scratch folder, tensor by tensor, merges
them in a process of its own, reads that process's peak memory (VmHWM; Linux), and checks the merged weights of three layers against
the arithmetic done whole. The files take twice the model's 16-bit size on disk (falcon-7b: 2 x 13 GiB) and are deleted after each
model. No GPU is used. For models that are not run, `arithmetic` says the same from their shape.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qlora_helpers import workflow
from qlora_helpers.base.units import BYTES_IN_GIB, gib
from qlora_helpers.export.live_names import Places
from qlora_helpers.export.merge import WORKING_GIB, low_ranks, merging_bytes
from qlora_helpers.export.tensor_files import TensorToWrite, shards, write_tensors
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.model.shapes.families import adapter_targets
from qlora_helpers.model.shapes.sizes import adapter_parameters
from qlora_helpers.model.stored_tensors import BYTES, INDEX, stored_tensors
from qlora_helpers.planning.step_settings import SINGLE

RANK = 8
ARITHMETIC = ("falcon-7b", "falcon-40b")
AT_ONCE = 64 * 1024**2  # values drawn at once
MEASURE = """
import json, re, sys, time
from pathlib import Path
import torch
from qlora_helpers.export.merge import merge
folder, working = Path(sys.argv[1]), float(sys.argv[2])
def peak_kib():  # ru_maxrss would begin at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
torch.ones(64, 64) @ torch.ones(64, 64)
before, started = peak_kib(), time.monotonic()
report = merge(folder / "base", folder / "adapter", folder / "merged", working_gib=working)
peak = peak_kib()
print(json.dumps({"before_kib": before, "peak_kib": peak, "seconds": round(time.monotonic() - started, 1)} | vars(report)))
"""


def shapes_of(shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's weights, as a checkpoint holds them."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    model.tie_weights()
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def drawn(shape: tuple[int, ...], generator: torch.Generator, deviation: float = 0.02) -> Iterator[torch.Tensor]:
    """A random tensor, some rows at a time."""
    step = max(1, AT_ONCE // max(1, torch.Size(shape[1:]).numel()))
    for first in range(0, shape[0], step):
        rows = min(step, shape[0] - first)
        yield torch.empty(rows, *shape[1:]).normal_(0.0, deviation, generator=generator)


def write_checkpoint(folder: Path, shape: dict[str, Any], sizes: dict[str, tuple[int, ...]]) -> int:
    """A bfloat16 checkpoint in shards of 4 GiB; gives its bytes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    counted = {name: BYTES["BF16"] * torch.Size(size).numel() for name, size in sizes.items()}
    files = shards(counted, 4 * BYTES_IN_GIB)
    weight_map = {}
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_tensors(
            folder / file, [TensorToWrite(name, "BF16", sizes[name], drawn(sizes[name], generator)) for name in names]
        )
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": sum(counted.values())}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps(shape))
    return sum(counted.values())


def write_adapter(folder: Path, shape: dict[str, Any], sizes: dict[str, tuple[int, ...]]) -> None:
    """An adapter of rank 8 on the architecture's own targets."""
    folder.mkdir()
    targets, generator = adapter_targets(shape) or (), torch.Generator().manual_seed(1)
    tensors = []
    for name, size in sizes.items():
        layer = name.removesuffix(".weight")
        if len(size) == 2 and layer.rsplit(".", 1)[-1] in targets:
            for kind, part in (("A", (RANK, size[1])), ("B", (size[0], RANK))):
                full = f"base_model.model.{layer}.lora_{kind}.weight"
                tensors.append(TensorToWrite(full, "F32", part, drawn(part, generator)))
    write_tensors(folder / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def largest_error(folder: Path) -> float:
    """Merged against base plus adapter done whole, over three layers: in units of the last place of bfloat16.

    Of the larger of base and sum: where the two parts cancel, 32 bits keep no more of the difference.
    """
    base, merged = stored_tensors(folder / "base"), stored_tensors(folder / "merged")
    places = Places(folder / "base", {name: tensor.shape for name, tensor in base.items()})
    adapters = low_ranks(folder / "adapter", base, places)
    names = list(adapters)
    worst = 0.0
    for name in (names[0], names[len(names) // 2], names[-1]):
        first = base[name].read().double()
        exact = first.clone()
        for part in adapters[name]:
            exact[part.first : part.first + part.up.shape[0]] += part.up.double() @ part.down.double()
        place = 2.0 ** (exact.abs().maximum(first.abs()).clamp(min=1e-30).log2().floor() - 7)
        worst = max(worst, float(((merged[name].read().double() - exact).abs() / place).max()))
    return worst


def arithmetic(name: str, working_gib: float) -> dict[str, float]:
    """The bound of a model that is not run."""
    parameters = adapter_parameters(SHAPES[name], RANK, None, False)
    return {
        "adapter_gib": round(gib(SINGLE * parameters), 3),
        "bound_gib": round(gib(merging_bytes(SINGLE * parameters, working_gib * BYTES_IN_GIB)), 3),
    }


def measure(name: str, scratch: Path | None, working_gib: float) -> dict[str, Any]:
    """Writes, merges and checks one model."""
    shape, started = SHAPES[name], time.monotonic()
    sizes = shapes_of(shape)
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        folder = Path(temporary)
        size = write_checkpoint(folder / "base", shape, sizes)
        write_adapter(folder / "adapter", shape, sizes)
        (folder / "merged").mkdir()
        written_s = time.monotonic() - started
        command = [sys.executable, "-c", MEASURE, str(folder), str(working_gib)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-500:])
        found = json.loads(done.stdout.splitlines()[-1])
        error = largest_error(folder)
    before, peak = found.pop("before_kib"), found.pop("peak_kib")
    return {
        "model_gib": round(gib(size), 2),
        "writing_s": round(written_s, 1),
        **found,
        "before_gib": round(before / 1024**2, 3),
        "peak_rss_gib": round(peak / 1024**2, 3),
        "merging_gib": round((peak - before) / 1024**2, 3),
        "largest_error_in_last_places": round(error, 3),
    }


def main() -> None:
    """Measures each model and writes after each."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("out", type=Path)
    options.add_argument("models", nargs="+", choices=sorted(SHAPES))
    options.add_argument("--folder", type=Path, help="where the files go for a while; else the temporary folder")
    options.add_argument("--working-gib", type=float, default=WORKING_GIB, help="limit on the rows at work")
    chosen = options.parse_args()
    results: dict[str, Any] = {
        "versions": workflow.versions(),
        "rank": RANK,
        "working_gib": chosen.working_gib,
        "arithmetic": {name: arithmetic(name, chosen.working_gib) for name in ARITHMETIC},
        "cases": [],
    }
    for name in chosen.models:
        try:
            found = measure(name, chosen.folder, chosen.working_gib)
        except Exception as error:  # one case that fails is a result too
            found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        results["cases"].append({"model": name} | found)
        print(json.dumps(results["cases"][-1]), flush=True)
        chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
