"""The single figures that the documents quote, made from the records: a name, and its text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from records import (
    CALIBRATED,
    OURS,
    VARIANTS_OF_OURS,
    compared,
    every_own_step,
    measured_steps,
    ours_beside,
    own_steps,
    planned_on,
    predicted_step,
    record,
    sent_to_host_gib,
    step_of,
    target_of,
)

from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import GPUS
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.planning.memory import CONTEXT_BYTES, GRAPHS_BYTES
from qlora_helpers.planning.speed import step_seconds

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def values() -> dict[str, str]:
    """Every figure by its name."""
    found: dict[str, str] = {}
    for part in PARTS:
        found |= part()
    return found


def _machine(name: str) -> str:
    """The machine and the versions of a record."""
    found = record(name)
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    return f"{found.get('machine') or found['gpu']}; {versions}"


def machines() -> dict[str, str]:
    """Where each record was made."""
    names = ["step_speed_one_gpu", "learning_one_gpu", "evaluation_speed_one_gpu", "true_size_one_gpu", "two_gpus"]
    names += ["todays_models_one_gpu", "attention_one_gpu", "tickets_one_gpu"]
    return {f"{name}_machine": _machine(name) for name in names}


def matrix() -> dict[str, str]:
    """How many families of causal language models go down the whole path."""
    found = list(record("matrix_two_cores")["families"].values())
    passed = [each for each in found if each["passed"]]
    plans = [each.get("plan", {}) for each in found]
    compared = [plan for plan in plans if "off" in plan]
    made = record("matrix_two_cores")["plans"]
    return {
        "matrix_judged": f"{len(found)}",
        "matrix_passed": f"{len(passed)}",
        "matrix_packed": f"{sum(each['packed'] for each in passed)}",
        "matrix_padded": f"{sum(not each['packed'] for each in passed)}",
        "matrix_plans_compared": f"{len(compared)}",
        "matrix_plans_close": f"{sum(abs(plan['off']) <= 0.001 for plan in compared)}",
        "matrix_plans_bytes_close": f"{sum(abs(plan['bytes_off']) <= 0.01 for plan in compared)}",
        "matrix_plans_not_loaded": f"{sum('off' not in plan and 'refused' not in plan for plan in plans)}",
        "matrix_plans_refused": f"{sum('refused' in plan for plan in plans)}",
        "matrix_plans_made": f"{made['measured']}, transformers {made['versions']['transformers']}",
        "matrix_machine": _machine("matrix_two_cores"),
    }


def demo() -> dict[str, str]:
    """What `make demo` took and reached."""
    found = record("demo_two_cores")
    run = found["runs"][0]
    versions = run["measured"]["versions"]
    return {
        "demo_minutes": f"{run['demo_seconds'] / 60:.1f}",
        "demo_training_minutes": f"{run['measured']['seconds'] / 60:.1f}",
        "demo_rows": f"{run['train_rows']}",
        "demo_peak_gib": f"{run['measured']['peak_gib']['cpu']:.1f}",
        "demo_machine": f"{found['machine']['cpu']}, {found['machine']['cores']} cores; "
        + ", ".join(f"{name} {versions[name]}" for name in PACKAGES),
    }


def todays_models() -> dict[str, str]:
    """Today's models at true size: how far the plan is off, and what a model of MXFP4 files went through."""
    found, apart = record("todays_models_one_gpu"), [[], []]
    for case in found["cases"]:
        memory, seconds = planned_on(case, "H200")
        apart[0].append(abs(gib(memory.reserved) / case["peak_reserved_gib"] - 1))
        if not case.get("padded"):
            apart[1].append(abs(seconds / case["step_s"] - 1))
    masked, held = found["before"]
    capped = next(case for case in found["cases"] if case["model"] == "gemma-2-9b")
    slow = next(case for case in found["cases"] if (case["model"], case["blocks"]) == ("qwen3.5-9b", 8))
    packed = next(case for case in found["cases"] if (case["model"], case["blocks"]) == ("gpt-oss-20b", 2))
    stored, whole = record("gpt_oss_one_gpu")["from_mxfp4"], record("gpt_oss_one_gpu")["random"]
    return {
        "todays_off_reserved": f"{max(apart[0]):.1%}",
        "todays_off_seconds": f"{max(apart[1]):.1%}",
        "gpt_oss_masked_speed": f"{masked['tokens_per_s']:,.0f}",
        "gpt_oss_masked_gib": f"{masked['peak_reserved_gib']:.1f}",
        "gpt_oss_packed_gib": f"{packed['peak_reserved_gib']:.1f}",
        "capped_held_speed": f"{held['tokens_per_s']:,.0f}",
        "capped_held_gib": f"{held['peak_reserved_gib']:.1f}",
        "capped_speed": f"{capped['tokens_per_s']:,.0f}",
        "capped_gib": f"{capped['peak_reserved_gib']:.1f}",
        "fallback_step_s": f"{slow['step_s']:.2f}",
        "fallback_planned_s": f"{planned_on(slow, 'H200')[1]:.2f}",
        "gpt_oss_layers": f"{stored['options']['layers']}",
        "gpt_oss_load_peak_gib": f"{stored['load']['peak_reserved_gib']:.1f}",
        "gpt_oss_steps": f"{stored['train']['steps']}",
        "gpt_oss_losses": "{:.1f} to {:.1f}".format(*stored["train"]["losses"]),
        "gpt_oss_merge_s": f"{stored['merge']['seconds']:.0f}",
        "gpt_oss_whole_gib": f"{sum(whole['weights_gib'].values()):.1f}",
        "gpt_oss_whole_parameters": f"{whole['parameters']:,}",
        "gpt_oss_whole_losses": f"{whole['first_loss']:.1f} to {whole['last_loss']:.1f}",
        "experts_gradient_apart": f"{max(line['error'] for line in record('gpt_oss_one_gpu')['experts']):.3%}",
    }


def attention() -> dict[str, str]:
    """Soft-capped scores and wide heads by flex attention, against a mask."""
    found = {case["name"]: case["found"] for case in record("attention_one_gpu")["cases"]}
    values = {}
    for short, name in (("capped", "gemma-2-9b, all tokens"), ("wide", "gemma-4-31b, global")):
        for route in ("training", "mask"):
            cost = found[name][route]["cost"]
            values[f"attention_{short}_{route}_ms"] = f"{cost['ms']:.1f}"
            if short == "capped":
                values[f"attention_{short}_{route}_gib"] = f"{cost['held_gib']:.1f}"
    off = [error for each in found.values() for error in each["training"]["errors"].values()]
    return values | {"attention_cases": str(len(found)), "attention_off": f"{max(off):.1%}"}


def tickets() -> dict[str, str]:
    """Fields out of support tickets: the means over the seeds."""
    found = record("tickets_one_gpu")
    few = next(item for item in found["over_seeds"]["base_few"]["differences"] if item["measure"] == "field_f1")
    case = found["cases"][0]
    return {
        "tickets_seeds": f"{len(found['cases'])}",
        "tickets_rows": f"{case['train_rows']}",
        "tickets_asked": f"{few['rows']}",
        "tickets_steps": f"{case['steps']}",
        "tickets_tuned": f"{few['second']:.1f}",
        "tickets_gain": f"{few['difference']:.1f}",
        "tickets_gain_low": f"{few['low']:.1f}",
        "tickets_gain_high": f"{few['high']:.1f}",
    }


def against_the_recipe() -> dict[str, str]:
    """Falcon-40B within 24 GiB against the recipe on the whole card."""
    small = [case for case in measured_steps() if target_of(case) == ("falcon-40b", 24)][-1]
    (recipe,) = [case for case in measured_steps() if (case["call"], case["variant"]) == (small["call"], "recipe")]
    return {
        "falcon_24_times_recipe": f"{small['tokens_per_s'] / recipe['tokens_per_s']:.1f}",
        "recipe_reserved_gib": f"{recipe['peak_reserved_gib']:.1f}",
    }


def loss_on_all_tokens() -> dict[str, str]:
    """What a loss on all tokens costs: measured once, elsewhere by the plan's arithmetic."""
    every = [case for case in measured_steps() if case["variant"] == "fast_host_all"][-1]
    usual = ours_beside(every)
    (group,) = [group for group in compared() if target_of(group[0]) == target_of(every)]
    unsloth = next(case for case in group if case["variant"] == "unsloth")
    planned = []
    for group in [group for group in compared() if len(group) > 1]:
        ours = max((case for case in group if case["variant"] in OURS), key=lambda case: case["tokens_per_s"])
        sizes, step = step_of(ours)
        usual_s, every_s = (
            step_seconds(sizes, replace(step, trained_share=share), GPUS["H100"]) for share in (step.trained_share, 1.0)
        )
        planned.append(f"{1 - usual_s / every_s:.1%} ({ours['model']}, {ours['limit_gib']:g} GiB)")
    return {
        "all_tokens_speed": f"{every['tokens_per_s']:,.0f}",
        "all_tokens_limit_gib": f"{every['limit_gib']:g}",
        "answer_tokens_speed": f"{usual['tokens_per_s']:,.0f}",
        "all_tokens_times_unsloth": f"{every['tokens_per_s'] / unsloth['tokens_per_s']:.2f}",
        "all_tokens_planned": ", ".join(planned),
    }


def parts_of_the_step() -> dict[str, str]:
    """What skipping unused outputs and replaying CUDA graphs give, each within one call of the script."""
    remade = [case for case in measured_steps() if case["variant"] == "remade"][-1]
    same = (remade["call"], "fast", *target_of(remade))
    (usual,) = [case for case in measured_steps() if (case["call"], case["variant"], *target_of(case)) == same]
    launched = [case for case in measured_steps() if case["variant"] == "launched"][-1]
    captures = [case["capture_s"] for case in measured_steps() if case.get("passes_replayed")]
    built = {
        model: min(case["load_s"] for case in measured_steps() if case["model"] == model and case.get("load_s"))
        for model in ("falcon-40b", "llama-3.1-8b")
    }
    return {
        "skipping_model": remade["model"],
        "skipping_sequences": f"{remade['blocks']}",
        "skipping_speed": f"{usual['tokens_per_s']:,.0f}",
        "not_skipping_speed": f"{remade['tokens_per_s']:,.0f}",
        "replay_model": launched["model"],
        "replayed_s": f"{ours_beside(launched)['step_s']:.3f}",
        "launched_s": f"{launched['step_s']:.3f}",
        "capture_low_s": f"{min(captures):.1f}",
        "capture_high_s": f"{max(captures):.1f}",
        "build_falcon_40b_s": f"{built['falcon-40b']:.1f}",
        "build_llama_8b_s": f"{built['llama-3.1-8b']:.1f}",
    }


def prediction() -> dict[str, str]:
    """How far the plan's arithmetic is from what was measured, at worst."""
    errors: dict[str, list[float]] = {}
    for case in every_own_step():
        memory, seconds = predicted_step(case)
        held_out = case["model"] not in CALIBRATED
        rest = case["peak_allocated_gib"] - case["weights_gib"] + sent_to_host_gib(case)
        off = {
            "allocated": gib(memory.allocated) / case["peak_allocated_gib"] - 1,
            "reserved" if case.get("segments_expand", True) else "reserved_not_growing": (
                gib(memory.reserved) / case["peak_reserved_gib"] - 1
            ),
            "without_weights": (gib(memory.allocated) - gib(memory.weights + memory.adapters)) / rest - 1,
            "seconds_held_out" if held_out else "seconds": seconds / case["step_s"] - 1,
        }
        if held_out:
            off["allocated_held_out"] = off["allocated"]
        for name, by in off.items():
            errors.setdefault(name, []).append(by)
    held = {
        replayed: [
            case["outside_gib"]
            for case in record("step_speed_one_gpu")["cases"]
            if case.get("outside_gib")
            and bool(case.get("passes_replayed")) == replayed
            and case["variant"] in VARIANTS_OF_OURS
        ]
        for replayed in (False, True)
    }
    cases = own_steps()
    worst = {f"off_{name}": f"{max(map(abs, found)):.1%}" for name, found in errors.items()}
    return worst | {
        "predicted_cases": f"{len(cases)}",
        "predicted_models": f"{len({case['model'] for case in cases})}",
        "predicted_steps": f"{len(errors['allocated'])}",
        "not_growing_steps": f"{len(errors['reserved_not_growing'])}",
        "outside_gib": f"{min(held[False]):.2f}",
        "outside_replayed_gib": f"{max(held[True]):.2f}",
        "planned_outside_gib": f"{gib(CONTEXT_BYTES):.2f}",
        "planned_outside_replayed_gib": f"{gib(CONTEXT_BYTES + GRAPHS_BYTES):.2f}",
    }


def cpu_step() -> dict[str, str]:
    """The demo's step on two cores, plain and fast in turns, and what the fast one spends its time on."""
    cases = record("step_speed_two_cores")["cases"]
    steps = {variant: [case["step_s"] for case in cases if case["variant"] == variant] for variant in ("plain", "fast")}
    ratios = [plain / fast for plain, fast in zip(steps["plain"], steps["fast"], strict=True)]
    kinds = next(case for case in cases if case["variant"] == "fast")["profile"]["ms_by_kind"]
    names = {"matrix products": "matrix multiplications"}
    return {
        "cpu_plain_s": " and ".join(f"{seconds:.1f}" for seconds in steps["plain"]),
        "cpu_fast_s": " and ".join(f"{seconds:.1f}" for seconds in steps["fast"]),
        "cpu_low_times": f"{min(ratios):.2f}",
        "cpu_high_times": f"{max(ratios):.2f}",
        "cpu_shares": ", ".join(
            f"{names.get(kind, kind)} {ms / sum(kinds.values()):.0%}" for kind, ms in kinds.items()
        ),
    }


def equality() -> dict[str, str]:
    """The fast step's own tests on a GPU, and what it learns beside the plain path."""
    cases = record("fast_step_one_gpu")["cases"]
    packed = [case for case in cases if case["row_packed_error"] is not None]
    again = record("fast_step_again_one_gpu")["cases"]
    quality = record("quality_one_gpu")
    fast = [run for run in quality["runs"] if run["path"] == "fast"]
    how = [name for name, key in (("compiled", "compiled"), ("replayed", "captured")) if all(run[key] for run in fast)]
    return {
        "gpu_cases": f"{len(cases)}",
        "gpu_cases_passed": f"{sum(bool(case.get('passed')) for case in cases)}",
        "gpu_again_cases": f"{len(again)}",
        "gpu_again_passed": f"{sum(bool(case.get('passed')) for case in again)}",
        "gpu_cases_replayed": f"{sum(bool(case.get('replayed')) for case in cases)}",
        "fast_gradient_error": f"{max(case['fast_gradient_error'] for case in cases):.1%}",
        "plain_gradient_error": f"{max(case['plain_gradient_error'] for case in cases):.1%}",
        "packed_row_error": f"{max(case['row_packed_error'] for case in packed):.1%}",
        "lone_row_error": f"{max(case['row_alone_error'] for case in packed):.1%}",
        "quality_steps": f"{quality['steps']}",
        "quality_seeds": f"{len(quality['fast_against_plain'])}",
        "quality_apart": f"{max(map(abs, quality['fast_against_plain'].values())):.2%}",
        "quality_how": " and ".join(how),
        "quality_gpu": fast[0]["machine"],
    }


def several_processes() -> dict[str, str]:
    """How far the losses of copies lie from one GPU's, and of two CPU processes from one's."""
    found = record("two_processes_two_cores")
    pair = record("two_gpus")["at_a_learning_rate_of_2e-4"]

    def apart(both: dict[str, Any]) -> list[float]:
        losses = zip(both["copied"]["losses"], both["alone"]["losses"], strict=True)
        return [abs(one - other) / other for one, other in losses]

    on_gpus = apart(pair)
    return {
        "copies_first_apart": f"{max(on_gpus[:5]):.1%}",
        "copies_later_apart": f"{max(on_gpus[5:]):.1%}",
        "processes_apart": f"{max(apart(found)):.2%}",
        "processes_steps": f"{len(found['alone']['losses'])}",
    }


def learning() -> dict[str, str]:
    """The recipe against this project's settings: the difference, and the seconds of a run with the GPU to itself."""
    found, alone = record("learning_one_gpu"), record("learning_alone_one_gpu")
    base = next(case["scores"]["base"] for case in found["cases"] if "base" in case["scores"])
    (rouge,) = [item for item in found["ours_against_recipe"]["differences"] if item["measure"] == "rouge_l"]
    recipe, ours = (
        next(case for case in alone["cases"] if case["variant"] == name and "others_on_the_gpu" not in case)
        for name in ("recipe", "ours")
    )
    return {
        "learning_rows": f"{found['train_rows']:,}",
        "learning_more_rows": f"{alone['train_rows']:,}",
        "learning_share": f"{found['share']:.0%}",
        "learning_more_share": f"{alone['share']:.0%}",
        "learning_asked": f"{rouge['rows']}",
        "learning_rows_in_both": f"{found['dev_rows_also_in_training']}",
        "learning_untuned_rouge_l": f"{base['rouge_l']:.1f}",
        "learning_untuned_stop": f"{base['stop_rate']:.0%}",
        "learning_seeds": f"{len({case['seed'] for case in found['cases']})}",
        "learning_gain": f"{rouge['difference']:.1f}",
        "learning_gain_low": f"{rouge['low']:.1f}",
        "learning_gain_high": f"{rouge['high']:.1f}",
        "learning_ours_s": f"{ours['train_s'] + ours['evaluation_s']:.0f}",
        "learning_recipe_s": f"{recipe['train_s'] + recipe['plain_s_scaled_to_all']:.0f}",
        "learning_timed_rows": f"{recipe['plain_rows_timed']}",
    }


def out_of_memory() -> dict[str, str]:
    """A real out-of-memory error in a notebook's shell."""
    found = record("out_of_memory_one_gpu")
    large, places = found["too_large"], found["places"]
    return {
        "oom_model": found["model"],
        "oom_place": large["where"],
        "oom_before_gib": f"{gib(large['before_bytes']):.2f}",
        "oom_after_gib": f"{gib(large['after_bytes']):.2f}",
        "oom_next_size": f"{found['retry']['settings']['micro_batch_size']}",
        "oom_places": f"{len(places)}",
        "oom_apart": f"{max(abs(each['ratio'] - 1) for each in (large, *places.values())):.1%}",
    }


def merging() -> dict[str, str]:
    """What merging into bfloat16 files takes."""
    found = record("export_memory_two_cores")
    (case,) = found["cases"]
    return {
        "merge_model": case["model"].title(),
        "merge_size_gib": f"{case['size_gib']:.1f}",
        "merge_s": f"{case['seconds']:.0f}",
        "merge_working_gib": f"{case['merging_gib']:.2f}",
        "merge_falcon_40b_gib": f"{found['arithmetic']['falcon-40b']['bound_gib']:.2f}",
    }


def missed() -> dict[str, str]:
    """Which aims were not reached, and by how much."""
    wide, small = _within(79), _within(10)
    sizes = model_sizes(SHAPES["llama-3.1-8b"])
    unsloth, ours = small["unsloth"], ours_beside(small["unsloth"])
    operations = 6 - 2 * sizes.parameters_added_last_per_layer / sizes.linear_parameters_per_layer
    once = sizes.layers * sizes.linear_parameters_per_layer / ours["matrix_tflops"] / 1e12
    not_captured = [case for case in own_steps() if case.get("captured") is False and case["variant"] in OURS]
    return {
        "ahead_wide": f"{_ahead(wide['unsloth']):.2f}",
        "aim_wide_of_roof": f"{2.5 * wide['unsloth']['tokens_per_s'] * 4 * once:.0%}",
        "ahead_small": f"{_ahead(unsloth):.2f}",
        "checkpointed_operations": f"{operations:.1f}",
        "twice_of_card": f"{2 * unsloth['tokens_per_s'] * operations * once:.0%}",
        "unsloth_at_7": _speeds("unsloth", 7.5),
        "unsloth_at_10": _speeds("unsloth", 10),
        "unsloth_at_79": _speeds("unsloth", 79),
        "ahead_trl_wide": f"{_ahead(wide['trl_liger']):.2f}",
        "ahead_trl_small": f"{_ahead(small['trl_liger']):.2f}",
        "trl_at_10": _speeds("trl_liger", 10),
        "not_captured": " and ".join(
            f"{case['model']} with {case['blocks']} x {case['seq_len_tokens']:,} within {case['limit_gib']:g} GiB"
            for case in not_captured
        ),
    }


def _within(limit: float) -> dict[str, dict[str, Any]]:
    (group,) = [group for group in compared() if target_of(group[0]) == ("llama-3.1-8b", limit)]
    return {case["variant"]: case for case in group}


def _ahead(case: dict[str, Any]) -> float:
    return ours_beside(case)["tokens_per_s"] / case["tokens_per_s"]


def _speeds(variant: str, limit: float) -> str:
    cases = [
        case for case in measured_steps() if (case["variant"], *target_of(case)) == (variant, "llama-3.1-8b", limit)
    ]
    sizes = sorted({case["blocks"] for case in cases})
    return "; ".join(
        f"{size} sequences " + ", ".join(f"{case['tokens_per_s']:,.0f}" for case in cases if case["blocks"] == size)
        for size in sizes
    )


PARTS = (
    machines,
    matrix,
    demo,
    todays_models,
    attention,
    tickets,
    against_the_recipe,
    loss_on_all_tokens,
    parts_of_the_step,
    prediction,
    cpu_step,
    equality,
    several_processes,
    learning,
    out_of_memory,
    merging,
    missed,
)
