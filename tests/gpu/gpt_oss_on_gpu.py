"""gpt-oss at true size from MXFP4 files on one CUDA GPU: load, train, save, reload, certify, merge, and compare the merged model.

    python tests/gpu/gpt_oss_on_gpu.py OUT.json [--layers 24] [--experts 32] [--load-gib 14] [--train-gib 24]

The checkpoint has random weights in the files' own form: 4-bit values with a scale for each 32 of them in the experts, bfloat16
elsewhere. Both limits are enforced on all that the process takes: 1 GiB of them is left to CUDA's context. `--hidden 64` and a few
layers try the script on a CPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from qlora_helpers import workflow
from qlora_helpers.base.units import gib
from qlora_helpers.model.shapes.catalog import SHAPES

ON_GPU = torch.cuda.is_available()
CONTEXT_GIB = 1.0
STACKS = ("experts.gate_up_proj", "experts.down_proj")


def checkpoint(folder: Path, config: Any) -> float:
    """Writes the random checkpoint, a file a layer, and returns its size in GiB."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.save_pretrained(folder)
    shape = json.loads((folder / "config.json").read_text())
    shape |= {
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    }
    shape["architectures"] = ["GptOssForCausalLM"]
    (folder / "config.json").write_text(json.dumps(shape))
    device, files = "cuda" if ON_GPU else "cpu", {}
    generator = torch.Generator(device).manual_seed(0)
    by_file: dict[str, dict[str, Any]] = {}
    for name, value in model.state_dict().items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        by_file.setdefault(f"model-{part}.safetensors", {})[name] = value
    for file, tensors in by_file.items():
        made = {}
        for name, value in tensors.items():
            if name.endswith(STACKS):
                packed = (value.shape[0], value.shape[2], value.shape[1] // 32, 16)
                made[f"{name}_blocks"] = torch.randint(
                    0, 256, packed, dtype=torch.uint8, device=device, generator=generator
                )
                made[f"{name}_scales"] = torch.randint(
                    118, 121, packed[:-1], dtype=torch.uint8, device=device, generator=generator
                )
            elif name.endswith("norm.weight"):
                made[name] = torch.ones(value.shape, dtype=torch.bfloat16)
            else:
                made[name] = (torch.randn(value.shape, device=device, generator=generator) * 0.02).bfloat16()
        save_file(
            {name: each.cpu().contiguous() for name, each in made.items()}, folder / file, metadata={"format": "pt"}
        )
        files |= dict.fromkeys(made, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return gib(sum(each.stat().st_size for each in folder.iterdir()))


def limit(limit_gib: float) -> None:
    """Lets PyTorch reserve no more, and forgets earlier peaks."""
    if ON_GPU:
        total = gib(torch.cuda.get_device_properties(0).total_memory)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (limit_gib - CONTEXT_GIB) / total))
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    """Peaks since the limit was set, GiB; what the card itself says is taken, with the context."""
    if not ON_GPU:
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_allocated_gib": round(gib(torch.cuda.max_memory_allocated()), 3),
        "peak_reserved_gib": round(gib(torch.cuda.max_memory_reserved()), 3),
        "outside_gib": round(gib(total - free - torch.cuda.memory_reserved()), 3),
    }


def main() -> None:
    """Goes down the path; what was measured is written after each stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=2880)
    parser.add_argument("--load-gib", type=float, default=14.0)
    parser.add_argument("--train-gib", type=float, default=24.0)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-merge", action="store_true")
    options = parser.parse_args()
    found: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if ON_GPU else "CPU",
        "versions": workflow.versions(),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
    }

    def keep(stage: str, started: float, **more: Any) -> None:
        found[stage] = {"seconds": round(time.monotonic() - started, 1)} | more
        print(stage, found[stage], flush=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as root:
        go_down(options, Path(root), keep)


def go_down(options: argparse.Namespace, root: Path, keep: Any) -> None:
    """Every stage, in one process."""
    from transformers import AutoConfig

    shape = dict(SHAPES["gpt-oss-20b"])
    shape |= {"num_hidden_layers": options.layers, "num_local_experts": options.experts, "hidden_size": options.hidden}
    shape |= {"layer_types": ["sliding_attention", "full_attention"] * (options.layers // 2)}
    shape |= {"intermediate_size": options.hidden}
    kind = shape.pop("model_type")
    folder = root / "checkpoint"
    folder.mkdir()
    started = time.monotonic()
    size = checkpoint(folder, AutoConfig.for_model(kind, **shape))
    write_tokenizer(folder)
    if ON_GPU:
        torch.cuda.empty_cache()
    keep("checkpoint", started, gib=round(size, 2))
    settings = {
        "model.name": str(folder),
        "data.seq_len_tokens": 2048,
        "train.max_steps": options.steps,
        "train.micro_batch_size": options.blocks,
        "train.activation_checkpointing": True,
        "train.learning_rate": 2e-4,
        "train.eval_steps": options.steps,
        "train.save_steps": options.steps,
        "train.cuda_graph": ON_GPU,
        "data.test_rows": 4,
    }
    run = workflow.open_run("gpt-oss", profile="demo", settings=settings, root=root)
    limit(options.load_gib)
    started = time.monotonic()
    loaded = workflow.load(run)
    keep("load", started, audit=str(loaded.audit).splitlines(), weights_gib=loaded.audit.gib_by_device, **peaks())
    limit(options.train_gib)
    started = time.monotonic()
    model = workflow.add_adapters(run, loaded)
    trained = workflow.train(run, model=model, loaded=loaded, show_progress=False)
    progress = [line for line in run.progress() if "loss" in line]
    keep(
        "train",
        started,
        steps=trained.steps,
        result=str(trained).splitlines(),
        losses=[progress[0]["loss"], progress[-1]["loss"]],
        tokens_per_s=progress[-1].get("tokens_per_s"),
        **peaks(),
    )
    limit(2 * options.train_gib)  # two models
    started = time.monotonic()
    check = workflow.check_reload(run, model, loaded, prompts=2)
    keep("reload", started, passed=check.passed, largest_difference=check.largest_difference)
    if not options.no_merge:
        del model, loaded
        if ON_GPU:
            limit(140)
            torch.cuda.empty_cache()
        started = time.monotonic()
        report = workflow.export_run(run, drift=ON_GPU)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        keep("merge", started, report=str(report).splitlines(), host_peak_gib=round(resident, 1))
    shutil.rmtree(run.folder / "export", ignore_errors=True)


def write_tokenizer(folder: Path) -> None:
    """The package's own small tokenizer."""
    from qlora_helpers.model.checkpoints import corpus_tokenizer

    corpus_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
