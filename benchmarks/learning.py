"""Does it learn, on real data: the 2023 recipe against our settings, on one GPU, on rows that neither was trained on.

    python benchmarks/learning.py OUT.json --data TRAIN.jsonl --dev DEV.jsonl --seeds 0 1 2 --share 0.25

    python benchmarks/learning.py tune.json --data TRAIN.jsonl --dev DEV.jsonl --seeds 0 --variants ours --half tuning \\
        --ours train.learning_rate=2e-3

Both learn from the same rows (a share of the training file, chosen once) for one epoch from the same checkpoint in 4 bits. The
recipe: rows padded, batch 8, loss on the prompt too, padding token = end of text, whose label transformers' collator masks. Ours:
rows packed, loss on the summary and its end, the fast step, and the settings in `OURS`, tuned on one half of the dev rows alone
(`--half tuning`, `learning_tuning_one_gpu.json`); the other half is for the report. Rows whose dialogue stands in the training file
are left out. Answers come the fast way for both, so that scores are comparable; what the recipe's own way takes (plain 4-bit
`model.generate`, batch 8) is timed on `--plain-rows` of them and scaled up, and marked so. Results are written after every case. No
text of the data is stored. `--together` trains all seeds but the first at once, each in a process of its own (a small model leaves
most of a GPU idle); the seconds that are compared are those of the first seed, which has the GPU to itself. `--together all` leaves
none alone: for scores over seeds in little time, beside seconds that a call without it measured (`learning_alone_one_gpu.json`).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from qlora_helpers import workflow
from qlora_helpers.base.config import EvaluationConfig, RunConfig
from qlora_helpers.data.duplicates import prompt_key
from qlora_helpers.data.labels import IGNORED
from qlora_helpers.data.plain_templates import template_name
from qlora_helpers.data.prepare import prepare
from qlora_helpers.data.prompts import prompt_tokens
from qlora_helpers.data.sources import Corpus, Example, read_corpus
from qlora_helpers.data.templates import template_of
from qlora_helpers.evaluation import evaluate, generate
from qlora_helpers.evaluation.scorecard import compare
from qlora_helpers.model import adapter_loading, loading, lora
from qlora_helpers.runs.folder import Run
from qlora_helpers.training import train as training
from qlora_helpers.training.result import machine_name

ON_GPU = torch.cuda.is_available()
COMMON = {
    "model.name": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "data.seq_len_tokens": 1024,
    "data.template": "recipe",
    "train.epochs": 1.0,
    "train.logging_steps": 1000,
    "evaluation.batch_size": 128,
    "evaluation.max_new_tokens": 128,
}
RECIPE = {"data.packing": False, "data.loss_on": "all", "train.fast_step": False, "train.micro_batch_size": 8}
OURS = {
    "adapter.r": 32,
    "adapter.lora_alpha": 64,
    "adapter.lora_dropout": 0.0,
    "train.micro_batch_size": 8,
    "train.learning_rate": 4e-3,
    "train.lr_scheduler_type": "cosine",
    "train.warmup_steps": 10,
}
VARIANTS = {"recipe": RECIPE, "ours": OURS}
Case = tuple[str, int]  # variant and seed
Rows = tuple[list[Example], dict[str, list[Example]]]  # of training, and the two halves of the dev rows
Found = tuple[dict[str, Any], dict[str, dict[str, Any]]]  # what was measured, and each row's scores by id
TUNING_ROWS_WHILE_TRAINING = 8  # Trainer asks for an evaluation set; the scores don't come from it


def all_rows(source: str) -> tuple[Example, ...]:
    """Every usable row of a file, in the file's order whatever its splits."""
    config = RunConfig().data
    corpus = read_corpus(replace(config, source=source, train_rows=None, eval_rows=1, test_rows=1))
    rows = (*corpus.train, *corpus.eval, *corpus.test)
    return tuple(sorted(rows, key=lambda row: (len(row.where), row.where)))


def split_rows(chosen: argparse.Namespace) -> tuple[list[Example], dict[str, list[Example]], int]:
    """Training rows, the two halves of the dev rows, and how many dev rows stand in the whole training file."""
    train = list(all_rows(chosen.data))
    known = {prompt_key(row) for row in train}
    dev = [row for row in all_rows(chosen.dev) if prompt_key(row) not in known]
    skipped = len(all_rows(chosen.dev)) - len(dev)
    random.Random("halves").shuffle(dev)
    halves = {"tuning": dev[: len(dev) // 2], "report": dev[len(dev) // 2 :]}
    random.Random("share").shuffle(train)
    return train[: max(8, round(chosen.share * len(train)))], halves, skipped


def settings_of(variant: str, seed: int, chosen: argparse.Namespace) -> RunConfig:
    """A variant's settings; those of the command line come last."""
    config = RunConfig().with_settings(COMMON | VARIANTS[variant] | {"train.seed": seed})
    own = chosen.ours if variant == "ours" else chosen.recipe
    return config.with_settings(chosen.settings).with_settings(own)


def train_one(config: RunConfig, variant: str, corpus: Corpus) -> tuple[Any, Any, dict[str, Any]]:
    """Trains a variant; gives the model, its tokenizer and what was measured."""
    loaded = loading.load_model(config.model, say=lambda text: None)
    model = loaded.model
    if variant == "recipe":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = lora.add_adapters(model, config.adapter, seed=config.train.seed)
    data = prepare(corpus, loaded.tokenizer, config.data)
    if variant == "recipe":  # its padding token is its end of text, and the collator masks every label of it
        data = replace(data, train=data.train.map(without_end, fn_kwargs={"end": loaded.tokenizer.eos_token_id}))
    with tempfile.TemporaryDirectory() as folder:
        result = training.train(model, loaded.tokenizer, data, config.train, Run(Path(folder)), show_progress=False)
        if (
            variant == "recipe"
        ):  # its preparation put embeddings and norms into 32 bits; it is asked as it would be loaded
            model.save_pretrained(Path(folder, "adapter"), save_embedding_layers=False)
            del model, loaded
            loaded = loading.load_model(config.model, say=lambda text: None)
            model = adapter_loading.load_adapter(loaded.model, Path(folder, "adapter"))
    return (
        model,
        loaded.tokenizer,
        {
            "train_s": round(result.seconds, 1),
            "steps": result.steps,
            "tokens_per_s": round(result.tokens_per_s, 1),
            "loss": result.loss,
            "peak_gib": result.peak_gib,
            "fast_step": result.fast_step.splitlines(),
            "trained_share": round(data.report.trained_tokens / data.report.tokens, 4),
        },
    )


def without_end(row: dict[str, Any], end: int) -> dict[str, Any]:
    """A row's labels with every end of text masked."""
    return {"labels": [IGNORED if label == end else label for label in row["labels"]]}


def plain_answers(model: Any, tokenizer: Any, rows: list[Example], config: RunConfig, count: int) -> dict[str, Any]:
    """How long the recipe's own way of answering takes: timed on a few rows of all lengths, scaled to all."""
    if not count:
        return {}
    template = template_of(config.data, tokenizer)
    prompts = sorted((prompt_tokens(row, template).ids for row in rows), key=len)
    few = prompts[:: max(1, len(prompts) // count)][:count]
    small = EvaluationConfig(batch_size=8, max_new_tokens=config.evaluation.max_new_tokens)
    started = time.monotonic()
    generate.generate(model, tokenizer, few, small)
    seconds = time.monotonic() - started
    return {"plain_rows_timed": len(few), "plain_s_scaled_to_all": round(seconds * len(rows) / len(few), 1)}


def measure(
    variant: str, seed: int, train: list[Example], halves: dict[str, list[Example]], chosen: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """One training and its evaluation; the second value holds each row's scores by id."""
    config, asked = settings_of(variant, seed, chosen), halves[chosen.half]
    few = tuple(halves["tuning"][:TUNING_ROWS_WHILE_TRAINING])
    corpus = Corpus(Path(chosen.data).name, "", tuple(train), few, tuple(asked), ())
    model, tokenizer, found = train_one(config, variant, corpus)
    only = ("tuned",) if chosen.base_done else tuple(evaluate.MODELS)
    started = time.monotonic()
    result = evaluate.evaluate(
        model,
        tokenizer,
        asked,
        config.evaluation,
        template=template_name(config.data),
        only=only,
        progress=False,
        max_tokens=config.data.seq_len_tokens,
    )
    found |= {
        "evaluation_s": round(time.monotonic() - started, 1),
        "models_asked": len(result.scores),
        "rows": len(result.rows),
    }
    found |= {"scores": {name: asdict(score) for name, score in result.scores.items()}, "form": list(result.form)}
    found |= {"against": {name: without_ids(item.to_dict()) for name, item in result.comparisons.items()}}
    found |= {"settings": {"adapter": asdict(config.adapter), "train": asdict(config.train)}}
    if variant == "recipe":
        found |= plain_answers(model, tokenizer, asked, config, chosen.plain_rows)
    chosen.base_done = True
    return found, {row["id"]: row["answers"]["tuned"] for row in result.rows}


def without_ids(comparison: dict[str, Any]) -> dict[str, Any]:
    """A comparison with counts in place of row ids."""
    return comparison | {name: len(comparison[name]) for name in ("wins", "ties", "losses")}


def over_seeds(scores: dict[str, list[dict[str, dict[str, Any]]]]) -> dict[str, Any] | None:
    """Ours against the recipe: each row's scores are means over seeds, and rows are what is drawn again."""
    if not all(scores.get(name) for name in ("recipe", "ours")):
        return None
    rows = []
    for row_id in scores["ours"][0]:
        answers = {}
        for name, seeds in scores.items():
            keys = [key for key, value in seeds[0][row_id].items() if isinstance(value, int | float)]
            answers[name] = {key: sum(seed[row_id][key] for seed in seeds) / len(seeds) for key in keys}
        rows.append({"id": row_id, "answers": answers})
    return without_ids(compare(rows, "recipe", "ours").to_dict())


def parsed() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("out", type=Path)
    options.add_argument("--data", required=True, help="training file")
    options.add_argument("--dev", required=True, help="held-out file; one half is for tuning, one for the report")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--share", type=float, default=1.0, help="of the training rows")
    options.add_argument("--half", choices=("tuning", "report"), default="report")
    options.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=["ours", "recipe"])
    options.add_argument("--plain-rows", type=int, default=16, help="rows by which the recipe's own answering is timed")
    for name, text in (("settings", "of both"), ("ours", "of ours"), ("recipe", "of the recipe")):
        flag = "--set" if name == "settings" else f"--{name}"
        options.add_argument(
            flag, dest=name, nargs="+", default=[], metavar="SECTION.NAME=VALUE", help=f"settings {text}"
        )
    options.add_argument(
        "--together", nargs="?", const="rest", choices=("rest", "all"), help="all seeds but the first at once, or all"
    )
    options.add_argument("--rows-of-one", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--base-done", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    return chosen


def attempted(case: Case, rows: Rows, chosen: argparse.Namespace) -> Found:
    """`measure`, where a case that fails is a result too."""
    try:
        found, scores = measure(*case, *rows, chosen)
    except Exception as error:
        found, scores = {"error": f"{type(error).__name__}: {str(error)[:500]}"}, {}
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    return found, scores


def all_at_once(cases: list[Case], folder: Path, *, base_done: bool) -> Iterator[tuple[Case, Found]]:
    """Each case in a process of its own, all started before the first is awaited."""
    started = []
    for variant, seed in cases:
        answer = folder / f"{variant}-{seed}.json"
        command = [sys.executable, __file__, str(answer), *sys.argv[2:], "--rows-of-one", f"{answer}.rows"]
        command += ["--variants", variant, "--seeds", str(seed)]
        command += ["--base-done"] if base_done or started else []  # the first asks the untrained model
        started.append((answer, subprocess.Popen(command, stdout=subprocess.DEVNULL)))
    waiting = dict(zip(cases, started, strict=True))
    try:
        while waiting:
            time.sleep(0.2)
            for case in [case for case, (_, process) in waiting.items() if process.poll() is not None]:
                answer, process = waiting.pop(case)
                yield case, _answered(answer, process.returncode, len(cases) - 1)
    finally:
        for _, process in waiting.values():
            process.terminate()


def _answered(answer: Path, code: int, others: int) -> Found:
    """What a case in a process of its own wrote."""
    rows = Path(f"{answer}.rows")
    if not rows.exists():
        return {"error": f"the process ended with {code}"}, {}
    found = json.loads(answer.read_text(encoding="utf-8"))["cases"][0]
    return found | {"others_on_the_gpu": others}, json.loads(rows.read_text(encoding="utf-8"))


def measured(chosen: argparse.Namespace, rows: Rows) -> Iterator[tuple[Case, Found]]:
    """All cases, seed by seed."""
    cases = [(variant, seed) for seed in chosen.seeds for variant in chosen.variants]
    first = [case for case in cases if case[1] == chosen.seeds[0]]
    alone = first if chosen.together == "rest" else [] if chosen.together else cases
    if chosen.rows_of_one is not None:  # a process of one case
        alone = cases
    for case in alone:
        yield case, attempted(case, rows, chosen)
    if waiting := [case for case in cases if case not in alone]:
        with tempfile.TemporaryDirectory() as folder:
            yield from all_at_once(waiting, Path(folder), base_done=bool(alone))


def main() -> None:
    """Trains and evaluates each variant with each seed and writes after each."""
    chosen = parsed()
    train, halves, skipped = split_rows(chosen)
    results: dict[str, Any] = {
        "machine": machine_name(torch.device("cuda" if ON_GPU else "cpu")),
        "versions": workflow.versions(),
        "data": Path(chosen.data).name,
        "dev": Path(chosen.dev).name,
        "half": chosen.half,
        "share": chosen.share,
        "train_rows": len(train),
        "dev_rows_also_in_training": skipped,
        "rows": {name: len(rows) for name, rows in halves.items()},
        "cases": [],
        "ours_against_recipe": None,
    }
    scores: dict[str, list[dict[str, dict[str, Any]]]] = {}
    for (variant, seed), (found, rows) in measured(chosen, (train, halves)):
        if rows:
            scores.setdefault(variant, []).append(rows)
        case = {"variant": variant, "seed": seed}
        results["cases"].append(case | found)
        results["ours_against_recipe"] = over_seeds(scores)
        shown = ("train_s", "evaluation_s", "scores", "error")
        print(json.dumps(case | {name: found[name] for name in shown if name in found}), flush=True)
        chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        if chosen.rows_of_one is not None:
            chosen.rows_of_one.write_text(json.dumps(rows), encoding="utf-8")
    verdict = results["ours_against_recipe"]
    print(verdict["verdict"] if verdict else "no pair of variants to compare")


if __name__ == "__main__":
    main()
