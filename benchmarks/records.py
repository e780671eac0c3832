"""The measured records beside this file, and which of the measured steps the documents speak of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_helpers.base.files import read_json
from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import GPUS
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.model.shapes.decoder import ModelSizes
from qlora_helpers.model.shapes.sizes import adapter_parameters, model_sizes
from qlora_helpers.planning.gpu_memory import GpuMemory
from qlora_helpers.planning.memory import predict
from qlora_helpers.planning.speed import step_seconds
from qlora_helpers.planning.step_settings import StepSettings

HERE = Path(__file__).parent


def record(name: str) -> dict[str, Any]:
    """The record `benchmarks/NAME.json`."""
    return read_json(HERE / f"{name}.json")


TRAINERS = {
    "recipe": "the 2023 recipe",
    "trl": "TRL",
    "trl_liger": "TRL with Liger kernels",
    "unsloth": "Unsloth",
    "fast": "**this project**",
    "fast_host": "**this project**, embedding on the host",
}


EXPERT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "experts")
"""What the variant `fast_experts` gives adapters to."""


def shape_of(name: str) -> dict[str, Any]:
    """The `config.json` of a catalogued model; `NAME@24` has 24 of its decoder layers, all of one kind."""
    known, _, layers = name.partition("@")
    return SHAPES[known] | ({"num_hidden_layers": int(layers)} if layers else {})


OURS = ("fast", "fast_host")


VARIANTS_OF_OURS = (*OURS, "fast_host_all", "captured", "launched", "remade")


CALIBRATED = ("falcon-40b", "llama-3.1-8b", "smollm2-135m")


SAME_SPEED = 0.02  # what the same step differs by from call to call


def measured_steps() -> list[dict[str, Any]]:
    """The steps that were measured on one GPU, but for those whose layers another trainer had replaced in the same process, and
    those with the embedding on the host that still waited for their tokens.

    TRL on Liger's layers is TRL with Liger, whoever brought them.
    """
    found = []
    for case in record("step_speed_one_gpu")["cases"]:
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
    return list({(case["model"], step_name(case)): case for case in every_own_step()}.values())


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


def _as_fast(case: dict[str, Any]) -> float:
    """Tokens a second, a little more where ours was measured in the same call."""
    return case["tokens_per_s"] * (1 + SAME_SPEED * (ours_beside(case)["call"] == case["call"]))


def step_of(case: dict[str, Any]) -> tuple[ModelSizes, StepSettings]:
    """A measured case as the plan sees it."""
    shape = shape_of(case["model"])
    sizes = model_sizes(shape)
    named = EXPERT_TARGETS if case["variant"] == "fast_experts" else None
    adapters = adapter_parameters(shape, case["r"], named, case.get("dora", False))
    without = adapter_parameters(shape, case["r"], named[:-1], False) if named else adapters
    return sizes, StepSettings(
        seq_len_tokens=case["longest_row_tokens"] if case.get("padded") else case["seq_len_tokens"],
        micro_batch_size=case["blocks"],
        compiled=case["compiled"],
        r=case["r"],
        checkpointed=case["layers_checkpointed"],
        offloaded=case.get("offloaded", False),
        adapter_parameters=adapters,
        on_experts=adapters - without,
        trained_share=case["trained_share"],
        dropout=case.get("dropout", False),
        dora=case.get("dora", False),
        fast_adapters=not case.get("plain", False),
        within_rows=not case.get("plain", False) and not case.get("padded"),
        chunked_loss=not case.get("plain", False),
        captured=case.get("captured", False),
        skipped=any("made once" in line for line in case.get("fast_step") or ()),
    )


def predicted_step(case: dict[str, Any]) -> tuple[GpuMemory, float]:
    """Memory and seconds of a step, by the plan's arithmetic."""
    return planned_on(case, "H100")


def planned_on(case: dict[str, Any], gpu: str) -> tuple[GpuMemory, float]:
    """The same on a card of the catalogue."""
    sizes, step = step_of(case)
    _, (memory,) = predict(sizes, step)
    return memory, step_seconds(sizes, step, GPUS[gpu])


def sent_to_host_gib(case: dict[str, Any]) -> float:
    """What was counted among the weights before training, and left the GPU for it."""
    sizes, step = step_of(case)
    return gib(2 * sizes.vocab * sizes.hidden) if step.offloaded else 0.0


def step_name(case: dict[str, Any]) -> str:
    """A step's settings in a few words."""
    name = f"{case['blocks']} x {case['seq_len_tokens']:,}, {case['layers_checkpointed']} checkpointed"
    name += "" if case["compiled"] else ", not compiled"
    name += ", replayed" if case.get("captured") else ""
    name += ", embedding on the host" if case.get("offloaded") else ""
    name += "".join(f", {what}" for what in ("dropout", "dora", "plain") if case.get(what))
    return name + (", loss on all tokens" if case["trained_share"] > 0.9 else "")
