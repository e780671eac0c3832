"""Whether the fast step learns as much as the plain path with 32-bit adapters under autocast: the same rows, steps and seeds.

    python benchmarks/quality.py OUT.json --model SmolLM2-FOLDER --data dialogsum-train.jsonl [--steps 300 --seeds 0 1 2 --together]

For each seed, both paths train the same steps, and the loss on the same held-out rows is a mean over their trained tokens. The
model is any name that the package loads. `--together` trains all of them at once, each in a process of its own: a small model
leaves most of a GPU idle, and no time is compared here. Target: within 0.5 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PATHS: dict[str, dict[str, Any]] = {
    "plain": {"fast_step": False, "compile": "off", "matmul_dtype": "bfloat16"},
    "fast": {"compile": "on", "matmul_dtype": "bfloat16"},
    "fp8": {"compile": "on", "matmul_dtype": "fp8"},
}
"""Settings of each path; `fp8_quality.py` runs the last."""
COMPARED = ("plain", "fast")


def trained(path: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One training; returns its losses."""
    from qlora_helpers.base.config import AdapterConfig, DataConfig, ModelConfig, TrainConfig
    from qlora_helpers.data.prepare import prepare
    from qlora_helpers.data.sources import read_corpus
    from qlora_helpers.model import loading, lora
    from qlora_helpers.runs.folder import Run
    from qlora_helpers.training import train

    loaded = loading.load_model(ModelConfig(name=options.model), say=lambda text: None)
    model = lora.add_adapters(loaded.model, AdapterConfig(r=16, lora_dropout=0.0), seed=seed)
    held_out = {"eval_rows": options.eval_rows, "test_rows": options.answers or 30}
    settings = DataConfig(
        **{"source": options.data, "template": "recipe", "seq_len_tokens": options.seq_len, "seed": 0}
        | held_out
        | options.settings
    )
    data = prepare(read_corpus(settings), loaded.tokenizer, settings)
    config = TrainConfig(
        max_steps=options.steps,
        micro_batch_size=options.blocks,
        learning_rate=options.learning_rate,
        seed=seed,
        activation_checkpointing=False,
        logging_steps=max(1, options.steps // 10),
        eval_steps=options.steps,
        save_steps=options.steps,
        **PATHS[path],
    )
    with tempfile.TemporaryDirectory() as folder:
        result = train.train(model, loaded.tokenizer, data, config, Run(Path(folder)), show_progress=False)
    answers = answered(model, loaded.tokenizer, data, settings, options) if options.answers else {}
    return answers | {
        "path": path,
        "seed": seed,
        "eval_loss": result.eval_loss,
        "loss": result.loss,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "machine": result.machine,
        "compiled": result.compiled,
        "captured": result.captured,
        "fp8": result.fp8,
        "fast_step": result.fast_step.splitlines(),
    }


def answered(model: Any, tokenizer: Any, data: Any, settings: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Greedy answers to held-out rows: each row's scores, without any of its text, and what they amount to."""
    from qlora_helpers.base.config import EvaluationConfig
    from qlora_helpers.evaluation.evaluate import evaluate

    config = EvaluationConfig(batch_size=32, max_new_tokens=options.answer_tokens, chat_baseline=False, few_shot=0)
    found = evaluate(
        model,
        tokenizer,
        data.test,
        config,
        template=settings.template,
        max_tokens=options.seq_len,
        train_answers=data.train_answers,
        only=("tuned",),
        progress=False,
    )
    rows = {
        row["id"]: {key: value for key, value in row["answers"]["tuned"].items() if not isinstance(value, str)}
        for row in found.rows
    }
    return {"metric": found.scoring.metric, "scores": found.to_dict()["scores"]["tuned"], "rows": rows}


def answers_compared(runs: list[dict[str, Any]], first: str, second: str) -> dict[str, Any]:
    """Paired bootstrap intervals of the scores that count, by seed and over all seeds' rows together.

    One row's answers under several seeds are not independent of each other, so the interval over all is too narrow if anything.
    """
    from qlora_helpers.evaluation.scorecard import compare

    by_path: dict[str, dict[int, Any]] = {first: {}, second: {}}
    for run in runs:
        if "rows" in run and run["path"] in by_path:
            by_path[run["path"]][run["seed"]] = run
    found: dict[str, Any] = {}
    together = []
    for seed in sorted(by_path[first].keys() & by_path[second].keys()):
        one, other = by_path[first][seed], by_path[second][seed]
        rows = [
            {"id": f"{seed}/{name}", "answers": {first: one["rows"][name], second: other["rows"][name]}}
            for name in one["rows"]
        ]
        together += rows
        found[str(seed)] = _difference(compare(rows, first, second, metric=_metric(one["metric"])))
    if together:
        found["all"] = _difference(compare(together, first, second, metric=_metric(one["metric"])))
    return found


def _metric(name: str) -> Any:
    from qlora_helpers.base.config import EvaluationConfig
    from qlora_helpers.evaluation.metrics.choose import metric_for

    return metric_for(EvaluationConfig(metric=name), (), ())[0]


def _difference(comparison: Any) -> dict[str, Any]:
    main = comparison[comparison.main]
    return {"measure": main.measure, "first": main.first, "second": main.second, "low": main.low, "high": main.high}


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """By seed, how far the fast path's evaluation loss lies from the plain path's, relative to it."""
    losses = {(run["path"], run["seed"]): run["eval_loss"] for run in runs if "eval_loss" in run}
    seeds = sorted({seed for _, seed in losses})
    return {
        str(seed): losses["fast", seed] / losses["plain", seed] - 1
        for seed in seeds
        if ("fast", seed) in losses and ("plain", seed) in losses
    }


def main() -> None:
    """Starts a process a training and writes after each that ends."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("out", type=Path)
    options.add_argument("--model", required=True)
    options.add_argument("--data", required=True)
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--blocks", type=int, default=4)
    options.add_argument("--seq-len", type=int, default=512)
    options.add_argument("--eval-rows", type=int, default=100)
    options.add_argument("--learning-rate", type=float, default=1e-3)
    options.add_argument("--answers", type=int, default=0, help="also score greedy answers to so many held-out rows")
    options.add_argument("--answer-tokens", type=int, default=80)
    options.add_argument("--settings", type=json.loads, default={}, help="more settings of the data, as JSON")
    options.add_argument("--together", action="store_true")
    options.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.one:
        chosen.out.write_text(json.dumps(trained(chosen.one[0], int(chosen.one[1]), chosen)), encoding="utf-8")
        return
    from qlora_helpers import workflow

    arguments = sys.argv[2:]
    results: dict[str, Any] = {
        "model": Path(chosen.model).name,
        "data": Path(chosen.data).stem,
        "steps": chosen.steps,
        "blocks": chosen.blocks,
        "seq_len_tokens": chosen.seq_len,
        "learning_rate": chosen.learning_rate,
        "versions": workflow.versions(),
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        waiting = []
        for seed in chosen.seeds:
            for path in COMPARED:
                answer = Path(folder) / f"{path}-{seed}.json"
                command = [sys.executable, __file__, str(answer), *arguments, "--one", path, str(seed)]
                waiting.append((answer, subprocess.Popen(command, stdout=sys.stderr)))
                if not chosen.together:
                    waiting[-1][1].wait()
        for answer, process in waiting:
            code = process.wait()
            found = json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else {"exit_code": code}
            results["runs"].append(found)
            results["fast_against_plain"] = summary(results["runs"])
            results["answers_fast_against_plain"] = answers_compared(results["runs"], *COMPARED)
            chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results["fast_against_plain"], indent=2))


if __name__ == "__main__":
    main()
