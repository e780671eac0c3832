"""How fast a training step is and what it holds, on one machine: the recipe as published, the plain path, the fast step.

    python benchmarks/step_speed.py OUT.json MODEL:VARIANT[:BLOCKS[:RECOMPUTED[:LIMIT_GIB]]] ...

    python benchmarks/step_speed.py out.json falcon-40b:recipe falcon-40b:fast:2:10:79 llama-3.1-8b:fast:4:0

Models are catalogued shapes at true size with random weights, or any name that the package loads; rows are the embedded corpus (or
`--data`); data loader, optimizer and steps are those of `transformers.Trainer`. The clock is CUDA's own, read at each step's end
without waiting; the first steps are left out. Tokens are those that are not padding. The limit is enforced on what is reserved.
Everything runs in one process, so the ratios hold whatever the card's clock does that day. Without a GPU the same runs on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qlora_helpers import lora, models, training, workflow
from qlora_helpers.config import AdapterConfig, DataConfig, ModelConfig, TrainConfig
from qlora_helpers.data import prepare
from qlora_helpers.model_shapes import SHAPES
from qlora_helpers.run import Run
from qlora_helpers.sources import read_corpus
from qlora_helpers.units import BYTES_IN_GIB, gib

ON_GPU = torch.cuda.is_available()
RANKS = {"falcon-7b": 8, "falcon-40b": 8, "falcon-tiny": 8}
WARM, TIMED = 3, 6


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    model: str
    variant: str
    blocks: int = 1
    recomputed: int | None = None
    limit_gib: float | None = None

    @classmethod
    def parse(cls, text: str) -> Case:
        model, variant, *rest = text.split(":")
        numbers = [None if part in ("", "all") else float(part) for part in rest] + [None] * 3
        return cls(model, variant, int(numbers[0] or 1), None if numbers[1] is None else int(numbers[1]), numbers[2])


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "recipe": {
        "data": {"packing": False, "loss_on": "all"},
        "adapter": {"lora_dropout": 0.05},
        "train": {"fast_step": False, "micro_batch_size": 8},
    },
    "plain": {"train": {"fast_step": False}},
    "eager": {"train": {"compile": "off"}},
    "fast": {"train": {"compile": "on"}},
}
"""What differs from our defaults without dropout: the 2023 recipe, packing alone, the fast step without and with compilation."""


class Clock(TrainerCallback):
    """CUDA events and token counts at the ends of steps; nothing here waits for the GPU."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.marks: list[Any] = []
        self.tokens: list[torch.Tensor] = []
        self.first_step_s: float | None = None
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.marks.append(_mark())
        self.tokens.append(torch.as_tensor(self.trainer.tokens_seen).clone())
        if self.first_step_s is None:
            _synchronize()
            self.first_step_s = time.monotonic() - self.started

    def result(self) -> dict[str, float]:
        _synchronize()
        seconds = _seconds_between(self.marks[WARM - 1], self.marks[-1])
        steps = len(self.marks) - WARM
        tokens = int(self.tokens[-1]) - int(self.tokens[WARM - 1])
        return {
            "tokens_per_s": round(tokens / seconds, 1), "step_s": round(seconds / steps, 4),
            "tokens_per_step": round(tokens / steps, 1), "first_step_s": round(self.first_step_s, 1),
        }  # fmt: skip


def _mark() -> Any:
    """This moment on the GPU's own clock, without waiting for it; on a CPU the time."""
    if not ON_GPU:
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(first: Any, last: Any) -> float:
    return first.elapsed_time(last) / 1000 if ON_GPU else last - first


def _synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def measure(case: Case, source: str, seq_len_tokens: int) -> dict[str, Any]:
    """Builds the model, trains a few steps, and returns what was measured."""
    variant = VARIANTS[case.variant]
    if ON_GPU:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (case.limit_gib or 1e9) * BYTES_IN_GIB / total))
    name = f"random:{case.model}" if case.model in SHAPES else case.model
    loaded = models.load_model(ModelConfig(name=name), say=lambda text: None)
    model = loaded.model
    if case.variant == "recipe":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    rank = RANKS.get(case.model, 16)
    model = lora.add_adapters(
        model, AdapterConfig(**{"r": rank, "lora_dropout": 0.0} | variant.get("adapter", {})), seed=0
    )
    settings = DataConfig(
        **{"source": source, "train_rows": 3000, "eval_rows": 8, "seq_len_tokens": seq_len_tokens}
        | variant.get("data", {})
    )
    data = prepare(read_corpus(settings), loaded.tokenizer, settings)
    _synchronize()
    if ON_GPU:
        weights = gib(torch.cuda.memory_allocated())
        torch.cuda.reset_peak_memory_stats()
    steps = {"max_steps": WARM + TIMED, "logging_steps": 1000, "eval_steps": 1000, "save_steps": 1000}
    recompute = {"activation_checkpointing": case.recomputed != 0, "recompute_layers": case.recomputed}
    config = TrainConfig(**steps | recompute | {"micro_batch_size": case.blocks} | variant["train"])
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        training.train(
            model, loaded.tokenizer, data, config, Run(Path(folder)), extra_callbacks=(clock,), show_progress=False
        )
    memory = {}
    if ON_GPU:
        memory = {
            "weights_gib": round(weights, 3),
            "peak_allocated_gib": round(gib(torch.cuda.max_memory_allocated()), 3),
            "peak_reserved_gib": round(gib(torch.cuda.max_memory_reserved()), 3),
        }
    return (
        clock.result()
        | memory
        | {
            "fill": round(data.report.tokens / max(1, len(data.train) * seq_len_tokens), 4) if data.packed else None,
            "mean_row_tokens": round(data.report.tokens / data.report.rows, 1),
            "trained_share": round(data.report.trained_tokens / data.report.tokens, 4),
            "fast_step": repr(clock.trainer.fast).splitlines() if clock.trainer.fast else None,
        }
    )


def matrix_rate() -> float:
    """The machine's own rate at a large product (bfloat16; float32 on a CPU), TFLOP/s: the roof that speeds are a share of."""
    size, often, device = (8192, 30, "cuda") if ON_GPU else (2048, 3, "cpu")
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(often // 3):
        one @ other
    start = _mark()
    for _ in range(often):
        one @ other
    end = _mark()
    _synchronize()
    return often * 2 * size**3 / _seconds_between(start, end) / 1e12


def main() -> None:
    """Measures each case and writes after each, so that a case that fails loses none."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("out", type=Path)
    options.add_argument("cases", nargs="+", type=Case.parse)
    options.add_argument("--data", default="embedded", help="a data file; else the embedded corpus")
    options.add_argument("--seq-len", type=int, default=2048, help="tokens of a block")
    chosen = options.parse_args()
    results: dict[str, Any] = {
        "machine": training.machine_name(torch.device("cuda" if ON_GPU else "cpu")),
        "total_gib": round(gib(torch.cuda.get_device_properties(0).total_memory), 2) if ON_GPU else None,
        "matrix_tflops": round(matrix_rate(), 1), "versions": workflow.versions(), "cases": [],
    }  # fmt: skip
    for case in chosen.cases:
        try:
            found = measure(case, chosen.data, chosen.seq_len)
        except torch.cuda.OutOfMemoryError as error:
            found = {"out_of_memory": str(error).split(". ")[0]}
        except Exception as error:  # one case that fails is a result too
            found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
        torch._dynamo.reset()
        results["cases"].append(vars(case) | found)
        print(json.dumps(vars(case) | found), flush=True)
        chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
