"""Fills the README's figures from the JSON files beside this script; `--check` fails where they differ.

    .venv/bin/python benchmarks/readme.py [--check]

Between `<!-- figures:NAME -->` and `<!-- /figures -->` stands what this script wrote, and nothing that a person typed.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from qlora_helpers.architectures import ModelSizes
from qlora_helpers.catalog import GPUS
from qlora_helpers.memory import GpuMemory, StepSettings, predict
from qlora_helpers.model_shapes import SHAPES
from qlora_helpers.model_sizes import adapter_parameters, model_sizes
from qlora_helpers.speed import step_seconds
from qlora_helpers.units import gib
from qlora_helpers.whole_files import read_json, write_text

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def main() -> int:
    """Writes the README, or with `--check` says whether it would change."""
    old = README.read_text(encoding="utf-8")
    new = filled(old)
    if "--check" in sys.argv[1:]:
        print("README.md agrees with benchmarks/" if new == old else "README.md differs: run benchmarks/readme.py")
        return int(new != old)
    write_text(README, new)
    write_text(HERE.parent / "docs" / "step_speed.svg", plot())
    return 0


def filled(text: str) -> str:
    """The README with every marked place filled."""
    for name, table in TABLES.items():
        place = re.compile(rf"(<!-- figures:{name} -->\n).*?(<!-- /figures -->)", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"README.md has no place for {name}")
        content = table()
        text = place.sub(lambda match, content=content: match[1] + content + match[2], text)
    return text


def demo() -> str:
    """Scores and cost of `make demo`."""
    found = read_json(HERE / "demo_two_cores.json")
    lines = ["| data | model | ROUGE-1 | ROUGE-L | answers that end | loss |", "|---|---|---|---|---|---|"]
    names = {"base": "untuned", "base_chat": "untuned, its own chat template", "tuned": "**tuned**"}
    for run in found["runs"]:
        for name, score in run["scores"].items():
            loss = "" if score["loss"] is None else f"{score['loss']:.2f}"
            cells = [
                run["data"].replace(" (not stated (a local file))", ""),
                names[name],
                f"{score['rouge1']:.1f}",
                f"{score['rouge_l']:.1f}",
            ]
            lines.append("| " + " | ".join([*cells, f"{score['stop_rate']:.0%}", loss]) + " |")
    times = "; ".join(
        f"{run['demo_seconds'] / 60:.1f} minutes in all for {run['train_rows']} rows, "
        f"{run['measured']['seconds'] / 60:.1f} of them training, peak {run['measured']['peak_gib']['cpu']:.1f} GiB"
        for run in found["runs"]
    )
    machine = found["machine"]
    versions = found["runs"][0]["measured"]["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    return "\n".join([*lines, "", f"{times} ({machine['cpu']}, {machine['cores']} cores; {packages}).", ""])


def gpu() -> str:
    """A model at true size on one real GPU."""
    found = read_json(HERE / "true_size_one_gpu.json")
    lines = [
        "| model | weights | layers in 4 bits | loss in 20 steps | peak | reloaded logits |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in found["models"].items():
        weights, peak = sum(run["weights_gib"].values()), sum(run["peak_gib"].values())
        difference = run["reload_difference"]
        same = "equal" if difference == 0 else f"within {difference:.0e}"
        lines.append(
            f"| {name} ({run['parameters']:,} parameters) | {weights:.2f} GiB | {run['linear_layers_in_4_bit']} | "
            f"{run['first_loss']:.2f} to {run['last_loss']:.2f} | {peak:.2f} GiB | {same} |"
        )
    versions = found["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    return "\n".join(
        [*lines, "", f"{found['gpu']}; {packages}; `tests/gpu/run_on_gpu.py`, `benchmarks/true_size_one_gpu.json`.", ""]
    )


TRAINERS = {
    "recipe": "the 2023 recipe", "trl": "TRL", "trl_liger": "TRL with Liger kernels", "unsloth": "Unsloth",
    "fast": "**this project**",
}  # fmt: skip


def measured_steps() -> list[dict[str, Any]]:
    """The steps that were measured on one GPU."""
    return [case for case in read_json(HERE / "step_speed_one_gpu.json")["cases"] if "step_s" in case]


def trainers() -> str:
    """Trainers side by side: of each call, model and memory limit, every trainer's step, and ours against the best other."""
    lines = [
        "| model | limit | trainer | blocks | recomputed | tokens/s | share of the roof | peak GiB | first step | ours is faster |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in compared():
        ours = max(case["tokens_per_s"] for case in group if case["variant"] == "fast")
        for case in sorted(group, key=lambda case: case["tokens_per_s"]):
            sizes = model_sizes(SHAPES[case["model"]])
            flop = 4 * sizes.blocks * sizes.linear_parameters_per_block * case["tokens_per_s"]
            again = case.get("layers_recomputed")
            again = ("none" if case["recomputed"] == 0 else "all") if again is None else f"{again} of {sizes.blocks}"
            blocks = (
                f"{case['blocks']} x {case['seq_len_tokens']:,}" if case["variant"] != "recipe" else "8 padded rows"
            )
            faster = "" if case["variant"] == "fast" else f"{ours / case['tokens_per_s']:.1f} times"
            lines.append(
                f"| {case['model']} | {case['limit_gib']:g} GiB | {TRAINERS[case['variant']]} | {blocks} | {again} | "
                f"{case['tokens_per_s']:,.0f} | {flop / case['matrix_tflops'] / 1e12:.0%} | "
                f"{case['peak_reserved_gib']:.1f} | {case['first_step_s']:.0f} s | {faster} |"
            )
    return "\n".join([*lines, "", _source("step_speed"), ""])


def compared() -> list[list[dict[str, Any]]]:
    """Steps by model and limit, of the last call that measured them; the fastest of each trainer."""
    groups: dict[tuple, dict[str, dict[str, Any]]] = {}
    for case in measured_steps():
        if case["limit_gib"] and case["variant"] in TRAINERS and "profile" not in case:
            group = groups.setdefault((case["call"], case["model"], case["limit_gib"]), {})
            if case["tokens_per_s"] > group.get(case["variant"], case | {"tokens_per_s": 0})["tokens_per_s"]:
                group[case["variant"]] = case
    last = {(model, limit): list(group.values()) for (_, model, limit), group in sorted(groups.items())}
    return list(last.values())


def predicted() -> str:
    """Measured steps beside the plan's arithmetic."""
    lines = [
        "| model | step | allocated GiB, measured | predicted | reserved, measured | predicted | step s, measured | predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    seen = set()
    for case in measured_steps():
        if case.get("layers_recomputed") is None or case["variant"] == "recipe":
            continue
        step = _step_name(case)
        if (case["model"], step) in seen:
            continue
        seen.add((case["model"], step))
        memory, seconds = _predicted(case)
        held_out = "" if case["model"] in CALIBRATED else " *"
        lines.append(
            f"| {case['model']}{held_out} | {step} | {case['peak_allocated_gib']:.2f} | {gib(memory.allocated):.2f} | "
            f"{case['peak_reserved_gib']:.2f} | {gib(memory.reserved):.2f} | {case['step_s']:.3f} | {seconds:.3f} |"
        )
    return "\n".join([*lines, "", _source("step_speed"), ""])


CALIBRATED = ("falcon-40b", "llama-3.1-8b")
"""The models that the constants of speed were fitted to; the others were held out."""


def _source(script: str) -> str:
    found = read_json(HERE / f"{script}_one_gpu.json")
    versions = ", ".join(
        f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "peft", "bitsandbytes")
    )
    return f"{found['machine']}; {versions}; `benchmarks/{script}.py`, `benchmarks/{script}_one_gpu.json`."


def _step_name(case: dict[str, Any]) -> str:
    name = f"{case['blocks']} x {case['seq_len_tokens']:,}, {case['layers_recomputed']} recomputed"
    name += "" if case["compiled"] else ", not compiled"
    return name + (", loss on all tokens" if case["trained_share"] > 0.9 else "")


def plot() -> str:
    """Tokens a second of each trainer within each limit, as SVG."""
    from matplotlib.figure import Figure

    groups = [group for group in compared() if len(group) > 1]
    figure = Figure(figsize=(8, 0.62 * sum(map(len, groups))))
    places = figure.subplots(len(groups), 1, gridspec_kw={"height_ratios": [len(group) for group in groups]})
    for axes, group in zip(places, groups, strict=True):
        group = sorted(group, key=lambda case: -case["tokens_per_s"])
        names = [TRAINERS[case["variant"]].strip("*") for case in group]
        colours = ["#2b7a78" if case["variant"] == "fast" else "#9aa5b1" for case in group]
        bars = axes.barh(names, [case["tokens_per_s"] for case in group], color=colours)
        axes.bar_label(bars, [f"{case['tokens_per_s']:,.0f}" for case in group], padding=4)
        axes.set_title(f"{group[0]['model']} within {group[0]['limit_gib']:g} GiB, tokens/s", loc="left", fontsize=10)
        axes.margins(x=0.12)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_xticks([])
    figure.tight_layout()
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "qlora", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    return text.getvalue()


def step_of(case: dict[str, Any]) -> tuple[ModelSizes, StepSettings]:
    """A measured case as the plan sees it."""
    shape = SHAPES[case["model"]]
    sizes = model_sizes(shape)
    return sizes, StepSettings(
        seq_len_tokens=case["seq_len_tokens"], blocks=case["blocks"], compiled=case["compiled"], r=case["r"],
        recomputed=case["layers_recomputed"],
        adapter_parameters=adapter_parameters(shape, case["r"], None, False), trained_share=case["trained_share"],
    )  # fmt: skip


def _predicted(case: dict[str, Any]) -> tuple[GpuMemory, float]:
    """Memory and seconds of a step, by the plan's arithmetic."""
    sizes, step = step_of(case)
    _, (memory,) = predict(sizes, step)
    return memory, step_seconds(sizes, step, GPUS["H100"])


def cpu_speed() -> str:
    """The demo's step on two cores, plain and fast in turns, and what the fast one spends its time on."""
    cases = read_json(HERE / "step_speed_two_cores.json")["cases"]
    steps = {variant: [case["step_s"] for case in cases if case["variant"] == variant] for variant in ("plain", "fast")}
    ratios = [plain / fast for plain, fast in zip(steps["plain"], steps["fast"], strict=True)]
    plain, fast = (", ".join(f"{seconds:.1f}" for seconds in steps[name]) for name in ("plain", "fast"))
    kinds = next(case for case in cases if case["variant"] == "fast")["profile"]["ms_by_kind"]
    shares = ", ".join(f"{kind} {ms / sum(kinds.values()):.0%}" for kind, ms in kinds.items())
    return (
        f"On two CPU cores the demo's step took {plain} s on the plain path and {fast} s on the fast one, measured in turns: "
        f"{min(ratios):.2f} to {max(ratios):.2f} times as fast. What the fast one costs there: {shares} "
        "(`benchmarks/step_speed_two_cores.json`).\n"
    )


def growth() -> str:
    """How a step grows, one setting at a time."""
    points = read_json(HERE / "growth_two_cores.json")["points"]
    lines = ["| model | block | micro-batch | rows | step s | tokens/s |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {point['model']} | {point['seq_len_tokens']} | {point['blocks']} | {point['rows']} | {point['step_s']:.2f} | "
        f"{point['tokens_per_s']:.0f} |"
        for point in points
    ]
    source = "Two CPU cores; `benchmarks/growth.py`, `benchmarks/growth_two_cores.json`."
    return "\n".join([*lines, "", source, ""])


def gpu_tests() -> str:
    """The fast step's own tests on a GPU, as far as they ran."""
    cases = read_json(HERE / "fast_step_one_gpu.json")["cases"]
    passed = sum(case["passed"] for case in cases)
    errors = {path: max(case[f"{path}_gradient_error"] for case in cases) for path in ("fast", "plain")}
    return (
        f"On the GPU's own path {passed} of {len(cases)} cases that ran (of 12) passed: gradients in 16 bits lie within "
        f"{errors['fast']:.1%} of those in 32 bits, the plain path's within {errors['plain']:.1%} "
        "(`tests/gpu/fast_step_on_gpu.py`, `benchmarks/fast_step_one_gpu.json`).\n"
    )


def export() -> str:
    """What merging into 16-bit files takes."""
    found = read_json(HERE / "export_memory_two_cores.json")
    (case,) = found["cases"]
    bound = found["arithmetic"]["falcon-40b"]["bound_gib"]
    return (
        f"{case['model'].title()} ({case['size_gib']:.1f} GiB) was merged into 16-bit files in {case['seconds']:.0f} s with "
        f"{case['merging_gib']:.2f} GiB at work on two CPU cores (`benchmarks/export_memory_two_cores.json`); "
        f"Falcon-40B needs {bound:.2f} GiB by arithmetic.\n"
    )


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "gpu": gpu,
    "trainers": trainers,
    "predicted": predicted,
    "cpu speed": cpu_speed,
    "growth": growth,
    "gpu tests": gpu_tests,
}

if __name__ == "__main__":
    sys.exit(main())
