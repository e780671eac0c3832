"""What a CPU can't show, on one real CUDA GPU: a model at true size in 4 bits trains and answers.

    python tests/gpu/run_on_gpu.py OUT.json [MODEL ...]

For each model (default `random:falcon-7b`): load in NF4, audit, add adapters, 20 optimizer steps on the embedded corpus through the
same workflow as the notebooks, save, reload and compare, generate. Writes what was measured as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Runs all models and writes the results."""
    import torch

    from qlora_helpers import workflow
    from qlora_helpers.machine.environment import check_machine

    assert torch.cuda.is_available(), "this needs a CUDA GPU"
    print(check_machine())
    out, models = Path(sys.argv[1]), sys.argv[2:] or ["random:falcon-7b"]
    results = {"gpu": torch.cuda.get_device_name(), "versions": workflow.versions(), "models": {}}
    for name in models:
        results["models"][name] = run_one(name)
        torch.cuda.empty_cache()
        out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


def run_one(name: str) -> dict[str, Any]:
    """One model through the workflow; returns what was measured."""
    import torch

    from qlora_helpers import workflow
    from qlora_helpers.model.allocator import segments_expand

    torch.cuda.reset_peak_memory_stats()
    settings = {
        "model.name": name,
        "data.seq_len_tokens": 1024,
        "train.max_steps": 20,
        "train.micro_batch_size": 2,
        "train.activation_checkpointing": True,
        "train.learning_rate": 2e-4,
        "train.eval_steps": 10,
        "train.save_steps": 10,
        "data.test_rows": 4,
        "evaluation.max_new_tokens": 20,
    }
    with tempfile.TemporaryDirectory() as root:
        run = workflow.open_run("gpu", profile="demo", settings=settings, root=root)
        started = time.monotonic()
        loaded = workflow.load(run)
        load_s = time.monotonic() - started
        print(loaded)
        assert segments_expand(), "the loader did not turn expandable segments on"
        model = workflow.add_adapters(run, loaded)
        trained = workflow.train(run, model=model, loaded=loaded, show_progress=False)
        print(trained)
        progress = [line for line in run.progress() if "loss" in line]
        check = workflow.check_reload(run, model, loaded, prompts=2)
        print(check)
        evaluation = workflow.evaluate(run, model=model, loaded=loaded)
        print(evaluation)
        assert trained.steps == 20
        assert progress[-1]["loss"] < progress[0]["loss"], "the loss did not fall"
        return {
            "load_s": round(load_s, 1),
            "weights_gib": loaded.audit.gib_by_device,
            "parameters": loaded.audit.parameters,
            "linear_layers_in_4_bit": loaded.audit.quantized,
            "compute_dtype": loaded.audit.compute_dtype,
            "steps": trained.steps,
            "first_loss": progress[0]["loss"],
            "last_loss": progress[-1]["loss"],
            "tokens_per_s_last": progress[-1].get("tokens_per_s"),
            "peak_gib": trained.peak_gib,
            "reload_difference": check.largest_difference,
            "answers": len(evaluation.rows),
            "tokens_generated_per_answer": evaluation.scores["tuned"].mean_tokens,
        }


if __name__ == "__main__":
    main()
