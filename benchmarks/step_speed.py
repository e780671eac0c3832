"""How fast a training step is and what it holds, on one machine: the recipe as published, other trainers, and ours.

    python benchmarks/step_speed.py OUT.json MODEL:VARIANT[:BLOCKS[:RECOMPUTED[:LIMIT_GIB]]] ... [--data F --seq-len N --profile]

    python benchmarks/step_speed.py out.json falcon-40b:recipe falcon-40b:fast:3/2:0:79 llama-3.1-8b:trl:6/4:0:79

Models are catalogued shapes at true size with random weights (`NAME@24`: 24 of the layers), or any name that the package loads;
rows are the embedded corpus (or `--data`); data loader, optimizer and steps are those of `transformers.Trainer`. Each case runs in
a process of its own, one after another (`--together`: in one process; put ours first, since other trainers change transformers for
good). Rows are padded where the model can't take packed ones. `3/2` tries three blocks and takes two where they do not fit. The
clock is CUDA's own, read at each step's end without waiting; the first steps are left out. Tokens are those that are not padding.
The limit is enforced on what is reserved. All cases of a call see the same card, so their ratios hold. Without a GPU the same runs
on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
import unittest.mock
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from records import EXPERT_TARGETS, shape_of
from transformers import TrainerCallback

from qlora_helpers import workflow
from qlora_helpers.base.config import AdapterConfig, DataConfig, ModelConfig, TrainConfig
from qlora_helpers.base.units import BYTES_IN_GIB, gib
from qlora_helpers.data.prepare import prepare
from qlora_helpers.data.sources import read_corpus
from qlora_helpers.model import loading, lora
from qlora_helpers.model.allocator import segments_expand, use_expandable_segments
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.runs.folder import Run
from qlora_helpers.training import fp8_proof, row_isolation, train
from qlora_helpers.training.fast_step import matmuls
from qlora_helpers.training.result import machine_name

ON_GPU = torch.cuda.is_available()
RANKS = {"falcon-7b": 8, "falcon-40b": 8, "falcon-tiny": 8}
WARM, TIMED, PROFILED = 3, 5, 2
PEERS = ("trl", "trl_liger", "unsloth")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    model: str
    variant: str
    blocks: int = 1
    checkpointed: int | None = None
    limit_gib: float | None = None

    @classmethod
    def parse(cls, text: str) -> list[Case]:
        """The case, with several micro-batches from the largest on."""
        model, variant, *rest = text.split(":")
        blocks, checkpointed, limit = (*rest, "", "", "")[:3]
        again = None if checkpointed in ("", "all") else int(checkpointed)
        return [
            cls(model, variant, int(each), again, float(limit) if limit else None)
            for each in (blocks or "1").split("/")
        ]

    @property
    def rank(self) -> int:
        return RANKS.get(self.model, 16)


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "recipe": {
        "data": {"packing": False, "loss_on": "all"},
        "adapter": {"lora_dropout": 0.05},
        "train": {"fast_step": False, "micro_batch_size": 8},
    },
    "plain": {"train": {"fast_step": False}},
    "eager": {"train": {"compile": "off", "cuda_graph": False}},
    "launched": {"train": {"compile": "on", "cuda_graph": False}},
    "captured": {"train": {"compile": "off"}},
    "fast": {"train": {"compile": "on"}},
    "remade": {"train": {"compile": "on"}},
    "fast_host": {"train": {"compile": "on", "offload_embeddings": True}},
    "fast_all": {"train": {"compile": "on"}, "data": {"loss_on": "all"}},
    "fast_host_all": {"train": {"compile": "on", "offload_embeddings": True}, "data": {"loss_on": "all"}},
    "dropout": {"train": {"compile": "on"}, "adapter": {"lora_dropout": 0.05}},
    "dora": {"train": {"compile": "off"}, "adapter": {"use_dora": True}},
    "fp8": {"train": {"compile": "on", "matmul_dtype": "fp8"}},
    "fp8_host": {"train": {"compile": "on", "matmul_dtype": "fp8", "offload_embeddings": True}},
    "fast_experts": {
        "train": {"compile": "on"},
        "adapter": {"target_modules": EXPERT_TARGETS},
    },
    "fast_inputs": {"train": {"compile": "on", "offload_embeddings": True, "offload_checkpoints": True}},
    "fp8_inputs": {
        "train": {"compile": "on", "matmul_dtype": "fp8", "offload_embeddings": True, "offload_checkpoints": True}
    },
    "fp8_inputs_all": {
        "train": {"compile": "on", "matmul_dtype": "fp8", "offload_embeddings": True, "offload_checkpoints": True},
        "data": {"loss_on": "all"},
    },
    "fp8_host_all": {
        "train": {"compile": "on", "matmul_dtype": "fp8", "offload_embeddings": True},
        "data": {"loss_on": "all"},
    },
    "fp8_all": {"train": {"compile": "on", "matmul_dtype": "fp8"}, "data": {"loss_on": "all"}},
    "auto": {"train": {"matmul_dtype": "auto"}},
}
"""What differs from our defaults without dropout: the 2023 recipe, packing alone, the fast step neither compiled nor recorded,
compiled alone, recorded alone, both, both with recomputed layers that make every product again, both with the input embedding in
the host's memory, with adapters on a mixture's experts, with the inputs of checkpointed layers in the host's memory too, with a
loss on all tokens, with dropout, with DoRA, in FP8 (also with embedding and inputs in the host's memory, and with a loss on all
tokens), and as planned. All but those in FP8 and as planned multiply in bfloat16."""


class Clock(TrainerCallback):
    """CUDA events and token counts at the ends of steps; nothing here waits for the GPU."""

    def __init__(self, tokens_seen: Any = None) -> None:
        self.trainer: Any = None
        self.tokens_seen = tokens_seen or (lambda: self.trainer.tokens_seen)
        self.marks: list[Any] = []
        self.tokens: list[torch.Tensor] = []
        self.first_step_s: float | None = None
        self.outside_gib = 0.0
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.marks.append(_mark())
        self.tokens.append(torch.as_tensor(self.tokens_seen()).clone())
        if self.first_step_s is None:
            _synchronize()
            self.first_step_s = time.monotonic() - self.started
        if ON_GPU and state.global_step == WARM + TIMED:
            free, total = torch.cuda.mem_get_info()
            self.outside_gib = gib(total - free - torch.cuda.memory_reserved())
        control.should_evaluate = control.should_save = False  # the last step would ask for both

    def result(self) -> dict[str, float]:
        _synchronize()
        last = WARM + TIMED - 1
        seconds = _seconds_between(self.marks[WARM - 1], self.marks[last])
        tokens, steps = int(self.tokens[last]) - int(self.tokens[WARM - 1]), TIMED
        return {
            "tokens_per_s": round(tokens / seconds, 1),
            "step_s": round(seconds / steps, 4),
            "tokens_per_step": round(tokens / steps, 1),
            "first_step_s": round(self.first_step_s, 1),
            "outside_gib": round(self.outside_gib, 3),
        }


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


class Profile(TrainerCallback):
    """GPU kernels of the steps after the timed ones, by kind and by name."""

    def __init__(self) -> None:
        self.profiler: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM + TIMED:
            _synchronize()
            activities = [torch.profiler.ProfilerActivity.CUDA] if ON_GPU else None
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()
        elif state.global_step == WARM + TIMED + PROFILED:
            _synchronize()
            self.profiler.stop()

    def result(self) -> dict[str, Any]:
        """Milliseconds a step."""
        kinds: dict[str, float] = {}
        kernels = []
        for event in self.profiler.key_averages():
            ms = (event.self_device_time_total if ON_GPU else event.self_cpu_time_total) / 1000 / PROFILED
            kind = next(
                (kind for kind, parts in KERNELS.items() if any(part in event.key.lower() for part in parts)), "other"
            )
            kinds[kind] = kinds.get(kind, 0) + ms
            kernels.append((round(ms, 2), event.count // PROFILED, event.key[:120]))
        return {
            "ms_by_kind": {kind: round(ms, 1) for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])},
            "largest": sorted(kernels, reverse=True)[:25],
        }


KERNELS = {
    "dequantisation": ("dequant",),
    "attention": ("flash", "fmha", "attention"),
    "compiled": ("triton_",),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "addmm", "aten::mm"),
    "copies": ("memcpy", "memset"),
}


def measure(case: Case, source: str, seq_len_tokens: int, profile: bool, *, rows: int = 3000) -> dict[str, Any]:
    """Builds the model, trains a few steps, and returns what was measured."""
    set_limit(case)
    catalogue(case.model)
    if case.variant in PEERS:
        from step_speed_peers import measure_peer

        return measure_peer(case, source, seq_len_tokens)
    variant = VARIANTS[case.variant]
    name = f"random:{case.model}" if case.model in SHAPES else case.model
    started = time.monotonic()
    loaded = loading.load_model(ModelConfig(name=name), say=lambda text: None)
    _synchronize()
    load_s = time.monotonic() - started
    model = loaded.model
    if case.variant == "recipe":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = lora.add_adapters(
        model, AdapterConfig(**{"r": case.rank, "lora_dropout": 0.0} | variant.get("adapter", {})), seed=0
    )
    refusal = row_isolation.packing_refusal(model, seq_len_tokens, case.blocks)
    as_rows = {"packing": False} if refusal else {}
    settings = data_settings(source, seq_len_tokens, train_rows=rows, **variant.get("data", {}) | as_rows)
    started = time.monotonic()
    data = prepare(read_corpus(settings), loaded.tokenizer, settings)
    prepared_s = time.monotonic() - started
    weights = weights_held()
    steps = {"max_steps": WARM + TIMED + (PROFILED if profile else 0)}
    steps |= {"logging_steps": 1000, "eval_steps": 1000, "save_steps": 1000, "matmul_dtype": "bfloat16"}
    recompute = {"activation_checkpointing": case.checkpointed != 0, "checkpointed_layers": case.checkpointed}
    config = TrainConfig(**steps | recompute | {"micro_batch_size": case.blocks} | variant.get("train", {}))
    clock, profiled = Clock(), [Profile()] if profile else []
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, given: lengths.append(given["input_ids"].shape[1] * module.training), with_kwargs=True
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        every_matmul() if case.variant == "remade" else contextlib.nullcontext(),
        whatever_the_proof_finds(),
    ):
        train.train(
            model,
            loaded.tokenizer,
            data,
            config,
            Run(Path(folder)),
            extra_callbacks=(clock, *profiled),
            show_progress=False,
        )
    fast = clock.trainer.fast
    return (
        clock.result()
        | memory_held(weights)
        | {
            "load_s": round(load_s, 1),
            "prepared_s": round(prepared_s, 2),
            "fill": round(data.report.tokens / max(1, len(data.train) * seq_len_tokens), 4) if data.packed else None,
            "padded": refusal,
            "longest_row_tokens": max(lengths),
            "mean_row_tokens": round(data.report.tokens / data.report.rows, 1),
            "trained_share": round(data.report.trained_tokens / data.report.tokens, 4),
            "compiled": bool(fast and fast.compiled),
            "fp8": bool(fast and fast.is_on("fp8")),
            "fp8_proof": fast.fp8.proof if fast and fast.fp8 else None,
            "captured": bool(fast and fast.graphs and fast.graphs.replayed),
            "passes_replayed": fast.graphs.replayed if fast and fast.graphs else 0,
            "capture_s": round(fast.graphs.capture_s, 2) if fast and fast.graphs else None,
            "offloaded": bool(fast and fast.offloaded),
            "layers_checkpointed": fast.checkpointed if fast else _checkpointed_by_trainer(case, model),
            "dropout": model.active_peft_config.lora_dropout > 0,
            "dora": model.active_peft_config.use_dora,
            "plain": fast is None,
            "fast_step": repr(fast).splitlines() if fast else None,
        }
        | ({"profile": profiled[0].result()} if profile else {})
    )


@contextlib.contextmanager
def whatever_the_proof_finds() -> Any:
    """While open, FP8 is not refused for losses and gradients: random weights amplify any rounding."""
    with (
        unittest.mock.patch.object(fp8_proof, "LOSS_ERROR", 1e9),
        unittest.mock.patch.object(fp8_proof, "GRADIENT_ERROR", 1e9),
    ):
        yield


def every_matmul() -> Any:
    """While open, layers that recompute leave nothing out."""
    return unittest.mock.patch.object(matmuls, "added_to_residual", return_value=())


def _checkpointed_by_trainer(case: Case, model: torch.nn.Module) -> int | None:
    """Decoder layers that recompute in the plain step; None for the recipe, whose batches differ in length."""
    if case.variant == "recipe":
        return None
    return 0 if case.checkpointed == 0 else model.config.get_text_config().num_hidden_layers


def catalogue(name: str) -> None:
    """Makes a catalogued model with fewer layers loadable under its name."""
    if "@" in name:
        SHAPES[name] = shape_of(name)


def data_settings(source: str, seq_len_tokens: int, **more: Any) -> DataConfig:
    """The rows that every trainer gets."""
    return DataConfig(
        **{"source": source, "template": "recipe", "train_rows": 3000, "eval_rows": 8, "test_rows": 8}
        | {"seq_len_tokens": seq_len_tokens}
        | more
    )


def set_limit(case: Case) -> None:
    """Lets PyTorch reserve no more than the case's share of the card."""
    if ON_GPU:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (case.limit_gib or 1e9) * BYTES_IN_GIB / total))


def weights_held() -> float:
    """GiB held before training; the peak is counted from here."""
    _synchronize()
    if not ON_GPU:
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return gib(torch.cuda.memory_allocated())


def memory_held(weights: float) -> dict[str, float | bool]:
    """The peaks of a training, GiB."""
    if not ON_GPU:
        return {}
    return {
        "weights_gib": round(weights, 3),
        "peak_allocated_gib": round(gib(torch.cuda.max_memory_allocated()), 3),
        "peak_reserved_gib": round(gib(torch.cuda.max_memory_reserved()), 3),
        "segments_expand": segments_expand(),
    }


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


def in_a_process(case: Case | str, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one case in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        command = [
            sys.executable,
            __file__,
            answer.name,
            "--one",
            json.dumps(case if isinstance(case, str) else dataclasses.asdict(case)),
        ]
        command += ["--data", options.data, "--seq-len", str(options.seq_len)] + ["--profile"] * options.profile
        try:
            ended = f"the process ended with {subprocess.run(command, stdout=sys.stderr, timeout=options.timeout).returncode}"
        except subprocess.TimeoutExpired:
            ended = f"took longer than {options.timeout:.0f} s"
        text = Path(answer.name).read_text(encoding="utf-8")
    return json.loads(text) if text else {"error": ended}


def one(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """What `in_a_process` runs."""
    started = time.monotonic()
    try:
        found = measure(case, options.data, options.seq_len, options.profile)
    except torch.cuda.OutOfMemoryError as error:
        found = {"out_of_memory": str(error).split(" If reserved")[0][:500]}
    except Exception as error:  # one case that fails is a result too
        import traceback

        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    torch._dynamo.reset()
    return found | {"seconds_in_all": round(time.monotonic() - started, 1)}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "machine": machine_name(torch.device("cuda" if ON_GPU else "cpu")),
        "total_gib": round(gib(torch.cuda.get_device_properties(0).total_memory), 2) if ON_GPU else None,
        "matrix_tflops": round(matrix_rate(), 1),
        "versions": workflow.versions() | peer_versions(),
    }


def peer_versions() -> dict[str, str]:
    """Versions of the other trainers, those that are installed."""
    found = {}
    for name in ("trl", "liger-kernel", "unsloth"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main() -> None:
    """Measures each case and writes after each, so that a case that fails loses none."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("out", type=Path)
    options.add_argument("cases", nargs="*", type=Case.parse)
    options.add_argument("--data", default="embedded", help="a data file; else the embedded corpus")
    options.add_argument("--seq-len", type=int, default=2048, help="tokens of a block")
    options.add_argument("--profile", action="store_true", help="also list the kernels of two steps")
    options.add_argument("--together", action="store_true", help="all cases in one process, which saves its start")
    options.add_argument("--timeout", type=float, default=600, help="seconds for a case")
    options.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.one is not None:
        found = machine() if chosen.one == "machine" else one(Case(**chosen.one), chosen)
        chosen.out.write_text(json.dumps(found), encoding="utf-8")
        return
    use_expandable_segments()  # as our own loader does, for every trainer alike
    results = (machine() if chosen.together else in_a_process("machine", chosen)) | {"cases": []}
    peers: list[str] = []  # that ran in this process before: their changes to transformers stay
    for sizes in chosen.cases:
        for case in sizes:
            found = (one if chosen.together else in_a_process)(case, chosen)
            line = dataclasses.asdict(case) | {"r": case.rank, "seq_len_tokens": chosen.seq_len}
            line |= {"data": Path(chosen.data).stem} | found | ({"after": list(peers)} if peers else {})
            if chosen.together and case.variant in PEERS and case.variant not in peers:
                peers.append(case.variant)
            results["cases"].append(line)
            print(json.dumps({key: value for key, value in line.items() if key != "fast_step"}), flush=True)
            chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            if "step_s" in found:
                break


if __name__ == "__main__":
    main()
