"""Out of memory on a real GPU, in a notebook's shell: memory is free again, the message says where and what next, `retry` goes on.

    python tests/gpu/oom_on_gpu.py [OUT.json] [MODEL]

A model (default `random:falcon-7b`; `random:falcon-tiny` without a GPU) trains two steps and saves; then its batches are made too
large for any card, in IPython, which keeps the error. After that, each place of a step runs out of memory once. Prints JSON.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from out_of_memory import PLACES, exhausted_at, held_bytes

FREE = 1.01


def main() -> None:
    """Runs all parts, prints what was measured and fails where a promise does not hold."""
    import torch

    from qlora_helpers import workflow

    cuda = torch.cuda.is_available()
    out = next((Path(each) for each in sys.argv[1:] if each.endswith(".json")), None)
    named = [each for each in sys.argv[1:] if not each.endswith(".json")]
    model_name = (named or ["random:falcon-7b" if cuda else "random:falcon-tiny"])[0]
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name() if cuda else "none", "model": model_name}
    result["versions"] = workflow.versions()
    with tempfile.TemporaryDirectory() as root:
        result |= measured(Path(root), model_name, cuda)
    text = json.dumps(result, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    failed = [name for name, ok in result["checks"].items() if not ok]
    sys.exit(f"not as promised: {', '.join(failed)}" if failed else 0)


def measured(root: Path, model_name: str, cuda: bool) -> dict[str, Any]:
    """One run: small batches, too large ones, a retry, then every place of a step."""
    from qlora_helpers import workflow

    settings = {
        "model.name": model_name,
        "data.seq_len_tokens": 2048 if cuda else 192,
        "train.max_steps": 2,
        "train.micro_batch_size": 1,
        "train.gradient_accumulation_steps": 16 if cuda else 4,
        "train.save_steps": 2,
        "train.eval_steps": 2,
        "train.logging_steps": 1,
        "train.compile": "off",
        "train.tensorboard": "off",
        "data.test_rows": 2,
        "data.eval_rows": 4,
    }
    run = workflow.open_run("oom", profile="demo", settings=settings, root=root)
    loaded = workflow.load(run)
    model = workflow.add_adapters(run, loaded)
    workflow.train(run, model=model, loaded=loaded, show_progress=False)
    shell = _shell({"run": run, "model": model, "loaded": loaded, "workflow": workflow})
    together = settings["train.gradient_accumulation_steps"]
    workflow.open_run(
        run.folder,
        settings={
            "train.micro_batch_size": together,
            "train.gradient_accumulation_steps": 1,
            "train.max_steps": 4,
            "train.activation_checkpointing": False,
        },
    )
    large = _too_large(shell, model, cuda)
    shell.run_cell("result = workflow.retry(run, model=model, loaded=loaded, show_progress=False)")
    steps = [line["step"] for line in run.progress() if "loss" in line]
    retried = {"steps": steps, "settings": run.config().to_dict()["train"]}
    places = {place: _place(shell, run, model, place) for place in PLACES}
    checks = {
        "memory is free again": large["reached"] and large["ratio"] <= FREE,
        "settings are ranked": bool(large["ranked"]) or not cuda,
        "retry went on": steps == [1, 2, 3, 4],
        "every place is named": all(each["named"] for each in places.values()),
        "memory is free again everywhere": all(each["ratio"] <= FREE for each in places.values()),
    }
    found: dict[str, Any] = {"too_large": large, "retry": retried, "places": places, "checks": checks}
    if cuda:
        found["background"] = _background(run, together)
        checks["the background says so too"] = found["background"]["exit_code"] == 2
    return found


def _shell(names: dict[str, Any]) -> Any:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    shell.push(names)
    return shell


def _train_in(shell: Any) -> dict[str, Any]:
    """Trains in a cell; nothing is tidied up here: what is measured is what a reader's kernel would hold."""
    gc.collect()  # what the session before left in cycles does not count as held
    before, reserved_before = held_bytes(), _reserved()
    outcome = shell.run_cell("result = workflow.train(run, model=model, loaded=loaded, show_progress=False)")
    error = outcome.error_in_exec
    after = held_bytes()
    return {
        "before_bytes": before,
        "after_bytes": after,
        "ratio": after / before,
        "reserved_before_bytes": reserved_before,
        "reserved_after_bytes": _reserved(),
        "kind": type(error).__name__,
        "message": str(error),
        "where": getattr(error, "where", None),
        "ranked": [repr(each) for each in getattr(error, "candidates", ())],
    }


def _too_large(shell: Any, model: Any, cuda: bool) -> dict[str, Any]:
    if cuda:
        found = _train_in(shell)
    else:
        with exhausted_at("forward", model):
            found = _train_in(shell)
    return found | {"reached": found["kind"] == "OutOfMemory"}


def _place(shell: Any, run: Any, model: Any, place: str) -> dict[str, Any]:
    from qlora_helpers import workflow

    workflow.open_run(run.folder, settings={"train.max_steps": run.status().max_steps + 2})
    with exhausted_at(place, model) as exhaust:
        found = _train_in(shell)
    named = found["kind"] == "OutOfMemory" and found["where"].startswith(PLACES[place])
    return {key: found[key] for key in ("ratio", "where")} | {"named": named, "frames_freed": exhaust.freed}


def _background(run: Any, together: int) -> dict[str, Any]:
    """The same batches in a process of its own, as the command line starts it."""
    settings = [f"train.micro_batch_size={together}", "train.gradient_accumulation_steps=1", "train.max_steps=99"]
    settings += ["train.activation_checkpointing=false"]
    command = [sys.executable, "-m", "qlora_helpers", "train", str(run.folder)]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True)
    status = run.status()
    return {"exit_code": done.returncode, "stderr": done.stderr[-2000:], "exit_reason": status.exit_reason}


def _reserved() -> int:
    import torch

    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0


if __name__ == "__main__":
    main()
