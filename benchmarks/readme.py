"""Fills the README's figures from the JSON files beside this script; `--check` fails where they differ.

    .venv/bin/python benchmarks/readme.py [--check]

Between `<!-- figures:NAME -->` and `<!-- /figures -->` stands what this script wrote, and nothing that a person typed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_helpers.architectures import ModelSizes
from qlora_helpers.catalog import GPUS
from qlora_helpers.memory import StepSettings, predict
from qlora_helpers.model_shapes import SHAPES
from qlora_helpers.model_sizes import adapter_parameters, model_sizes
from qlora_helpers.run import read_json, write_text
from qlora_helpers.speed import step_seconds
from qlora_helpers.units import gib

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


def speed() -> str:
    """Measured steps beside the plan's arithmetic."""
    found = read_json(HERE / "step_speed_one_gpu.json")
    lines = [
        "| model | step | data | tokens/s | peak GiB, measured | predicted | step s, measured | predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in found["cases"]:
        if "tokens_per_s" not in case:
            continue
        cells = [case["model"], _step_name(case), case["data"], f"{case['tokens_per_s']:,.0f}"]
        memory, seconds = _predicted(case) if case["variant"] != "recipe" else (None, None)
        cells += [f"{case['peak_allocated_gib']:.1f}", f"{memory:.1f}" if memory else ""]
        cells += [f"{case['step_s']:.2f}", f"{seconds:.2f}" if seconds else ""]
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(
        f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "peft", "bitsandbytes")
    )
    source = f"{found['machine']}; {versions}; `benchmarks/step_speed.py`, `benchmarks/step_speed_one_gpu.json`."
    return "\n".join([*lines, "", source, ""])


def _step_name(case: dict[str, Any]) -> str:
    if case["variant"] == "recipe":
        return "recipe"
    again = "all" if case["recomputed"] is None else case["recomputed"]
    return f"{case['blocks']} x {case['seq_len_tokens']:,}, {again} recomputed" + (
        "" if case["variant"] == "fast" else ", not compiled"
    )


def step_of(case: dict[str, Any]) -> tuple[ModelSizes, StepSettings]:
    """A measured case as the plan sees it."""
    shape = SHAPES[case["model"]]
    sizes = model_sizes(shape)
    return sizes, StepSettings(
        seq_len_tokens=case["seq_len_tokens"], blocks=case["blocks"], compiled=case["variant"] == "fast", r=case["r"],
        recomputed=sizes.blocks if case["recomputed"] is None else case["recomputed"],
        adapter_parameters=adapter_parameters(shape, case["r"], None, False), trained_share=case["trained_share"],
    )  # fmt: skip


def _predicted(case: dict[str, Any]) -> tuple[float, float]:
    """Peak GiB and seconds a step, by the plan's arithmetic."""
    sizes, step = step_of(case)
    _, (memory,) = predict(sizes, step)
    return gib(memory.allocated), step_seconds(sizes, step, GPUS["H100"])


def cpu_speed() -> str:
    """The demo's step on two cores, plain and fast in turns."""
    found = read_json(HERE / "step_speed_two_cores.json")
    steps = {
        variant: [case["step_s"] for case in found["cases"] if case["variant"] == variant]
        for variant in ("plain", "fast")
    }
    ratios = [plain / fast for plain, fast in zip(steps["plain"], steps["fast"], strict=True)]
    plain, fast = (", ".join(f"{seconds:.1f}" for seconds in steps[name]) for name in ("plain", "fast"))
    return (
        f"On two CPU cores the demo's step took {plain} s on the plain path and {fast} s on the fast one, measured in turns: "
        f"{min(ratios):.2f} to {max(ratios):.2f} times as fast (`benchmarks/step_speed_two_cores.json`).\n"
    )


TABLES: dict[str, Callable[[], str]] = {"demo": demo, "gpu": gpu, "speed": speed, "cpu speed": cpu_speed}

if __name__ == "__main__":
    sys.exit(main())
