"""Fills the README's figures from the JSON files beside this script; `--check` fails where they differ.

    .venv/bin/python benchmarks/readme.py [--check]

Between `<!-- figures:NAME -->` and `<!-- /figures -->` stands what this script wrote, and nothing that a person typed.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

from qlora_helpers.base.files import read_json, write_text
from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import GPUS
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.model.shapes.sizes import ModelSizes, adapter_parameters, model_sizes
from qlora_helpers.planning.memory import CONTEXT_BYTES, GRAPHS_BYTES, GpuMemory, predict
from qlora_helpers.planning.speed import step_seconds
from qlora_helpers.planning.step_settings import StepSettings

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
    "recipe": "the 2023 recipe",
    "trl": "TRL",
    "trl_liger": "TRL with Liger kernels",
    "unsloth": "Unsloth",
    "fast": "**this project**",
    "fast_host": "**this project**, embedding on the host",
}
OURS = ("fast", "fast_host")
VARIANTS_OF_OURS = (*OURS, "fast_host_all", "captured", "launched", "remade")


def measured_steps() -> list[dict[str, Any]]:
    """The steps that were measured on one GPU, but for those whose layers another trainer had replaced in the same process, and
    those with the embedding on the host that still waited for their tokens.

    TRL on Liger's layers is TRL with Liger, whoever brought them.
    """
    found = []
    for case in read_json(HERE / "step_speed_one_gpu.json")["cases"]:
        on_liger = "trl_liger" in case.get("after", ())
        waited = case.get("offloaded") and "captured" not in case
        if "step_s" in case and not waited and (not on_liger or case["variant"].startswith("trl")):
            found.append(case | {"variant": "trl_liger" if on_liger else case["variant"]})
    return found


def every_own_step() -> list[dict[str, Any]]:
    """Our steps in processes of our own, so that what they held is theirs."""
    return [
        case
        for case in measured_steps()
        if case.get("layers_checkpointed") is not None and case["variant"] != "recipe" and not case.get("after")
    ]


def own_steps() -> list[dict[str, Any]]:
    """Of each of our steps the last one measured."""
    return list({(case["model"], _step_name(case)): case for case in every_own_step()}.values())


def trainers() -> str:
    """Trainers side by side by model and memory limit: every trainer's step, and ours in the same call against it."""
    lines = [
        "| model | limit | trainer | blocks | recomputed | tokens/s | share of the roof | peak GiB | first step | ours is faster |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in compared():
        for case in sorted(group, key=lambda case: case["tokens_per_s"]):
            sizes = model_sizes(SHAPES[case["model"]])
            flop = 4 * sizes.blocks * sizes.linear_parameters_per_layer * case["tokens_per_s"]
            again = case.get("layers_checkpointed")
            again = ("none" if case["checkpointed"] == 0 else "all") if again is None else f"{again} of {sizes.blocks}"
            blocks = (
                f"{case['blocks']} x {case['seq_len_tokens']:,}" if case["variant"] != "recipe" else "8 padded rows"
            )
            ours = ours_beside(case)
            faster = "" if case["variant"] in OURS else f"{ours['tokens_per_s'] / case['tokens_per_s']:.2f} times"
            faster += "" if ours["call"] == case["call"] else " *"
            lines.append(
                f"| {case['model']} | {case['limit_gib']:g} GiB | {_trainer(case)} | {blocks} | {again} | "
                f"{case['tokens_per_s']:,.0f} | {flop / case['matrix_tflops'] / 1e12:.0%} | "
                f"{case['peak_reserved_gib']:.1f}{_if_not_growing(case)} | {case['first_step_s']:.0f} s | {faster} |"
            )
    small = [case for case in measured_steps() if target_of(case) == ("falcon-40b", 24)][-1]
    (recipe,) = [case for case in measured_steps() if (case["call"], case["variant"]) == (small["call"], "recipe")]
    within = (
        f"Within 24 GiB Falcon-40B trains {small['tokens_per_s'] / recipe['tokens_per_s']:.1f} times as fast as the recipe on "
        f"79 GiB, on the same card. {_same_loss()} {_launched()} {_skipped()} {_starts()}"
    )
    other = (
        "* against a step of ours in another call of the script; † in segments that did not grow (with growing ones the recipe's "
        f"step reserved {recipe['peak_reserved_gib']:.1f} GiB)"
    )
    return "\n".join([*lines, "", other, "", within, "", _source("step_speed"), ""])


def _same_loss() -> str:
    """What a loss on all tokens costs, in one call."""
    every = [case for case in measured_steps() if case["variant"] == "fast_host_all"][-1]
    usual = ours_beside(every)
    (group,) = [group for group in compared() if target_of(group[0]) == target_of(every)]
    unsloth = next(case for case in group if case["variant"] == "unsloth")
    ahead, planned = every["tokens_per_s"] / unsloth["tokens_per_s"], []
    for group in [group for group in compared() if len(group) > 1]:
        ours = max((case for case in group if case["variant"] in OURS), key=lambda case: case["tokens_per_s"])
        sizes, step = step_of(ours)
        usual_s, every_s = (
            step_seconds(sizes, replace(step, trained_share=share), GPUS["H100"]) for share in (step.trained_share, 1.0)
        )
        planned.append(f"{1 - usual_s / every_s:.1%} ({ours['model']}, {ours['limit_gib']:g} GiB)")
    return (
        f"With its loss on all tokens, as theirs, ours takes {every['tokens_per_s']:,.0f} tokens/s within "
        f"{every['limit_gib']:g} GiB in place of {usual['tokens_per_s']:,.0f}, {ahead:.2f} times Unsloth's. Elsewhere that was not "
        f"measured; by the plan's arithmetic ours would be slower by {', '.join(planned)}."
    )


def _skipped() -> str:
    """What it gives that recomputed layers leave products out, in one call."""
    remade = [case for case in measured_steps() if case["variant"] == "remade"][-1]
    same = (remade["call"], "fast", *target_of(remade))
    (usual,) = [case for case in measured_steps() if (case["call"], case["variant"], *target_of(case)) == same]
    return (
        f"Where {remade['model']} recomputes every layer with {remade['blocks']} blocks, leaving out what nothing reads makes "
        f"{usual['tokens_per_s']:,.0f} tokens/s of {remade['tokens_per_s']:,.0f}."
    )


def _launched() -> str:
    """What playing recorded passes gives where the GPU waited for Python, in one call."""
    launched = [case for case in measured_steps() if case["variant"] == "launched"][-1]
    replayed = ours_beside(launched)
    return (
        f"{launched['model']}'s step takes {replayed['step_s']:.3f} s replayed and {launched['step_s']:.3f} s where Python starts "
        f"each of its kernels."
    )


def _starts() -> str:
    """How long a model with random weights takes to be there, and a recording."""
    built = {
        model: min(case["load_s"] for case in measured_steps() if case["model"] == model and case.get("load_s"))
        for model in ("falcon-40b", "llama-3.1-8b")
    }
    recorded = [case["capture_s"] for case in measured_steps() if case.get("passes_replayed")]
    return (
        "True-size random weights were there after "
        + " and ".join(f"{seconds:.1f} s ({model})" for model, seconds in built.items())
        + f"; recording a step takes {min(recorded):.1f} to {max(recorded):.1f} s."
    )


def _trainer(case: dict[str, Any]) -> str:
    not_replayed = case["variant"] in OURS and not case.get("captured")
    return TRAINERS[case["variant"]] + (", not played" if not_replayed else "")


def _if_not_growing(case: dict[str, Any]) -> str:
    return "" if case.get("segments_expand", True) else " †"


def ours_beside(case: dict[str, Any]) -> dict[str, Any]:
    """This project's fastest step on a case's model within its limit, as it is now: of its call, else of the last."""
    cases = [ours for ours in measured_steps() if ours["variant"] in OURS and target_of(ours) == target_of(case)]
    calls = {ours["call"] for ours in cases if "captured" in ours} or {ours["call"] for ours in cases}
    call = case["call"] if case["call"] in calls else max(calls)
    return max((ours for ours in cases if ours["call"] == call), key=lambda ours: ours["tokens_per_s"])


def target_of(case: dict[str, Any]) -> tuple[str, float]:
    """Model and limit."""
    return case["model"], case["limit_gib"]


def compared() -> list[list[dict[str, Any]]]:
    """Steps by model and limit: ours of the last call that has any, of each other trainer the fastest of all calls that fits.

    A step of theirs that was measured within a smaller limit counts in a larger one too. Of two of theirs as fast as each other,
    the one beside ours: a ratio within a call is worth more.
    """
    cases = [case for case in measured_steps() if case["limit_gib"] and "profile" not in case]
    groups: dict[tuple, dict[str, dict[str, Any]]] = {target_of(case): {} for case in cases if case["variant"] in OURS}
    for (model, limit), group in groups.items():
        for case in cases:
            if case["variant"] not in TRAINERS or case["model"] != model:
                continue
            if case["variant"] in OURS:
                last = (
                    case["limit_gib"] == limit and case["call"] >= ours_beside(case)["call"] and not case.get("after")
                )
                group |= {case["variant"]: case} if last else {}
            elif case["peak_reserved_gib"] <= limit:
                case = case | {"limit_gib": limit}
                group[case["variant"]] = max(group.get(case["variant"], case), case, key=_as_fast)
    order = sorted(groups, key=lambda target: (target[0] == "falcon-40b", target))
    return [list(groups[target].values()) for target in order]


SAME_SPEED = 0.02  # what the same step differs by from call to call


def _as_fast(case: dict[str, Any]) -> float:
    """Tokens a second, a little more where ours was measured in the same call."""
    return case["tokens_per_s"] * (1 + SAME_SPEED * (ours_beside(case)["call"] == case["call"]))


def predicted() -> str:
    """Measured steps beside the plan's arithmetic."""
    lines = [
        "| model | step | allocated GiB, measured | predicted | reserved, measured | predicted | step s, measured | predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cases = own_steps()
    errors: dict[str, list[float]] = {}

    def off(name: str, by: float) -> None:
        errors.setdefault(name, []).append(by)

    for case in cases:
        memory, seconds = _predicted(case)
        held_out = "" if case["model"] in CALIBRATED else " *"
        lines.append(
            f"| {case['model']}{held_out} | {_step_name(case)} | {case['peak_allocated_gib']:.2f} | {gib(memory.allocated):.2f} | "
            f"{case['peak_reserved_gib']:.2f} | {gib(memory.reserved):.2f} | {case['step_s']:.3f} | {seconds:.3f} |"
        )
    for case in every_own_step():
        memory, seconds = _predicted(case)
        held_out = case["model"] not in CALIBRATED
        weights = gib(memory.weights + memory.adapters)
        rest = case["peak_allocated_gib"] - case["weights_gib"] + _sent_to_host_gib(case)
        off("allocated", gib(memory.allocated) / case["peak_allocated_gib"] - 1)
        if held_out:
            off("allocated, held out", gib(memory.allocated) / case["peak_allocated_gib"] - 1)
        grew = "" if case.get("segments_expand", True) else ", segments not growing"
        off("reserved" + grew, gib(memory.reserved) / case["peak_reserved_gib"] - 1)
        off("without weights", (gib(memory.allocated) - weights) / rest - 1)
        off("held-out speed" if held_out else "speed", seconds / case["step_s"] - 1)
    worst = {name: f"{max(map(abs, found)):.1%}" for name, found in errors.items()}
    within = (
        f"{len(cases)} cases of {len({case['model'] for case in cases})} models, the last of each among {len(errors['allocated'])} "
        f"steps that were measured. All of these: allocated within {worst['allocated']} (held out: "
        f"{worst['allocated, held out']}), reserved within {worst['reserved']} ({worst['reserved, segments not growing']} in the "
        f"{len(errors['reserved, segments not growing'])} whose segments did not grow), all but the weights within "
        f"{worst['without weights']}; seconds of the models held out (*) within {worst['held-out speed']}, of the others within "
        f"{worst['speed']}. {_outside()}"
    )
    return "\n".join([*lines, "", within, "", _source("step_speed"), ""])


def _outside() -> str:
    """What a process holds of the card beside PyTorch's memory, and what the plan takes for it."""
    held = {
        replayed: [
            case["outside_gib"]
            for case in read_json(HERE / "step_speed_one_gpu.json")["cases"]
            if case.get("outside_gib")
            and bool(case.get("passes_replayed")) == replayed
            and case["variant"] in VARIANTS_OF_OURS
        ]
        for replayed in (False, True)
    }
    return (
        f"Beside PyTorch's memory the process held {min(held[False]):.2f} GiB of the card before it had recorded anything, and up "
        f"to {max(held[True]):.2f} with recorded passes; the plan counts {gib(CONTEXT_BYTES):.2f} and "
        f"{gib(CONTEXT_BYTES + GRAPHS_BYTES):.2f}."
    )


def _sent_to_host_gib(case: dict[str, Any]) -> float:
    """What was counted among the weights before training, and left the GPU for it."""
    sizes, step = step_of(case)
    return gib(2 * sizes.vocab * sizes.hidden) if step.offloaded else 0.0


CALIBRATED = ("falcon-40b", "llama-3.1-8b", "smollm2-135m")
"""The models that the constants of speed were fitted to; the others were held out."""


def _source(script: str) -> str:
    found = read_json(HERE / f"{script}_one_gpu.json")
    versions = ", ".join(
        f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "peft", "bitsandbytes")
    )
    return f"{found['machine']}; {versions}; `benchmarks/{script}.py`, `benchmarks/{script}_one_gpu.json`."


def _step_name(case: dict[str, Any]) -> str:
    name = f"{case['blocks']} x {case['seq_len_tokens']:,}, {case['layers_checkpointed']} recomputed"
    name += "" if case["compiled"] else ", not compiled"
    name += ", played" if case.get("captured") else ""
    name += ", embedding on the host" if case.get("offloaded") else ""
    name += "".join(f", {what}" for what in ("dropout", "dora", "plain") if case.get(what))
    return name + (", loss on all tokens" if case["trained_share"] > 0.9 else "")


def plot() -> str:
    """Tokens a second of each trainer within each limit, as SVG."""
    from matplotlib.figure import Figure

    groups = [group for group in compared() if len(group) > 1]
    figure = Figure(figsize=(8, 0.62 * sum(map(len, groups))))
    places = figure.subplots(len(groups), 1, gridspec_kw={"height_ratios": [len(group) for group in groups]})
    for axes, group in zip(places, groups, strict=True):
        group = sorted(group, key=lambda case: -case["tokens_per_s"])
        names = [TRAINERS[case["variant"]].replace("*", "") for case in group]
        colours = ["#2b7a78" if case["variant"] in OURS else "#9aa5b1" for case in group]
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
        seq_len_tokens=case["seq_len_tokens"],
        blocks=case["blocks"],
        compiled=case["compiled"],
        r=case["r"],
        checkpointed=case["layers_checkpointed"],
        offloaded=case.get("offloaded", False),
        adapter_parameters=adapter_parameters(shape, case["r"], None, case.get("dora", False)),
        trained_share=case["trained_share"],
        dropout=case.get("dropout", False),
        dora=case.get("dora", False),
        fast_adapters=not case.get("plain", False),
        chunked_loss=not case.get("plain", False),
        captured=case.get("captured", False),
        skipped=any("made once" in line for line in case.get("fast_step") or ()),
    )


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
    lines = ["| | model | block | micro-batch | rows | step s | tokens/s |", "|---|---|---|---|---|---|---|"]
    machines = {"two_cores": "two CPU cores", "one_gpu": "one GPU"}
    for name, machine in machines.items():
        lines += [
            f"| {machine} | {point['model']} | {point['seq_len_tokens']:,} | {point['blocks']} | {point['rows']:,} | "
            f"{point['step_s']:.2f} | {point['tokens_per_s']:,.0f} |"
            for point in read_json(HERE / f"growth_{name}.json")["points"]
        ]
    files = ", ".join(f"`benchmarks/growth_{name}.json`" for name in machines)
    return "\n".join([*lines, "", f"`benchmarks/growth.py`, {files}.", ""])


def gpu_tests() -> str:
    """The fast step's own tests on a GPU, as far as they ran, and what it learns beside the plain path."""
    cases = read_json(HERE / "fast_step_one_gpu.json")["cases"]
    passed, replayed = (sum(bool(case.get(name)) for case in cases) for name in ("passed", "replayed"))
    errors = {path: max(case[f"{path}_gradient_error"] for case in cases) for path in ("fast", "plain")}
    packed = [case for case in cases if case["row_packed_error"] is not None]
    rows = {kind: max(case[f"row_{kind}_error"] for case in packed) for kind in ("packed", "alone")}
    quality = read_json(HERE / "quality_one_gpu.json")
    apart = max(map(abs, quality["fast_against_plain"].values()))
    fast = [run for run in quality["runs"] if run["path"] == "fast"]
    how = " and ".join(
        name for name, key in (("compiled", "compiled"), ("replayed", "captured")) if all(run[key] for run in fast)
    )
    return (
        f"On the GPU's own path {passed} of {len(cases)} cases passed, {replayed} of them with captured passes: gradients in "
        f"bfloat16 lie within {errors['fast']:.1%} of those in 32 bits, the plain path's within {errors['plain']:.1%}; a packed row's "
        f"logits within {rows['packed']:.1%}, those of the row alone within {rows['alone']:.1%} "
        "(`tests/gpu/fast_step_on_gpu.py`, `benchmarks/fast_step_one_gpu.json`). "
        f"After {quality['steps']} steps of SmolLM2-135M on DialogSum with {len(quality['fast_against_plain'])} seeds, its "
        f"evaluation loss on the fast step, {how}, lies within {apart:.2%} of the plain path's "
        f"({fast[0]['machine']}; `benchmarks/quality.py`, `benchmarks/quality_one_gpu.json`).\n"
    )


def _on_two_cores() -> str:
    """Two processes on a CPU against one that sees the same blocks."""
    found = read_json(HERE / "two_processes_two_cores.json")
    pairs = zip(found["copied"]["losses"], found["alone"]["losses"], strict=True)
    apart = max(abs(one - other) / other for one, other in pairs)
    return (
        f"In two processes on a CPU they lie within {apart:.2%} over {len(found['alone']['losses'])} steps "
        "(`benchmarks/two_processes_two_cores.json`)."
    )


def two_gpus() -> str:
    """What was measured on two GPUs beside the plan."""
    found = read_json(HERE / "two_gpus.json")
    lines = [
        "| two GPUs | allocated GiB, measured | predicted | reserved, measured | predicted | tokens/s, measured | predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {
        "copied": "a copy of Llama 8 B on each (torchrun)",
        "spread": "Falcon-40B's layers over both, 30 of 60 recomputed",
    }
    for name, what in names.items():
        measured, predicted = found[name]["measured"], found[name]["predicted"]
        gpus = list(predicted["allocated_gib"])
        both = [
            " and ".join(f"{values[gpu]:.1f}" for gpu in gpus)
            for values in (
                measured["peak_gib"],
                predicted["allocated_gib"],
                measured["reserved_gib"],
                predicted["reserved_gib"],
            )
        ]
        lines.append(
            f"| {what} | {' | '.join(both)} | {found[name]['tokens_per_s']:,.0f} | {predicted['tokens_per_s']:,.0f} |"
        )
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    pair = found["at_a_learning_rate_of_2e-4"]
    losses = zip(pair["copied"]["losses"], pair["alone"]["losses"], strict=True)
    apart = [abs(one - other) / other for one, other in losses]
    learnt = (
        "That copies learn what one GPU learns was not shown there: in the one pair that saw the same blocks (at a learning rate "
        f"at which random weights diverge from rounding) the first five losses lie within {max(apart[:5]):.1%}, later ones up to "
        f"{max(apart[5:]):.1%} apart. {_on_two_cores()}"
    )
    source = f"{found['machine']}; {packages}; `tests/gpu/several_gpus.py`, `benchmarks/two_gpus.json`."
    return "\n".join([*lines, "", learnt, "", source, ""])


def answers() -> str:
    """How fast held-out rows are answered."""
    found = read_json(HERE / "evaluation_speed_one_gpu.json")
    lines = [
        "| model | answers at once | weights | ours, tokens/s | plain, as many at once | plain, 8 at once | ours is faster | "
        "answers alike | margin where they part |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in found["cases"]:
        eight, same, ours = ([max(one["tokens_per_s"]), one["peak_gib"]] for one in case["variants"].values())
        equal, shared = case["answers_equal_to_plain"]
        among, pairs = case["plain_answers_equal_between_batches"]
        weights = "4 bits" if "weights as loaded" in case["form"][0] else "16-bit copies"
        lines.append(
            f"| {case['model']} | {case['batch']} | {weights} | {ours[0]:,.0f} ({ours[1]:.1f} GiB) | "
            f"{same[0]:,.0f} ({same[1]:.1f} GiB) | {eight[0]:,.0f} | {case['times_plain_same_batch']:.1f} and "
            f"{case['times_plain_batch_8']:.0f} times | {equal} of {shared}; plain with itself {among} of {pairs} | "
            f"{case['margins_at_first_difference']['median']:.2f}, at most {case['margins_at_first_difference']['largest']:.2f} |"
        )
    return "\n".join([*lines, "", _source("evaluation_speed"), ""])


def out_of_memory() -> str:
    """A real out-of-memory error in a notebook's shell."""
    found = read_json(HERE / "out_of_memory_one_gpu.json")
    large, places = found["too_large"], found["places"]
    apart = max(abs(each["ratio"] - 1) for each in (large, *places.values()))
    retry = found["retry"]["settings"]
    return (
        f"{found['model']} ran out of memory in a notebook's shell on a real card ({large['where']}): "
        f"{gib(large['before_bytes']):.2f} GiB were held before and {gib(large['after_bytes']):.2f} after, and `retry` went on "
        f"with {retry['micro_batch_size']} blocks; at {len(places)} other places of a step memory came back to within {apart:.1%} "
        "too (`tests/gpu/oom_on_gpu.py`, `benchmarks/out_of_memory_one_gpu.json`).\n"
    )


def learning() -> str:
    """The recipe against our settings on real data: scores over seeds, and the seconds of one that had the GPU to itself."""
    found, alone = read_json(HERE / "learning_one_gpu.json"), read_json(HERE / "learning_alone_one_gpu.json")
    lines = [
        "| | rows | seed | ROUGE-1 | ROUGE-2 | ROUGE-L | answers that end | loss on the summary | training | evaluation |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_learner(file, case) for file in (found, alone) for case in in_order(file["cases"])]
    base = next(case["scores"]["base"] for case in found["cases"] if "base" in case["scores"])
    (rouge,) = [item for item in found["ours_against_recipe"]["differences"] if item["measure"] == "rouge_l"]
    seeds = sorted({case["seed"] for case in found["cases"]})
    recipe, ours = (
        next(case for case in alone["cases"] if case["variant"] == name and "others_on_the_gpu" not in case)
        for name in ("recipe", "ours")
    )
    own_way = recipe["train_s"] + recipe["plain_s_scaled_to_all"]
    taken = ours["train_s"] + ours["evaluation_s"]
    text = (
        f"SmolLM2-135M-Instruct, one epoch of {found['train_rows']:,} or {alone['train_rows']:,} rows of DialogSum "
        f"({found['share']:.0%} and {alone['share']:.0%} of its training set), asked on {rouge['rows']} dev rows that neither "
        f"saw and that nothing was tuned on ({found['dev_rows_also_in_training']} dev rows stand in the training set too and "
        f"were left out). Untuned it has ROUGE-L {base['rouge_l']:.1f} and ends {base['stop_rate']:.0%} of its answers. Ours "
        f"above the recipe after {found['train_rows']:,} rows, means of {len(seeds)} seeds each: {rouge['difference']:.1f} points "
        f"of ROUGE-L, 95 % interval over rows {rouge['low']:.1f} to {rouge['high']:.1f}. With the GPU to itself, training and "
        f"answering took ours {taken:.0f} s, three models asked, and the recipe {own_way:.0f} s with plain generation (timed on "
        f"{recipe['plain_rows_timed']} rows and scaled)."
    )
    shared = "* with the other trainings on the same GPU at once"
    return "\n".join(
        [*lines, "", shared, "", text, "", _source("learning")[:-1] + ", `benchmarks/learning_alone_one_gpu.json`.", ""]
    )


def in_order(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seed by seed."""
    return sorted(cases, key=lambda case: (case["seed"], case["variant"] != "ours"))


def _learner(found: dict[str, Any], case: dict[str, Any]) -> str:
    score = case["scores"]["tuned"]
    shared = " *" if case.get("others_on_the_gpu") else ""
    own_way = f" (its own way: {case['plain_s_scaled_to_all']:.0f} s)" if "plain_s_scaled_to_all" in case else ""
    rouge = " | ".join(f"{score[name]:.1f}" for name in ("rouge1", "rouge2", "rouge_l"))
    return (
        f"| {LEARNERS[case['variant']]} | {found['train_rows']:,} | {case['seed']} | {rouge} | {score['stop_rate']:.1%} | "
        f"{score['loss']:.2f} | {case['train_s']:.0f} s{shared} | {case['evaluation_s']:.0f} s{own_way}{shared} |"
    )


LEARNERS = {"recipe": "the 2023 recipe", "ours": "**this project**"}


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


def missed() -> str:
    """Which aims were not reached, and by how much."""

    def within(limit: float) -> dict[str, dict[str, Any]]:
        (group,) = [group for group in compared() if target_of(group[0]) == ("llama-3.1-8b", limit)]
        return {case["variant"]: case for case in group}

    def ahead(case: dict[str, Any]) -> float:
        return ours_beside(case)["tokens_per_s"] / case["tokens_per_s"]

    def speeds(variant: str, limit: float) -> str:
        cases = [
            case for case in measured_steps() if (case["variant"], *target_of(case)) == (variant, "llama-3.1-8b", limit)
        ]
        sizes = sorted({case["blocks"] for case in cases})
        return "; ".join(
            f"{size} blocks " + ", ".join(f"{case['tokens_per_s']:,.0f}" for case in cases if case["blocks"] == size)
            for size in sizes
        )

    wide, small = within(79), within(10)
    sizes = model_sizes(SHAPES["llama-3.1-8b"])
    unsloth, ours = small["unsloth"], ours_beside(small["unsloth"])
    a_weight = 6 - 2 * sizes.parameters_added_last_per_layer / sizes.linear_parameters_per_layer
    once = sizes.blocks * sizes.linear_parameters_per_layer / ours["matrix_tflops"] / 1e12
    share = 2 * unsloth["tokens_per_s"] * a_weight * once
    beyond = 2.5 * wide["unsloth"]["tokens_per_s"] * 4 * once
    unrecorded = [case for case in own_steps() if case.get("captured") is False and case["variant"] in OURS]
    full = " and ".join(
        f"{case['model']} with {case['blocks']} x {case['seq_len_tokens']:,} within {case['limit_gib']:g} GiB"
        for case in unrecorded
    )
    return (
        f"On the Llama shape Unsloth is the best of the others. Ours is {ahead(wide['unsloth']):.2f} times as fast within 79 GiB, "
        f"where 2.5 times was the aim (that would be {beyond:.0%} of the roof), and {ahead(unsloth):.2f} times within 10 GiB, "
        f"where the aim was twice (every layer is recomputed there, at {a_weight:.1f} operations a weight and token: twice would "
        f"be {share:.0%} of the card's rate). Not every size of theirs was tried, and one step of theirs takes different speeds "
        f"from call to call, of which the fastest counts (the one beside ours, of two within 2 %). "
        f"Unsloth, tokens/s within 7.5 GiB: {speeds('unsloth', 7.5)}; within 10: "
        f"{speeds('unsloth', 10)}; within "
        f"79: {speeds('unsloth', 79)}. Against TRL with Liger kernels ours is {ahead(wide['trl_liger']):.2f} times as fast within "
        f"79 GiB (three times was hoped for) and {ahead(small['trl_liger']):.2f} times within 10 GiB; TRL with Liger, within 10: "
        f"{speeds('trl_liger', 10)}. Where a step fills its limit to the last, a recording of it finds no room and it is taken as "
        f"it is: {full}.\n"
    )


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "gpu": gpu,
    "trainers": trainers,
    "predicted": predicted,
    "cpu speed": cpu_speed,
    "growth": growth,
    "gpu tests": gpu_tests,
    "two gpus": two_gpus,
    "learning": learning,
    "answers": answers,
    "out of memory": out_of_memory,
    "export": export,
    "missed": missed,
}

if __name__ == "__main__":
    sys.exit(main())
