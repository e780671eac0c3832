"""Fields as JSON out of support tickets: the tuned demo model against the untuned one, without and with examples in its prompt.

    python benchmarks/tickets.py OUT.json --model SmolLM2-FOLDER-OR-GGUF [--seeds 0 1 2] [--together] [--set SECTION.NAME=VALUE ...]

The settings are those of notebook 10, on the embedded tickets. Each seed draws other adapters and another order of the rows; rows,
splits and examples are the same. The untuned model is asked once, since greedy answers do not change with the seed. Answers are not
stored, only each row's scores. `over_seeds` gives each row the mean of its scores over the seeds and draws rows, not seeds, again.
Runs on a CPU (a seed takes minutes to an hour) and on a GPU, where `--together` gives each seed a process of its own, all at once
and without CUDA graphs; each asks the untuned model then. Written after every seed. Targets: at least 90 % of the answers valid,
field F1 at least 30 points above the untuned model's, and above few-shot's with an interval above zero, for every seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPT = (
    "Answer with one JSON object with the keys order_number, product, issue, wants and deadline.\n\n"
    "Sent: {sent}\nSubject: {subject}\n\n{body}"
)
SETTINGS: dict[str, Any] = {
    "data.source": "embedded:tickets",
    "data.prompt": PROMPT,
    "data.answer": "{fields}",
    "data.template": "auto",
    "data.seq_len_tokens": 1024,
    "train.micro_batch_size": 1,
    "evaluation.max_new_tokens": 100,
    "data.train_rows": 240,
    "train.epochs": 2,
}
"""What notebook 10 sets in the profile `demo`; a test compares them."""
TARGETS = {"valid_json": 90.0, "field_f1_over_untuned": 30.0}


def one_seed(seed: int, options: argparse.Namespace, rivals: list[dict[str, Any]]) -> dict[str, Any]:
    """Trains and asks with one seed.

    Args:
        seed: of the adapters and the order of the rows.
        options: the model and further settings.
        rivals: rows with the untuned model's answers; filled by the first seed, and used by the others.
    """
    import qlora_helpers as ql
    from qlora_helpers.evaluation.evaluate import evaluate_prepared
    from qlora_helpers.evaluation.result import MODELS
    from qlora_helpers.evaluation.worth import worth

    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS | {"model.name": options.model, "train.seed": seed, "train.tensorboard": "off"}
        run = ql.open_run("tickets", profile="demo", settings=settings, root=folder)
        run.change_config(run.config().with_settings(options.settings))
        config, loaded = run.config(), ql.load(run)
        model = ql.add_adapters(run, loaded)
        trained = ql.train(run, model=model, loaded=loaded, show_progress=False)
        data = ql.prepare_data(run, loaded.tokenizer, shape=loaded.shape)
        started = time.monotonic()
        only = ("tuned",) if rivals else tuple(MODELS)
        result = evaluate_prepared(model, loaded.tokenizer, data, config, only=only, progress=False)
    rows = [
        {"id": row["id"], "answers": {name: numbers(one) for name, one in row["answers"].items()}}
        for row in result.rows
    ]
    rivals = rivals or rows
    for row, asked in zip(rows, rivals, strict=True):
        row["answers"] = asked["answers"] | row["answers"]
    compared = comparisons(rows)
    return {
        "seed": seed,
        "scores": result.to_dict()["scores"],
        "against": {name: differences(one) for name, one in compared.items()},
        "worth": worth(compared),
        "train_rows": data.report.rows,
        "train_tokens": data.report.tokens,
        "steps": trained.steps,
        "loss": trained.loss,
        "eval_loss": trained.eval_loss,
        "train_s": round(trained.seconds, 1),
        "evaluation_s": round(time.monotonic() - started, 1),
        "machine": trained.machine,
        "remarks": list(result.remarks),
        "settings": config.to_dict() | {"model": config.to_dict()["model"] | {"name": Path(config.model.name).name}},
        "rows": rows,
    }


def numbers(answer: dict[str, Any]) -> dict[str, Any]:
    """A row's answer without its text."""
    return {key: value for key, value in answer.items() if not isinstance(value, str)}


def comparisons(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The tuned model against each rival, with paired bootstrap intervals."""
    from qlora_helpers.evaluation.metrics.fields import json_metric
    from qlora_helpers.evaluation.scorecard import compare

    rivals = [name for name in rows[0]["answers"] if name != "tuned"]
    return {name: compare(rows, name, "tuned", metric=json_metric()) for name in rivals}


def differences(comparison: Any) -> dict[str, Any]:
    """A comparison with counts in place of row ids."""
    return comparison.to_dict() | {name: len(getattr(comparison, name)) for name in ("wins", "ties", "losses")}


def over_seeds(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The tuned model against each rival, where each row has the mean of its scores over the seeds."""
    rows = []
    for several in zip(*(case["rows"] for case in cases), strict=True):
        tuned = [row["answers"]["tuned"] for row in several]
        keys = [key for key, value in tuned[0].items() if isinstance(value, int | float)]
        mean = {key: sum(answer[key] for answer in tuned) / len(tuned) for key in keys}
        rows.append({"id": several[0]["id"], "answers": several[0]["answers"] | {"tuned": mean}})
    return {name: differences(one) for name, one in comparisons(rows).items()}


def reached(case: dict[str, Any]) -> dict[str, bool]:
    """Which targets a seed reaches."""
    against = case["against"]

    def measure(rival: str, name: str) -> dict[str, Any]:
        return next(item for item in against[rival]["differences"] if item["measure"] == name)

    untuned, few = measure("base", "field_f1"), measure("base_few", "field_f1")
    return {
        "valid": measure("base", "valid_json")["second"] >= TARGETS["valid_json"],
        "over_untuned": untuned["second"] - untuned["first"] >= TARGETS["field_f1_over_untuned"],
        "over_few_shot": few["low"] is not None and few["low"] > 0,
    }


def parsed() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("out", type=Path)
    options.add_argument("--model", required=True, help="SmolLM2-135M-Instruct: a folder, a .gguf file or its hub id")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--together", action="store_true", help="all seeds at once, each in a process of its own")
    options.add_argument("--beside-others", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--set", dest="settings", nargs="+", default=[], metavar="SECTION.NAME=VALUE")
    return options.parse_args()


def together(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs each seed in a process of its own, all at once.

    Yields:
        Each seed's case, in the order of the seeds.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for seed in options.seeds:
            out = Path(folder) / f"{seed}.json"
            command = [
                sys.executable,
                __file__,
                str(out),
                "--model",
                options.model,
                "--seeds",
                str(seed),
                "--beside-others",
                "--set",
            ]
            settings = [*options.settings, "train.cuda_graph=false"]  # several processes on one GPU capture nothing
            started.append((out, subprocess.Popen(command + settings, stdout=sys.stderr)))
        for out, process in started:
            if process.wait() != 0:
                raise SystemExit(f"the process of {out.stem} failed with exit code {process.returncode}")
            yield json.loads(out.read_text(encoding="utf-8"))["cases"][0]


def main() -> None:
    """Trains and measures each seed and writes after each."""
    from qlora_helpers.base.files import write_json
    from qlora_helpers.machine.environment import versions

    options = parsed()
    if options.beside_others:  # a run locks its GPU, so that no other run trains there by mistake
        unittest.mock.patch("qlora_helpers.runs.locks.visible_gpus", return_value=()).start()
    results: dict[str, Any] = {"versions": versions(), "targets": TARGETS, "cases": []}

    def in_turn() -> Iterator[dict[str, Any]]:
        for seed in options.seeds:
            first = results["cases"][0] if results["cases"] else None
            yield one_seed(seed, options, first["rows"] if first else [])

    for case in together(options) if options.together else in_turn():
        results["cases"].append(case | {"reached": reached(case)})
        results |= {"machine": case["machine"], "over_seeds": over_seeds(results["cases"])}
        said = {name: case[name] for name in ("seed", "steps", "train_s", "evaluation_s", "worth")}
        print(json.dumps(said | reached(case)), flush=True)
        write_json(options.out, results)
    print(json.dumps({"all_reached": all(all(case["reached"].values()) for case in results["cases"])}))


if __name__ == "__main__":
    main()
