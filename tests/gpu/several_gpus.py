"""Every way in which several GPUs train together, on a machine with as many as it has: one JSON with a table.

    python tests/gpu/several_gpus.py OUT.json [--model MODEL] [--small MODEL] [--steps 14] [--cases ...]

Each case trains a run of its own through the package, as notebooks and the command line do, in processes of its own:
- `one`: one GPU alone, with as many passes a step as there are GPUs; all other ways see the same sequences.
- `copies`, `shards`, `copies of shards` (two machines are pretended; four GPUs or more), `spread` (one process, all GPUs).
- `killed`: shards, of which one process is killed; the run goes on, and ends with the losses of `shards`.
- `fewer`: what two steps of shards have learned goes on on one GPU, in the same order of the data.
- `stopped`: shards that are asked to stop; they save, end, and go on.
- `full`: one process of the shards runs out of memory; all learn of it, the first one reports.
- `evaluated`: the shards' adapter answers the held-out rows in as many processes, and is exported.
Losses stand beside those of one GPU, GiB of every process and tokens/s beside what the plan says of these settings. Without GPUs it
rehearses the same in two processes (`--processes`) on the CPU with small models.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMON = {
    "train.logging_steps": 1,
    "train.tensorboard": "off",
    "train.lr_scheduler_type": "constant",
    "data.test_rows": 4,
    "data.eval_rows": 8,
    "evaluation.max_new_tokens": 20,
    "evaluation.few_shot": 0,
    "adapter.lora_dropout": 0.0,
}
SAME_LOSS = 0.005
LIVE = ("starting", "running")
WAYS = ("one", "copies", "shards", "copies of shards", "spread")
KILL_AFTER = 3  # steps
MEMORY_RUNS_OUT = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from out_of_memory import exhausted_at
from qlora_helpers import workflow
from qlora_helpers.base.errors import UserError
run = workflow.existing_run({name!r}, root=Path({root!r}))
loaded = workflow.load(run)
model = workflow.add_adapters(run, loaded)
try:
    if os.environ["RANK"] == {rank!r}:
        with exhausted_at("backward", model, after=2):
            workflow.train(run, model=model, loaded=loaded, show_progress=False)
    else:
        workflow.train(run, model=model, loaded=loaded, show_progress=False)
except UserError as error:
    print(f"error: {{error}}", file=sys.stderr)
    sys.exit(2)
"""


class Case:
    """What a case needs: where its runs are, and what was asked for on the command line."""

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        self.root, self.options = root, options

    def run(self, name: str, settings: dict[str, Any]) -> Any:
        """Opens a run, or the one of an earlier part of the case."""
        from qlora_helpers import workflow

        return workflow.open_run(name, profile="demo", settings=_settings(self.options) | settings, root=self.root)

    def train(self, run: Any, processes: int, *, machines: int = 1, **environment: str) -> int:
        """Trains a run in so many processes until they have ended; returns the exit code."""
        from qlora_helpers.runs import launch

        if machines > 1:
            return _on_pretended_machines(launch.train_command(run), processes, machines)
        command = launch.train_command(run, processes=processes)
        return subprocess.run(command, env=_environment() | environment, stdout=sys.stderr).returncode


def way(case: Case, share: str, *, name: str | None = None, steps: int | None = None) -> Any:
    """Trains one of `WAYS`, or a part of it; returns the run."""
    gpus = case.options.gpus
    alone = share in ("one", "spread")
    settings: dict[str, Any] = {
        "train.share": share if share != "one" or case.options.on_gpu else "auto",
        "train.gradient_accumulation_steps": gpus if alone else 1,
    }
    if steps is not None:
        settings["train.max_steps"] = steps
    if share == "spread" and not case.options.on_gpu:
        settings["train.share"] = "auto"
    run = case.run(name or share.replace(" ", "-"), settings)
    seen = {"CUDA_VISIBLE_DEVICES": "0"} if share == "one" and case.options.on_gpu else {}
    machines = 2 if share == "copies of shards" else 1
    code = case.train(run, 1 if alone else gpus, machines=machines, **seen)
    if code:
        print(run.status(), file=sys.stderr)
    return run


def trained(share: str) -> Callable[[Case], dict[str, Any]]:
    """Returns the case of one of `WAYS`."""
    return lambda case: _told(way(case, share))


def killed(case: Case) -> dict[str, Any]:
    """Shards, of which the last process is killed after some steps; they go on from the last checkpoint."""
    run = case.run("killed", {"train.share": "shards", "train.save_steps": 2})
    process = _started(case, run)
    _wait_for(run, KILL_AFTER)
    victim = max(_ranks(process.pid))
    os.kill(victim, 9)
    code = process.wait()
    said = run.status()
    run = way(case, "shards", name="killed")
    return _told(run) | {"code": code, "reported": said.last_error, "state_then": said.state}


def fewer(case: Case) -> dict[str, Any]:
    """Half of the steps with shards, and the others on one GPU."""
    half = case.options.steps // 2
    run = way(case, "shards", name="fewer", steps=half)
    run.change_config(run.config().with_settings({"train.max_steps": case.options.steps}))
    seen = {"CUDA_VISIBLE_DEVICES": "0"} if case.options.on_gpu else {}
    case.train(run, 1, **seen)
    return _told(run)


def stopped(case: Case) -> dict[str, Any]:
    """Shards that a person asks to stop, and that go on afterwards."""
    run = case.run("stopped", {"train.share": "shards", "train.max_steps": 400, "train.save_steps": 400})
    process = _started(case, run)
    _wait_for(run, KILL_AFTER)
    run.request("stop")
    code = process.wait()
    first, at = run.status(), run.status().step
    run.change_config(run.config().with_settings({"train.max_steps": at + 3}))
    case.train(run, case.options.gpus)
    steps = [line["step"] for line in run.progress() if "loss" in line]
    return {
        "code": code,
        "state": run.status().state,
        "stopped": first.state,
        "exit_reason": first.exit_reason,
        "gapless": steps == list(range(1, at + 4)),
    }


def full(case: Case) -> dict[str, Any]:
    """Shards, of which the last process runs out of memory."""
    from qlora_helpers.runs.ranks import run_ranks

    run, last = case.run("full", {"train.share": "shards"}), str(case.options.gpus - 1)
    script = MEMORY_RUNS_OUT.format(tests=str(Path(__file__).parents[1]), name=run.name, root=str(case.root), rank=last)
    started = time.monotonic()
    code = run_ranks([sys.executable, "-c", script], case.options.gpus)
    status = run.status()
    return {
        "code": code,
        "seconds": round(time.monotonic() - started, 1),
        "state": status.state,
        "exit_reason": status.exit_reason,
        "last_error": status.last_error,
        "next": (json.loads(run.plan_path.read_text(encoding="utf-8")).get("out_of_memory") or {}).get("next"),
    }


def evaluated(case: Case) -> dict[str, Any]:
    """Trains shards, asks them in as many processes, and exports the adapter."""
    from qlora_helpers.base.python import python_command

    run = way(case, "shards", name="evaluated")
    place = str(run.folder)
    command = python_command("qlora_helpers", "evaluate", place, "--processes", str(case.options.gpus))
    code = subprocess.run(command, env=_environment(), stdout=sys.stderr).returncode
    export = subprocess.run(
        python_command("qlora_helpers", "export", place, "--no-merge", "--no-drift"),
        env=_environment(),
        stdout=sys.stderr,
    ).returncode
    found = json.loads(run.evaluation_path.read_text(encoding="utf-8")) if run.evaluation_path.exists() else {}
    return _told(run) | {
        "evaluate": code,
        "export": export,
        "rows": len(found.get("rows", ())),
        "form": found.get("form"),
    }


CASES: dict[str, Callable[[Case], dict[str, Any]]] = {share: trained(share) for share in WAYS} | {
    "killed": killed,
    "fewer": fewer,
    "stopped": stopped,
    "full": full,
    "evaluated": evaluated,
}


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    length, sequences = (1024, 2) if options.on_gpu else (192, 1)
    found: dict[str, Any] = COMMON | {
        "model.name": options.model,
        "data.seq_len_tokens": length,
        "train.micro_batch_size": sequences,
        "train.max_steps": options.steps,
        "train.save_steps": options.steps,
        "train.eval_steps": options.steps,
    }
    if options.on_gpu:  # random weights learn so fast at more that 16 bits' rounding grows with every step
        found["train.learning_rate"] = 5e-5
    return found


def _environment() -> dict[str, str]:
    from qlora_helpers.base.python import python_environment

    return python_environment() | {"PYTHONUNBUFFERED": "1"}


def _started(case: Case, run: Any) -> subprocess.Popen[bytes]:
    from qlora_helpers.runs import launch

    command = launch.train_command(run, processes=case.options.gpus)
    return subprocess.Popen(command, env=_environment(), stdout=sys.stderr)


def _ranks(launcher: int) -> list[int]:
    """The processes that a launcher started."""
    import psutil

    return [child.pid for child in psutil.Process(launcher).children()]


def _on_pretended_machines(command: list[str], processes: int, machines: int) -> int:
    """Starts the processes as on several machines: each pretended one has its part of the GPUs."""
    from qlora_helpers.runs import ranks

    own, here = ranks.rank_environment, processes // machines

    def environment(rank: int, *more: Any) -> dict[str, str]:
        return own(rank, *more) | {"LOCAL_WORLD_SIZE": str(here)}  # LOCAL_RANK stays: there is one machine's GPUs

    ranks.rank_environment = environment
    try:
        return ranks.run_ranks(command, processes)
    finally:
        ranks.rank_environment = own


def _wait_for(run: Any, steps: int, limit_s: float = 400.0) -> None:
    until = time.monotonic() + limit_s
    while time.monotonic() < until and len([line for line in run.progress() if "loss" in line]) < steps:
        time.sleep(0.2)


def _told(run: Any) -> dict[str, Any]:
    """What a run wrote of itself."""
    plan = json.loads(run.plan_path.read_text(encoding="utf-8")) if run.plan_path.exists() else {}
    lines = {line["step"]: line for line in run.progress() if "loss" in line}
    steady = sorted(line["tokens_per_s"] for step, line in lines.items() if step > 2 and line.get("tokens_per_s"))
    certificate = run.adapter_dir / "certificate.json"
    return {
        "state": run.status().state,
        "losses": [round(lines[step]["loss"], 4) for step in sorted(lines)],
        "tokens_per_s": steady[len(steady) // 2] if steady else None,
        "certified": certificate.exists() and json.loads(certificate.read_text(encoding="utf-8"))["passed"],
        "predicted": plan.get("predicted"),
        "measured": plan.get("measured"),
    }


def main() -> None:
    """Each case in a process of its own, so that none holds what the next needs; fails where one is off."""
    import torch

    from qlora_helpers import workflow
    from qlora_helpers.training.result import machine_name

    on_gpu = torch.cuda.is_available()
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("out", type=Path)
    options.add_argument("--model", default="random:llama-3.1-8b" if on_gpu else "random:falcon-tiny")
    options.add_argument("--steps", type=int, default=14)
    options.add_argument("--processes", type=int, default=torch.cuda.device_count() if on_gpu else 2)
    options.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    options.add_argument("--one", choices=CASES)
    chosen = options.parse_args()
    chosen.on_gpu, chosen.gpus = on_gpu, chosen.processes
    if chosen.one:
        with tempfile.TemporaryDirectory() as root:
            found = CASES[chosen.one](Case(Path(root), chosen))
        chosen.out.write_text(json.dumps(found), encoding="utf-8")
        return
    machine = machine_name(torch.device("cuda" if on_gpu else "cpu"))
    results: dict[str, Any] = {"machine": machine, "gpus": chosen.gpus, "model": chosen.model}
    results["versions"] = workflow.versions()
    for name in chosen.cases:
        if name == "copies of shards" and (chosen.gpus < 4 or chosen.gpus % 2):
            results[name] = {"left_out": f"it takes an even number of at least 4 processes, not {chosen.gpus}"}
            continue
        started = time.monotonic()
        with tempfile.NamedTemporaryFile(suffix=".json") as answer:
            command = [sys.executable, __file__, answer.name, "--one", name, "--steps", str(chosen.steps)]
            command += ["--model", chosen.model, "--processes", str(chosen.gpus)]
            code = subprocess.run(command, stdout=sys.stderr).returncode
            text = Path(answer.name).read_text(encoding="utf-8")
        found = json.loads(text) if text else {"failed": code}
        results[name] = found | {"seconds_in_all": round(time.monotonic() - started, 1)}
        print(name, json.dumps(results[name])[:1500], flush=True)
        chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    failed = failures(results, chosen.steps)
    print("failed: " + ", ".join(failed) if failed else "as it should be")
    sys.exit(bool(failed))


def failures(results: dict[str, Any], steps: int) -> list[str]:
    """What is not as it should be."""
    failed = []
    expected = results.get("one", {}).get("losses")
    for name in (*WAYS, "killed", "fewer", "evaluated"):
        found = results.get(name)
        if found is None or "left_out" in found:
            continue
        losses = found.get("losses", [])
        if found.get("state") != "finished" or len(losses) != steps:
            failed.append(f"{name}: did not train to its end")
        elif expected and max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)) > SAME_LOSS:
            failed.append(f"{name}: its losses are not those of one GPU that sees the same sequences")
        elif not found.get("certified"):
            failed.append(f"{name}: its adapter has no certificate that passed")
    if (found := results.get("stopped")) is not None:
        ended = (found.get("code"), found.get("stopped"), found.get("state"), found.get("gapless"))
        if ended != (0, "stopped", "finished", True):
            failed.append("stopped: it did not save, end and go on")
    if (found := results.get("full")) is not None:
        told = "process" in (found.get("last_error") or "") and found.get("exit_reason") == "out of memory"
        if found.get("state") != "failed" or not told:
            failed.append("full: the first process does not know that another ran out of memory")
    if (found := results.get("killed")) is not None and found.get("state_then") in LIVE:
        failed.append("killed: the first process did not learn of it")
    found = results.get("evaluated")
    if found is not None and (found.get("evaluate"), found.get("export"), found.get("rows")) != (0, 0, 4):
        failed.append("evaluated: the shards did not answer, or were not exported")
    return failed


if __name__ == "__main__":
    main()
