"""What one GPU can't show, on a machine with several: layers spread over them, and copies of the model that share the rows.

    python tests/gpu/several_gpus.py OUT.json [--spread MODEL] [--copied MODEL] [--steps 14]

Each case trains a run of its own through the package, as notebooks and the command line do:
- `spread`: one process, a model whose layers the plan shares out over all GPUs; saved, reloaded, asked.
- `copied`: a copy of the model on every GPU (torchrun), and `alone`: one GPU, as many passes a step. Both see the same blocks.
- `stopped`: copies that a person asks to stop; they save, end, and go on from there.
Memory and speed stand beside what the plan says of these settings. Without GPUs it rehearses the same on the CPU with small models.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COMMON = {
    "train.logging_steps": 1,
    "train.tensorboard": "off",
    "data.test_rows": 4,
    "data.eval_rows": 8,
    "evaluation.max_new_tokens": 20,
    "adapter.lora_dropout": 0.0,
}
SAME_LOSS = 0.005
LIVE = ("starting", "running")


def spread(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One process, the layers over all GPUs."""
    from qlora_helpers import workflow

    more = (
        {"train.compile": "on", "train.activation_checkpointing": True, "train.checkpointed_layers": 30}
        if options.on_gpu
        else {}
    )
    run = workflow.open_run("spread", profile="demo", settings=_settings(options.spread, options) | more, root=root)
    loaded = workflow.load(run)
    model = workflow.add_adapters(run, loaded)
    trained = workflow.train(run, model=model, loaded=loaded, show_progress=False)
    check = workflow.check_reload(run, model, loaded, prompts=2)
    evaluation = workflow.evaluate(run, model=model, loaded=loaded)
    print(loaded, trained, check, evaluation, sep="\n", file=sys.stderr)
    return _told(run) | {
        "weights_gib": loaded.audit.gib_by_device,
        "reload_difference": check.largest_difference,
        "answers": len(evaluation.rows),
    }


def copied(root: Path, options: argparse.Namespace, processes: int | None = None) -> dict[str, Any]:
    """A copy on every GPU; or one GPU alone, which adds up as many passes a step."""
    from qlora_helpers import workflow
    from qlora_helpers.runs import launch

    count = processes or options.gpus
    more = {
        "train.gradient_accumulation_steps": options.gpus // count,
        "train.compile": "on" if options.on_gpu else "off",
        "train.activation_checkpointing": False,
    }
    if options.on_gpu:  # random weights learn so fast at more that 16 bits' rounding grows with every step
        more["train.learning_rate"] = 5e-5
    run = workflow.open_run("copied", profile="demo", settings=_settings(options.copied, options) | more, root=root)
    if count == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    launch.start(run, processes=count)
    _wait(run)
    return _told(run)


def alone(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The same blocks on one GPU."""
    return copied(root, options, processes=1)


def stopped(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Copies that are asked to stop, and go on afterwards."""
    from qlora_helpers import workflow
    from qlora_helpers.runs import launch

    settings = _settings(options.small, options) | {
        "train.max_steps": 400,
        "train.eval_steps": 400,
        "train.save_steps": 400,
    }
    run = workflow.open_run("stopped", profile="demo", settings=settings | {"train.compile": "off"}, root=root)
    launch.start(run, processes=options.gpus)
    _wait(run, until=lambda: len(_losses(run)) >= 5)
    run.request("stop")
    _wait(run)
    status, at = run.status(), len(_losses(run))
    launch.start(run, processes=options.gpus, settings=[f"train.max_steps={at + 5}"])
    _wait(run)
    steps = [line["step"] for line in run.progress() if "loss" in line]
    return {
        "state": status.state,
        "stopped_at": at,
        "exit_reason": status.exit_reason,
        "then": run.status().state,
        "gapless": steps == list(range(1, at + 6)),
        "steps": len(steps),
    }


CASES = {"spread": spread, "copied": copied, "alone": alone, "stopped": stopped}


def _settings(name: str, options: argparse.Namespace) -> dict[str, Any]:
    length, blocks = (1024, 2) if options.on_gpu else (192, 1)
    return COMMON | {
        "model.name": name,
        "data.seq_len_tokens": length,
        "train.micro_batch_size": blocks,
        "train.max_steps": options.steps,
        "train.save_steps": options.steps,
        "train.eval_steps": options.steps,
    }


def _losses(run: Any) -> list[float]:
    return [line["loss"] for line in run.progress() if "loss" in line]


def _told(run: Any) -> dict[str, Any]:
    """What a run wrote of itself."""
    plan = json.loads(run.plan_path.read_text(encoding="utf-8"))
    lines = [line for line in run.progress() if "loss" in line]
    steady = sorted(line["tokens_per_s"] for line in lines[2:] if line.get("tokens_per_s"))
    return {
        "state": run.status().state,
        "losses": [round(line["loss"], 4) for line in lines],
        "tokens_per_s": steady[len(steady) // 2] if steady else None,
        "predicted": plan.get("predicted"),
        "measured": plan.get("measured"),
    }


def _wait(run: Any, until: Any = lambda: False, limit_s: float = 280.0) -> None:
    """Until a run has ended, or something is so; prints its log where that takes too long or it failed."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and run.status().state in LIVE and not until():
        time.sleep(0.5)
    if run.status().state == "failed" or time.monotonic() > end:
        print(run.status(), run.log_path.read_text(encoding="utf-8")[-6000:], sep="\n", file=sys.stderr)
        raise SystemExit(f"{run.name}: {run.status().state}")


def main() -> None:
    """Each case in a process of its own, so that none holds what the next needs; fails where one is off."""
    import torch

    from qlora_helpers import workflow
    from qlora_helpers.training.result import machine_name

    on_gpu = torch.cuda.is_available()
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("out", type=Path)
    options.add_argument("--spread", default="random:falcon-40b" if on_gpu else "random:falcon-tiny")
    options.add_argument("--copied", default="random:llama-3.1-8b" if on_gpu else "random:falcon-tiny")
    options.add_argument("--small", default="random:smollm2-135m" if on_gpu else "random:falcon-tiny")
    options.add_argument("--steps", type=int, default=14)
    options.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    options.add_argument("--one", choices=CASES)
    chosen = options.parse_args()
    chosen.on_gpu, chosen.gpus = on_gpu, torch.cuda.device_count() if on_gpu else 2
    if chosen.one:
        with tempfile.TemporaryDirectory() as root:
            found = CASES[chosen.one](Path(root), chosen)
        chosen.out.write_text(json.dumps(found), encoding="utf-8")
        return
    machine = machine_name(torch.device("cuda" if on_gpu else "cpu"))
    results: dict[str, Any] = {"machine": machine, "gpus": chosen.gpus, "versions": workflow.versions()}
    for name in chosen.cases:
        started = time.monotonic()
        with tempfile.NamedTemporaryFile(suffix=".json") as answer:
            command = [sys.executable, __file__, answer.name, "--one", name, "--steps", str(chosen.steps)]
            command += ["--spread", chosen.spread, "--copied", chosen.copied, "--small", chosen.small]
            code = subprocess.run(command, stdout=sys.stderr).returncode
            text = Path(answer.name).read_text(encoding="utf-8")
        found = json.loads(text) if text else {"failed": code}
        results[name] = found | {"seconds_in_all": round(time.monotonic() - started, 1)}
        print(name, json.dumps(results[name])[:1500], flush=True)
        chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    failed = _failed(results, chosen.steps)
    print("failed: " + ", ".join(failed) if failed else "as it should be")
    sys.exit(bool(failed))


def _failed(results: dict[str, Any], steps: int) -> list[str]:
    """What is not as it should be."""
    failed = []
    for name in ("spread", "copied", "alone"):
        found = results.get(name)
        if found is None:
            continue
        losses = found.get("losses", [])
        if found.get("state") != "finished" or len(losses) != steps:
            failed.append(f"{name}: did not train to its end")
        elif name == "spread" and losses[-1] >= losses[0]:
            failed.append("spread: its loss did not fall")
    if results.get("spread", {}).get("reload_difference", 0) > 1e-3:
        failed.append("spread: the adapter that was saved answers otherwise")
    if "copied" in results and "alone" not in results:
        failed.append("copied: nothing to compare its losses with (--cases copied alone)")
    pair = [results.get(name, {}).get("losses") for name in ("copied", "alone")]
    if all(pair) and max(abs(one - other) / other for one, other in zip(*pair, strict=True)) > SAME_LOSS:
        failed.append("copied: its losses are not those of one GPU that sees the same blocks")
    found = results.get("stopped")
    if found is not None and (found.get("state"), found.get("then"), found.get("gapless")) != (
        "stopped",
        "finished",
        True,
    ):
        failed.append("stopped: it did not save, end and go on")
    return failed


if __name__ == "__main__":
    main()
