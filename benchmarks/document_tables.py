"""The tables and the plot of the documents, made from the records."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from records import (
    CALIBRATED,
    OURS,
    TRAINERS,
    compared,
    ours_beside,
    own_steps,
    planned_on,
    predicted_step,
    record,
    step_name,
)

from qlora_helpers.base.units import gib
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.model.shapes.sizes import model_sizes


def demo() -> str:
    """Scores and cost of `make demo`."""
    found = record("demo_two_cores")
    lines = ["| data | model | ROUGE-1 | ROUGE-L | answers that end | loss |", "|---|---|---|---|---|---|"]
    names = {"base": "untuned", "base_chat": "untuned, its own chat template", "tuned": "**tuned**"}
    names["base_few"] = "untuned, with examples in its prompt"
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
    return "\n".join(lines)


def gpu() -> str:
    """A model at true size on one real GPU."""
    found = record("true_size_one_gpu")
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
    return "\n".join(lines)


def trainers() -> str:
    """Trainers side by side by model and memory limit: every trainer's step, and ours in the same call against it."""
    lines = [
        "| model | limit | trainer | sequences | checkpointed | tokens/s | of the roof | peak GiB | first step | ours is faster |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in compared():
        for case in sorted(group, key=lambda case: case["tokens_per_s"]):
            sizes = model_sizes(SHAPES[case["model"]])
            flop = 4 * sizes.layers * sizes.linear_parameters_per_layer * case["tokens_per_s"]
            again = case.get("layers_checkpointed")
            again = ("none" if case["checkpointed"] == 0 else "all") if again is None else f"{again} of {sizes.layers}"
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
    return "\n".join(lines)


def _trainer(case: dict[str, Any]) -> str:
    not_replayed = case["variant"] in OURS and not case.get("captured")
    return TRAINERS[case["variant"]] + (", not replayed" if not_replayed else "")


def _if_not_growing(case: dict[str, Any]) -> str:
    return "" if case.get("segments_expand", True) else " †"


def predicted() -> str:
    """Measured steps beside the plan's arithmetic."""
    lines = [
        "| model | step | allocated GiB, measured | predicted | reserved, measured | predicted | step s, measured | predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in own_steps():
        memory, seconds = predicted_step(case)
        held_out = "" if case["model"] in CALIBRATED else " *"
        lines.append(
            f"| {case['model']}{held_out} | {step_name(case)} | {case['peak_allocated_gib']:.2f} | {gib(memory.allocated):.2f} | "
            f"{case['peak_reserved_gib']:.2f} | {gib(memory.reserved):.2f} | {case['step_s']:.3f} | {seconds:.3f} |"
        )
    return "\n".join(lines)


def todays() -> str:
    """Today's models at true size on one H200, beside the plan."""
    lines = [
        "| model | step | tokens/s | planned | reserved GiB, measured | planned |",
        "|---|---|---|---|---|---|",
    ]
    for case in record("todays_models_one_gpu")["cases"]:
        memory, seconds = planned_on(case, "H200")
        name, _, layers = case["model"].partition("@")
        what = f"{name}, {layers} of its layers" if layers else name
        what += ", adapters on its experts too" if case["variant"] == "fast_experts" else ""
        what += ", padded, without kernels" if case.get("padded") else ""
        lines.append(
            f"| {what} | {step_name(case)} | {case['tokens_per_s']:,.0f} | {case['tokens_per_step'] / seconds:,.0f} | "
            f"{case['peak_reserved_gib']:.1f} | {gib(memory.reserved):.1f} |"
        )
    return "\n".join(lines)


def tickets() -> str:
    """Fields out of support tickets, by seed."""
    lines = [
        "| seed | valid answers: untuned | with examples | tuned | field F1: untuned | with examples | tuned | "
        "tuned above examples |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in record("tickets_one_gpu")["cases"]:
        by = {
            (rival, item["measure"]): item for rival, found in case["against"].items() for item in found["differences"]
        }
        few = by["base_few", "field_f1"]
        valid = [by["base", "valid_json"]["first"], by["base_few", "valid_json"]["first"]]
        cells = [f"{value:.0f} %" for value in (*valid, by["base", "valid_json"]["second"])]
        cells += [f"{value:.1f}" for value in (by["base", "field_f1"]["first"], few["first"], few["second"])]
        above = f"{few['difference']:+.1f} ({few['low']:.1f} to {few['high']:.1f})"
        lines.append("| " + " | ".join([str(case["seed"]), *cells, above]) + " |")
    return "\n".join(lines)


def growth() -> str:
    """How a step grows, one setting at a time."""
    lines = ["| | model | block | micro-batch | rows | step s | tokens/s |", "|---|---|---|---|---|---|---|"]
    machines = {"two_cores": "two CPU cores", "one_gpu": "one GPU"}
    for name, machine in machines.items():
        lines += [
            f"| {machine} | {point['model']} | {point['seq_len_tokens']:,} | {point['blocks']} | {point['rows']:,} | "
            f"{point['step_s']:.2f} | {point['tokens_per_s']:,.0f} |"
            for point in record(f"growth_{name}")["points"]
        ]
    return "\n".join(lines)


def two_gpus() -> str:
    """What was measured on two GPUs beside the plan."""
    found = record("two_gpus")
    lines = [
        "| two GPUs | allocated GiB, measured | predicted | reserved, measured | predicted | tokens/s, measured | predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {
        "copied": "a copy of Llama 8 B on each (torchrun)",
        "spread": "Falcon-40B's layers over both, 30 of 60 layers checkpointed",
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
    return "\n".join(lines)


def answers() -> str:
    """How fast held-out rows are answered."""
    found = record("evaluation_speed_one_gpu")
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
    return "\n".join(lines)


def learning() -> str:
    """The recipe against our settings on real data: scores over seeds, and the seconds of one that had the GPU to itself."""
    found, alone = record("learning_one_gpu"), record("learning_alone_one_gpu")
    lines = [
        "| | rows | seed | ROUGE-1 | ROUGE-2 | ROUGE-L | answers that end | loss on the summary | training | evaluation |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_learner(file, case) for file in (found, alone) for case in in_order(file["cases"])]
    return "\n".join(lines)


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


def families() -> str:
    """Every judged family of causal language models: how far it comes, its rows, what stays out of 4 bits, and its plan."""
    lines = [
        "| family | result | rows | in 16 or 32 bits, beside embedding, head and vectors | plan's parameters | plan's bytes |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in record("matrix_two_cores")["families"].items():
        rows = {True: "packed", False: "padded", None: ""}[found.get("packed")]
        why = found.get("why_padded")
        kept = {reason: share for reason, share in found.get("reasons", {}).items() if reason not in COMMON_REASONS}
        cells = [
            name,
            "**passes**" if found["passed"] else _stopped(found["failed"]),
            f"{rows}: {_cell(why)}" if why else rows,
            ", ".join(f"{reason} {share:.1%}" for reason, share in kept.items())
            or ("none" if "reasons" in found else ""),
            _planned(found.get("plan"), "off"),
            _planned(found.get("plan"), "bytes_off"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


COMMON_REASONS = ("embedding", "output head", "norms, biases and other vectors")
STAGES = {
    "build": "its tiny model is not built",
    "load": "refused when it is loaded",
    "adapters": "refused before training",
    "data": "its rows can't be prepared",
    "plain": "training",
    "fast": "the fast step",
    "certificate": "the certificate",
    "evaluation": "answers",
    "reload": "reloading",
    "export": "the merged export",
}


def _stopped(failed: dict[str, Any]) -> str:
    what = STAGES.get(failed["stage"], failed["stage"])
    return f"{what}: {_cell(failed['sentence'])}"


def _cell(text: str) -> str:
    """A sentence as a cell of a table, without the folders of the machine."""
    text = re.sub(r"(/[\w.-]+){3,}", "...", text).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= 240 else text[:240].rsplit(" ", 1)[0] + " ..."


def _planned(plan: dict[str, Any] | None, name: str) -> str:
    """How far the plan's parameters, or its bytes, are from those of the loaded model."""
    if not plan:
        return ""
    if "refused" in plan:
        return "refused"
    if name not in plan:
        return "not loaded"
    return "exact" if plan[name] == 0 else f"{plan[name]:+.1%}" if abs(plan[name]) >= 0.0005 else "within 0.05 %"


TABLES = {
    "families": families,
    "demo": demo,
    "gpu": gpu,
    "trainers": trainers,
    "predicted": predicted,
    "growth": growth,
    "todays": todays,
    "tickets": tickets,
    "two_gpus": two_gpus,
    "learning": learning,
    "answers": answers,
}
