"""How fast held-out rows are answered, on one machine: plain 4-bit `model.generate` at batch 8 and at a larger batch, and ours.

    python benchmarks/evaluation_speed.py OUT.json MODEL:BATCH[:4bit] ...

    python benchmarks/evaluation_speed.py out.json HuggingFaceTB/SmolLM2-135M-Instruct:128 falcon-7b:64 llama-3.1-8b:64 \\
        --data dialogsum-dev.jsonl --rows 256 --plain-batches 2

Models are catalogued shapes at true size with random weights, or any name that the package loads; adapters on all of their linear
layers, B moved off zero. Prompts are the rows of the data; all variants of a case run in one process in turns, `--rounds` times, so
the ratios hold whatever the card's clock does that day. Plain answers are timed on `--plain-batches` batches, since the whole set
would take many minutes: neighbours among the rows sorted by length, which need the least padding, and evenly chosen, so that both
sides answer rows of like length; one batch takes the median lengths. Ours includes everything that it does once: unpacking, proof,
recording. `:4bit` keeps the weights packed. A token counts where `model.generate` would have counted it: up to and with the end of
an answer.

Of each variant, `padded_share` is the share of padding in the prompts as the model read them. Where a plain answer and ours part,
`margins_at_first_difference` says how far apart the plain model's two best logits lie at the first token that differs: rounding
alone can part answers only where that is little.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora_helpers import workflow
from qlora_helpers.base.config import AdapterConfig, DataConfig, EvaluationConfig, ModelConfig
from qlora_helpers.base.units import gib
from qlora_helpers.data.prompts import prompt_tokens
from qlora_helpers.data.sources import read_corpus
from qlora_helpers.data.templates import make_template
from qlora_helpers.evaluation import generate
from qlora_helpers.evaluation.fast_answers.answer import answering_form
from qlora_helpers.model import loading, lora
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.model.wiring import takes_logits_to_keep
from qlora_helpers.training.result import machine_name

ON_GPU = torch.cuda.is_available()
RANKS = {"falcon-7b": 8, "falcon-40b": 8, "falcon-tiny": 8}
PLAIN_BATCH = 8


@dataclass(frozen=True)
class Case:
    """One model at one batch size."""

    model: str
    batch: int
    form: str = "dense"

    @classmethod
    def parse(cls, text: str) -> Case:
        model, batch, *form = text.rsplit(":", 2) if text.endswith(":4bit") else text.rsplit(":", 1)
        return cls(model, int(batch), form[0] if form else "dense")


def timed(run: Any) -> tuple[Any, float]:
    """What a call gives, and its seconds on the wall."""
    _synchronize()
    started = time.monotonic()
    found = run()
    _synchronize()
    return found, time.monotonic() - started


def _synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def plain_rows(count: int, size: int, batches: int) -> list[int]:
    """Places in so many rows sorted by length: batches of neighbours, evenly chosen, so that one batch takes the median lengths."""
    if size * batches >= count:
        return list(range(count))
    starts = [int((number + 0.5) * count / batches - size / 2) for number in range(batches)]
    return [start + place for start in starts for place in range(size)]


class Padding:
    """Counts, as a model reads prompts, their tokens and those of the padding beside them; waits for no GPU while it does."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.begin()
        model.get_base_model().register_forward_pre_hook(self._count, with_kwargs=True)

    def begin(self) -> None:
        """Counts from nothing."""
        self.tokens: list[torch.Tensor] = []
        self.places = 0

    def _count(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if ids.shape[1] > 1:  # one token a row is a step of the answer
            self.tokens.append(torch.ones_like(ids).sum() if mask is None else mask.sum())
            self.places += ids.numel()

    def share(self) -> float:
        """Of padding, 0 to 1."""
        return round(1 - int(sum(self.tokens)) / max(1, self.places), 4)


class KeepsTokens:
    """A tokenizer that keeps the tokens of the answers it turns into text, in their order."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.answers: list[list[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def decode(self, tokens: list[int], **options: Any) -> str:
        self.answers.append(tokens)
        return self.tokenizer.decode(tokens, **options)


@torch.no_grad()
def margin(model: torch.nn.Module, prompt: list[int], one: list[int], other: list[int]) -> float:
    """Between the model's two best logits after a prompt and what two answers to it have in common."""
    common = next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    ids = torch.tensor([[*prompt, *one[:common]]], device=model.get_input_embeddings().weight.device)
    keep = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **keep).logits[0, -1]
    first, second = logits.float().topk(2).values.tolist()
    return first - second


def loaded_model(name: str) -> tuple[Any, Any]:
    """The model with adapters that act, and its tokenizer."""
    loaded = loading.load_model(ModelConfig(name=f"random:{name}" if name in SHAPES else name), say=lambda text: None)
    adapter = AdapterConfig(r=RANKS.get(name, 16), lora_dropout=0.0)
    model = lora.add_adapters(loaded.model, adapter, seed=0)
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if "lora_B" in part:
                weight.normal_(std=0.002)
    return model.eval(), loaded.tokenizer


def measure(case: Case, chosen: argparse.Namespace) -> dict[str, Any]:
    """Answers by each variant in turns, and what they had in common."""
    model, tokenizer = loaded_model(case.model)
    rows = read_corpus(DataConfig(source=chosen.data, train_rows=chosen.rows, eval_rows=1, test_rows=1)).train
    prompts = []
    template, room = make_template("recipe", tokenizer), chosen.seq_len - chosen.new_tokens
    for row in rows:
        prompts.append(prompt_tokens(row, template, max_tokens=room, long_rows="trim_end").ids)
    prompts.sort(key=len, reverse=True)  # as they are answered, so that answers come in the order of the prompts
    settings = EvaluationConfig(batch_size=case.batch, max_new_tokens=chosen.new_tokens)
    small = replace(settings, batch_size=PLAIN_BATCH)
    padding, kept = Padding(model), KeepsTokens(tokenizer)
    longest = max(map(len, prompts)) + chosen.new_tokens
    forms = []

    def plain(config: EvaluationConfig, rows: list[int]) -> list[generate.Answer]:
        return generate.generate(model, kept, [prompts[index] for index in rows], config)

    def ours() -> list[generate.Answer]:
        dense = False if case.form == "4bit" else None
        with answering_form(model, rows=case.batch, tokens=longest, dense=dense) as form:
            forms.append(form)
            return generate.generate(model, kept, prompts, settings, form=form)

    everything = list(range(len(prompts)))
    few, same = (plain_rows(len(prompts), size, chosen.plain_batches) for size in (PLAIN_BATCH, case.batch))
    plain(
        replace(small, max_new_tokens=2), few[:PLAIN_BATCH]
    )  # kernels are chosen and libraries loaded outside the clock
    variants = {
        f"plain, batch {PLAIN_BATCH}": (few, lambda: plain(small, few)),
        f"plain, batch {case.batch}": (same, lambda: plain(settings, same)),
        "ours": (everything, ours),
    }
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {"prompts": len(prompts), "longest_prompt": longest - chosen.new_tokens, "variants": {}}
    answers: dict[str, dict[int, generate.Answer]] = {}
    tokens_of: dict[str, dict[int, list[int]]] = {}
    for _ in range(chosen.rounds):
        for name, (rows, run) in variants.items():
            padding.begin()
            kept.answers = []
            given, seconds = timed(run)
            answers[name] = dict(zip(rows, given, strict=True))
            tokens_of[name] = dict(zip(rows, kept.answers, strict=True))
            one = found["variants"].setdefault(name, {"rows": len(rows), "tokens_per_s": [], "seconds": []})
            one["tokens_per_s"].append(round(sum(answer.tokens for answer in given) / seconds, 1))
            one["seconds"].append(round(seconds, 2))
            one["mean_prompt_tokens"] = round(sum(len(prompts[index]) for index in rows) / len(rows), 1)
            one["padded_share"] = padding.share()
            one["stop_rate"] = round(sum(answer.stopped for answer in given) / len(given), 4)
            if ON_GPU:
                one["peak_gib"] = round(gib(torch.cuda.max_memory_allocated()), 2)
                torch.cuda.reset_peak_memory_stats()
            print(json.dumps({"variant": name} | one), flush=True)
    same_batch = f"plain, batch {case.batch}"
    apart = [
        margin(model, prompts[index], tokens_of[same_batch][index], tokens_of["ours"][index])
        for index, answer in answers[same_batch].items()
        if answer.text != answers["ours"][index].text
    ]
    margins = {"median": round(statistics.median(apart), 4), "largest": round(max(apart), 4)} if apart else None
    return (
        found
        | summary(found["variants"], answers, str(forms[-1]).splitlines())
        | {"margins_at_first_difference": margins}
    )


def summary(variants: dict[str, Any], answers: dict[str, Any], form: list[str]) -> dict[str, Any]:
    """Ratios of the middle speeds (of two rounds, the faster), and in how many rows the plain answers are ours to the letter."""
    speeds = {name: sorted(one["tokens_per_s"])[len(one["tokens_per_s"]) // 2] for name, one in variants.items()}
    eight, same, ours = speeds
    shared = sorted(set(answers[same]) & set(answers[ours]))
    equal = sum(answers[same][index].text == answers[ours][index].text for index in shared)
    alike = sorted(set(answers[eight]) & set(answers[same]))
    plain_equal = sum(answers[eight][index].text == answers[same][index].text for index in alike)
    return {
        "form": form,
        "times_plain_same_batch": round(speeds[ours] / speeds[same], 2),
        "times_plain_batch_8": round(speeds[ours] / speeds[eight], 2),
        "answers_equal_to_plain": [equal, len(shared)],
        "plain_answers_equal_between_batches": [plain_equal, len(alike)],
    }


def main() -> None:
    """Measures each case and writes after each, so that a case that fails loses none."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("out", type=Path)
    options.add_argument("cases", nargs="+", type=Case.parse)
    options.add_argument("--data", default="embedded", help="a data file; else the embedded corpus")
    options.add_argument("--rows", type=int, default=256, help="prompts")
    options.add_argument("--new-tokens", type=int, default=80, help="longest answer")
    options.add_argument("--seq-len", type=int, default=1024, help="longest prompt with its answer, tokens")
    options.add_argument(
        "--plain-batches", type=int, default=2, help="batches of neighbours in length, by which plain answers are timed"
    )
    options.add_argument("--rounds", type=int, default=2, help="turns of all variants")
    chosen = options.parse_args()
    results: dict[str, Any] = {
        "machine": machine_name(torch.device("cuda" if ON_GPU else "cpu")),
        "versions": workflow.versions(),
        "options": {name: value for name, value in vars(chosen).items() if name not in ("out", "cases", "data")},
        "data": Path(chosen.data).name,
        "cases": [],
    }
    for case in chosen.cases:
        try:
            found = measure(case, chosen)
        except torch.cuda.OutOfMemoryError as error:
            found = {"out_of_memory": str(error).split(". ")[0]}
        except Exception as error:  # one case that fails is a result too
            found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
        line = vars(case) | {"model": Path(case.model).name.removesuffix(".gguf")} | found
        results["cases"].append(line)
        print(json.dumps(line), flush=True)
        chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
