"""What fits, how fast it is and what it costs: the choice is the fastest, and where nothing fits a plan says what would."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from measured_steps import name_of, planned_steps
from measured_steps import step_of as measured_step

from qlora_helpers.base.profiles import profile_config
from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import GPUS, parse_gpus
from qlora_helpers.model.shapes.catalog import SHAPES, known_shape
from qlora_helpers.model.shapes.sizes import adapter_parameters, model_sizes
from qlora_helpers.planning.candidates import candidate, fewest_checkpointed
from qlora_helpers.planning.memory import CAPTURE_ROOM_GIB, StepMemory, predict
from qlora_helpers.planning.plan import make_plan
from qlora_helpers.planning.run_plan import forecast
from qlora_helpers.planning.speed import compile_pays, step_seconds
from qlora_helpers.planning.step_settings import StepSettings, step_settings
from qlora_helpers.planning.workload import Workload

RECIPE = profile_config("falcon-40b")
SAMSUM_TOKENS = 14_732 * 190
ONE_SEQUENCE = ("train.micro_batch_size=1", "train.gradient_accumulation_steps=1")


def planned(model: str, gpus: str, *settings: str, tokens: int = SAMSUM_TOKENS, price: float | None = None):
    config = RECIPE.with_settings([f"model.name={model}", *settings])
    return make_plan(Workload(config, known_shape(model), parse_gpus(gpus, price), round(tokens * config.train.epochs)))


def test_skipped_matmuls_of_a_checkpointed_layer_take_no_time():
    """Half of Falcon's matrix multiplications, a quarter of a Llama's, none of a Gemma's; DoRA needs them all."""
    for name, share in (("falcon-40b", 0.49), ("llama-3.1-8b", 0.27), ("gemma-2-9b", 0.0)):
        sizes, gpu = model_sizes(SHAPES[name]), GPUS["H100"]
        step = StepSettings(
            seq_len_tokens=2048,
            micro_batch_size=8,
            checkpointed=sizes.layers,
            compiled=True,
            r=8,
            adapter_parameters=10**7,
            captured=True,
        )
        assert sizes.parameters_added_last_per_layer / sizes.linear_parameters_per_layer == pytest.approx(
            share, abs=0.01
        )
        skipping, repeating = (step_seconds(sizes, replace(step, skipped=each), gpu) for each in (True, False))
        matmuls = 2 * step.tokens * sizes.layers * sizes.parameters_added_last_per_layer / (gpu.bf16_tflops * 1e12)
        assert matmuls <= repeating - skipping <= 1.6 * matmuls
        dora = [step_seconds(sizes, replace(step, skipped=each, dora=True), gpu) for each in (True, False)]
        assert dora[0] == dora[1]


@pytest.mark.parametrize("case", planned_steps(), ids=name_of)
def test_predicted_speed_matches_the_gpu(case):
    sizes, step = measured_step(case)
    assert step_seconds(sizes, step, GPUS["H100"]) == pytest.approx(case["step_s"], rel=0.2)


def test_falcon_40b_over_four_cards_of_24_gib():
    plan = planned("tiiuae/falcon-40b", "4x24GiB", "train.share=spread")
    assert plan.fits and plan.shortfall_gib == 0
    assert plan.adapter_parameters == 55_541_760
    assert sum(plan.choice.layers_per_gpu) == 60 and len(plan.choice.memory) == 4
    assert all(gib(each.total) <= 24 for each in plan.choice.memory)
    assert any("one after another" in note for note in plan.notes)
    assert any("extrapolated" in note for note in plan.notes)


def test_the_choice_is_the_fastest_that_fits():
    plan = planned("meta-llama/Llama-3.1-8B", "A10G")
    fitting = [plan.choice, *plan.alternatives]
    assert [each.tokens_per_s for each in fitting] == sorted((each.tokens_per_s for each in fitting), reverse=True)
    assert all(each.peak_gib <= 21.99 for each in fitting)
    assert len({each.micro_batch_size for each in fitting}) == 3
    for each in fitting:
        assert each.micro_batch_size * each.gradient_accumulation_steps == RECIPE.train.micro_batch_size
        if each.checkpointed:  # one layer less, and it would not fit
            shape = known_shape("meta-llama/Llama-3.1-8B")
            step = StepSettings(
                seq_len_tokens=each.seq_len_tokens,
                micro_batch_size=each.micro_batch_size,
                checkpointed=each.checkpointed - 1,
                compiled=each.compiled,
                r=8,
                adapter_parameters=plan.adapter_parameters,
                offloaded=each.offloaded,
            )
            assert gib(predict(model_sizes(shape), step)[1][0].total) > 21.99


def test_cuda_graphs_are_planned_where_they_are_possible():
    small, model = ["adapter.lora_dropout=0"], "HuggingFaceTB/SmolLM2-135M"
    replayed, launched = (planned(model, "H100", *small, f"train.cuda_graph={on}").choice for on in ("true", "false"))
    assert replayed.captured and "as CUDA graphs" in repr(replayed) and replayed.to_dict()["captured"]
    assert not launched.captured and "graph" not in repr(launched)
    assert replayed.tokens_per_s > 1.5 * launched.tokens_per_s
    assert 0.05 < launched.memory[0].context / 2**30 - 0.65 < replayed.memory[0].context / 2**30 - 0.65 < 0.25
    for gpus, *others in (
        ("H100", "adapter.lora_dropout=0.05"),
        ("H100", "data.packing=false"),
        ("H100", "train.fast_step=false"),
        ("2xH100", "train.share=shards"),
        ("T4",),
        ("H100", "model.compute_dtype=float16"),
    ):
        plan = planned(model, gpus, *small, *others)
        assert not any(each and each.captured for each in (plan.choice, *plan_parts(plan))), (gpus, others)


def test_no_cuda_graph_is_planned_without_room_for_its_capture():
    """A capture needs room beside a pass's peak: one more layer is checkpointed for it, or passes are not captured."""
    workload = Workload(RECIPE, SHAPES["llama-3.1-8b"], parse_gpus("H100"), tokens=10**6)
    sizes, step = workload.sizes, workload.step(micro_batch_size=1, captured=True)
    (all_again,) = predict(sizes, replace(step, checkpointed=32))[1]
    least = gib(all_again.allocated + all_again.context) + CAPTURE_ROOM_GIB
    for spare, captured in ((-0.01, False), (0.01, True)):
        hardware = parse_gpus(f"{least + spare:.4f}GiB")
        count = fewest_checkpointed(sizes, step, hardware.usable_gib)
        chosen = replace(step, checkpointed=count)
        found = candidate(workload.on(hardware), chosen, gpus=1, gradient_accumulation_steps=1)
        assert found.captured is captured and found.peak_gib <= hardware.usable_gib
        assert (count == 32) is captured  # without a capture fewer do
    plan = planned("meta-llama/Llama-3.1-8B", "1x10GiB", "adapter.r=16", "adapter.lora_dropout=0")
    assert any(each.captured for each in plan_parts(plan))


def test_the_printed_settings_can_be_copied():
    plan = planned("HuggingFaceTB/SmolLM2-135M", "H100")
    (line,) = [line for line in repr(plan).splitlines() if line.startswith("to take it")]
    settings = [part for part in line.split()[3:] if part != "--set"]
    assert settings == plan.choice.settings
    changed = RECIPE.with_settings(settings)
    assert (
        changed.train.micro_batch_size == plan.choice.micro_batch_size
        and (changed.train.compile == "on") == plan.choice.compiled
    )


def test_compilation_pays_later_with_cuda_graphs():
    sizes = model_sizes(SHAPES["smollm2-135m"])
    step = step_settings(RECIPE, SHAPES["smollm2-135m"], micro_batch_size=1, captured=True, trained_share=0.2)

    def fewest(step: StepSettings) -> int:
        return next(passes for passes in range(1, 10**6, 100) if compile_pays(sizes, step, GPUS["H100"], passes))

    assert fewest(step) > 2 * fewest(replace(step, captured=False))


def test_the_embedding_is_offloaded_on_a_small_card():
    small, large = (planned("meta-llama/Llama-3.1-8B", gpus, "adapter.r=16").choice for gpus in ("8GiB", "H100"))
    assert small.offloaded and "embedding on the host" in repr(small)
    assert not large.offloaded
    assert "train.offload_embeddings=true" in small.settings and "train.offload_embeddings=false" in large.settings
    assert not planned("HuggingFaceTB/SmolLM2-135M", "8GiB").choice.offloaded  # it is the output layer too
    plain = planned("meta-llama/Llama-3.1-8B", "8GiB", "adapter.r=16", "train.fast_step=false")
    assert not any(each and each.offloaded for each in (plain.choice, *plan_parts(plain)))


def plan_parts(plan):
    return (*plan.alternatives, plan.smallest)


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B", "mistralai/Mistral-Nemo-Base-2407"])
def test_a_planned_model_can_also_be_loaded(model):
    """The embedding is on the GPU while the model is loaded and when training ends, whatever the steps hold."""
    sizes, shape = model_sizes(known_shape(model)), known_shape(model)
    step = StepSettings(
        seq_len_tokens=256,
        micro_batch_size=1,
        checkpointed=sizes.layers,
        compiled=True,
        r=8,
        offloaded=True,
        adapter_parameters=adapter_parameters(shape, 8, None, False),
    )
    _, (there,) = predict(sizes, step)
    _, (here,) = predict(sizes, replace(step, offloaded=False))
    assert there.total >= here.weights + here.adapters + here.optimizer + here.context


def test_the_shortfall_and_what_would_fit_are_named():
    plan = planned("tiiuae/falcon-40b", "T4")
    assert not plan.fits
    assert plan.shortfall_gib == pytest.approx(plan.smallest.peak_gib - 14.58)
    assert plan.shortfall_gib > 5
    (instance,) = plan.fixes
    name = instance.split(",")[0]
    assert planned("tiiuae/falcon-40b", name).fits
    assert "does not fit" in repr(plan) and instance in repr(plan)


INPUTS_ON_HOST = "train.offload_checkpoints=true"


def test_inputs_of_checkpointed_layers_in_the_hosts_memory_are_the_first_thing_to_try():
    plan = planned("tiiuae/falcon-40b", "24GiB")
    assert not plan.fits and plan.fixes[0].startswith(f"--set {INPUTS_ON_HOST} (1 x 2048")
    other = planned("tiiuae/falcon-40b", "24GiB", INPUTS_ON_HOST)
    assert other.fits and "inputs on the host" in repr(other)
    # At most six of 60 inputs of 2,048 x 8,192 values are on the GPU.
    with_inputs, without = (
        planned("tiiuae/falcon-40b", "H100", *ONE_SEQUENCE, "train.checkpointed_layers=60", *more).smallest.memory[0]
        for more in ([], [INPUTS_ON_HOST])
    )
    assert with_inputs.activations == 60 * 2048 * 8192 * 2 and without.activations == 6 * 2048 * 8192 * 2


def test_the_smallest_change_that_fits_is_named_and_fits():
    """The longest sequence that fits, in steps of 64 tokens; where an 8-bit optimizer is enough, that alone."""
    for asked in (2048, 1536):
        plan = planned("tiiuae/falcon-40b", "23GiB", INPUTS_ON_HOST, f"data.seq_len_tokens={asked}")
        assert not plan.fits
        change = plan.fixes[0].split(" (")[0].replace("--set ", "").split()
        name, length = change[0].split("=")
        assert name == "data.seq_len_tokens" and len(change) == 1
        assert planned("tiiuae/falcon-40b", "23GiB", INPUTS_ON_HOST, *change).fits
        assert not planned("tiiuae/falcon-40b", "23GiB", INPUTS_ON_HOST, f"{name}={int(length) + 64}").fits
        eight = (f"data.seq_len_tokens={asked}", "train.optim=adamw_8bit")
        assert not planned("tiiuae/falcon-40b", "23GiB", INPUTS_ON_HOST, *eight).fits
    fix = planned("tiiuae/falcon-40b", "23.5GiB", INPUTS_ON_HOST).fixes[0]
    assert fix.startswith("--set train.optim=adamw_8bit (1 x 2048")


def test_changes_are_combined_where_none_is_enough():
    asked = ("tiiuae/falcon-40b", "23GiB", INPUTS_ON_HOST, "adapter.r=64")
    change = planned(*asked).fixes[0].split(" (")[0].replace("--set ", "").split()
    assert {item.split("=")[0] for item in change} == {"train.optim", "adapter.r", "data.seq_len_tokens"}
    assert planned(*asked, *change).fits
    for skipped in change:
        assert not planned(*asked, *(item for item in change if item != skipped)).fits


def test_as_many_gpus_work_in_parallel_as_can_share_the_sequences():
    speeds = [planned("tiiuae/falcon-40b", f"{count}xH100").choice for count in (1, 2, 3, 4, 5, 7, 8)]
    assert [each.copies for each in speeds] == [1, 2, 2, 4, 4, 4, 8]
    assert [each.tokens_per_s for each in speeds] == sorted(each.tokens_per_s for each in speeds)
    assert any("2 of 3 GPUs" in note and "with 9" in note for note in planned("tiiuae/falcon-40b", "3xH100").notes)


@pytest.mark.parametrize(
    ("setting", "times"),
    [("adapter.use_dora=true", 2.5), ("adapter.lora_dropout=0.05", 1.4), ("model.compute_dtype=float32", 2)],
)
def test_settings_that_keep_more_are_planned_with_more_memory(setting, times):
    plain, other = (planned("meta-llama/Llama-3.1-8B", "H100", *more) for more in ([], [setting]))
    kept = [plan.choice.details[0].activations_kept / plan.choice.micro_batch_size for plan in (plain, other)]
    assert kept[1] >= times * kept[0]
    taken = [(plan.choice.micro_batch_size, -plan.choice.checkpointed) for plan in (plain, other)]
    assert taken[1] <= taken[0] and other.choice.tokens_per_s < plain.choice.tokens_per_s
    assert other.fits and other.choice.peak_gib <= 79.11
    assert any("adapter.lora_dropout=0 would take" in note for note in other.notes) == ("dropout" in setting)


def test_dropout_masks_follow_the_adapted_layers():
    def masks(*settings):
        notes = planned("meta-llama/Llama-3.1-8B", "H100", *ONE_SEQUENCE, "adapter.lora_dropout=0.05", *settings).notes
        (note,) = [note for note in notes if "adapter.lora_dropout=0" in note]
        return float(re.search(r"([\d.]+) GiB less", note)[1])

    assert masks() > 4 * masks("adapter.target_modules=q_proj,v_proj") > 0
    tiny = planned("random:falcon-tiny", "H100", *ONE_SEQUENCE, "adapter.lora_dropout=0.05")
    assert not any("lora_dropout" in note for note in tiny.notes)  # 0.0 GiB less


def test_notes_on_several_processes_count_the_same_gradients_as_the_plan():
    """DDP keeps copies of them: without dropout a note must not offer what they take."""
    plan = planned("meta-llama/Llama-3.1-8B", "4xA10G", "adapter.lora_dropout=0", "adapter.r=64")
    assert plan.choice.copies == 4 and plan.choice.memory[0].gradients == 2 * 4 * plan.adapter_parameters
    assert not any("dropout" in note for note in plan.notes)


def test_the_eager_factor_does_not_apply_to_what_adapters_add():
    """DoRA and the plain step keep an uncompiled layer's values: the factor must not apply to them a second time."""
    step = StepSettings(
        seq_len_tokens=2048, micro_batch_size=4, checkpointed=0, compiled=False, r=8, adapter_parameters=20_000_000
    )
    sizes, gpu = model_sizes(SHAPES["llama-3.1-8b"]), GPUS["H100"]
    eager, plain = (step_seconds(sizes, replace(step, fast_adapters=each), gpu) for each in (True, False))
    assert eager < plain < 1.5 * eager


def test_the_table_shows_activations_with_and_without_checkpointing():
    plan = planned("tiiuae/falcon-40b", "4x24GiB", "train.share=spread")
    for each, memory, layers in zip(plan.choice.details, plan.choice.memory, plan.choice.layers_per_gpu, strict=True):
        assert each.activations_kept == memory.activations  # nothing is checkpointed here
        assert each.activations_checkpointed == layers * 2 * plan.choice.micro_batch_size * 2048 * 8192
    assert [each.logits > 0 for each in plan.choice.details] == [True, False, False, False]  # tied: with the embedding
    shown = repr(plan)
    assert "(activations, none checkpointed)" in shown and "(logits in the loss)" in shown
    kept = plan.to_dict()["choice"]["details_gib"][1]["activations_kept"]
    assert f"{kept:.2f}" in next(line for line in shown.splitlines() if "none checkpointed" in line)


def test_a_note_says_that_cards_offer_less_than_they_are_sold_as():
    assert any("A10G or L4" in note and "22.0" in note for note in planned("tiiuae/falcon-40b", "4x24GiB").notes)
    assert not any("sold as" in note for note in planned("tiiuae/falcon-40b", "4xL4").notes)
    assert not any("sold as" in note for note in planned("tiiuae/falcon-7b", "24GiB", "data.seq_len_tokens=512").notes)


def test_a_note_says_that_a_step_takes_longer_than_docker_waits():
    slow, fast = (planned("tiiuae/falcon-40b", gpus) for gpus in ("4xA10G", "H100"))
    assert slow.choice.optimizer_step_s > 10 > fast.choice.optimizer_step_s
    assert [any("docker stop" in note for note in plan.notes) for plan in (slow, fast)] == [True, False]


def test_a_price_gives_dollars():
    plan = planned("tiiuae/falcon-40b", "ml.g5.12xlarge")
    assert plan.choice.dollars == pytest.approx(7.09 * plan.choice.seconds / 3600)
    assert "mid 2026" in plan.to_dict()["price_note"]
    assert planned("tiiuae/falcon-40b", "4x24GiB").choice.dollars is None
    given = planned("tiiuae/falcon-40b", "4x24GiB", price=2.0)
    assert given.choice.dollars == pytest.approx(2.0 * given.choice.seconds / 3600)


def test_cards_that_each_hold_the_model_work_in_parallel():
    one, four = planned("meta-llama/Llama-3.1-8B", "A10G"), planned("meta-llama/Llama-3.1-8B", "4xA10G")
    assert four.choice.copies == 4
    assert four.choice.tokens_per_s == pytest.approx(4 * 0.95 * one.choice.tokens_per_s, rel=0.3)
    assert any("4 processes, each with a GPU and the whole model" in note for note in four.notes)


def test_compilation_is_chosen_where_the_run_is_long_enough():
    assert planned("meta-llama/Llama-3.1-8B", "H100").choice.compiled
    assert not planned("meta-llama/Llama-3.1-8B", "H100", tokens=50_000).choice.compiled


def test_only_a_measured_card_is_not_extrapolated():
    assert not any("extrapolated" in note for note in planned("tiiuae/falcon-7b", "H100").notes)
    assert any("extrapolated" in note for note in planned("tiiuae/falcon-7b", "A100-80GB").notes)


def test_the_settings_of_a_choice_are_settings():
    choice = planned("tiiuae/falcon-40b", "H100").choice
    changed = RECIPE.with_settings(choice.settings)
    assert changed.train.micro_batch_size == choice.micro_batch_size
    assert changed.train.checkpointed_layers == choice.checkpointed
    assert changed.train.activation_checkpointing == (choice.checkpointed > 0)


def test_short_runs_are_not_compiled_and_fit_all_the_same():
    """An uncompiled layer keeps more: as few layers are checkpointed as that leaves room for."""
    short = planned("tiiuae/falcon-40b", "1x24.4GiB", "data.seq_len_tokens=384", tokens=20_000)
    long = planned("tiiuae/falcon-40b", "1x24.4GiB", "data.seq_len_tokens=384", tokens=20_000_000)
    assert (short.choice.compiled, long.choice.compiled) == (False, True)
    assert 0 < short.choice.checkpointed < 60
    assert all(each.peak_gib <= 24.4 for plan in (short, long) for each in (plan.choice, *plan.alternatives))
    assert [each.seconds for each in (short.choice, *short.alternatives)] == sorted(
        each.seconds for each in (short.choice, *short.alternatives)
    )


def test_without_the_fast_step_logits_are_whole_and_nothing_is_compiled():
    fast = planned("meta-llama/Llama-3.1-8B", "H100")
    plain = planned("meta-llama/Llama-3.1-8B", "H100", "train.fast_step=false")
    assert fast.choice.compiled
    assert not any(each.compiled or each.offloaded for each in (plain.choice, *plain.alternatives, plain.smallest))
    assert any("fast_step is off" in note for note in plain.notes)
    (note,) = [note for note in fast.notes if "in chunks" in note]
    (more,) = re.findall(r"([\d.]+) GiB more", note)
    step = step_of(fast, chunked_loss=False)
    _, (whole,) = predict(fast.sizes, step)
    assert float(more) == pytest.approx(gib(whole.total) - fast.choice.peak_gib, abs=0.051)


def step_of(plan, **changes):
    """The step that a plan for Llama 3.1 8B chose."""
    chosen = plan.choice
    config = RECIPE.with_settings([f"data.seq_len_tokens={chosen.seq_len_tokens}"])
    step = step_settings(
        config,
        SHAPES["llama-3.1-8b"],
        micro_batch_size=chosen.micro_batch_size,
        checkpointed=chosen.checkpointed,
        compiled=chosen.compiled,
        captured=chosen.captured,
        trained_share=0.2,
    )
    return replace(step, offloaded=chosen.offloaded, **changes)


@pytest.mark.parametrize("model", ["falcon-7b", "llama-3.1-8b", "falcon-40b"])
@pytest.mark.parametrize("tokens", [50_000, 200_000, 5_000_000])
def test_nothing_that_fits_is_faster_than_the_choice(model, tokens):
    """This holds for short runs too, where compiling does not pay; and more memory is never slower."""
    seconds = [
        found.choice.seconds
        for gib_there in (22, 25, 26, 32, 48, 80)
        if (found := planned(f"random:{model}", f"1x{gib_there}GiB", "data.seq_len_tokens=1024", tokens=tokens)).fits
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert len(seconds) >= 5
    fewer = planned(f"random:{model}", "1x26GiB", "data.seq_len_tokens=1024", tokens=tokens // 5).choice
    assert (
        fewer.seconds <= planned(f"random:{model}", "1x26GiB", "data.seq_len_tokens=1024", tokens=tokens).choice.seconds
    )


def test_sequences_per_optimizer_step_stay_as_asked():
    """Copies on several GPUs need sequences that they can share; any micro-batch size that divides them may be chosen."""
    spread = planned("meta-llama/Llama-3.1-8B", "ml.p5.48xlarge", *ONE_SEQUENCE)
    assert spread.choice.copies == 1
    assert "no two of 8 GPUs can share an optimizer step of 1 sequence; all could with 8" in spread.notes
    assert not any("share" in note for note in planned("tiiuae/falcon-40b", "3x24GiB").notes)  # none holds a copy
    for count in (7, 8, 12, 96):
        asked = [f"train.micro_batch_size={count}", "train.gradient_accumulation_steps=1"]
        plan = planned("meta-llama/Llama-3.1-8B", "2xH100", *asked)
        assert {
            each.micro_batch_size * each.gradient_accumulation_steps * each.processes
            for each in (plan.choice, *plan.alternatives)
        } == {count}
    seven = planned(
        "meta-llama/Llama-3.1-8B", "H100", "train.micro_batch_size=7", "train.gradient_accumulation_steps=1"
    )
    assert seven.choice.micro_batch_size == 7


def test_a_line_says_whether_gpus_hold_copies_or_layers():
    plan = planned("tiiuae/falcon-7b", "4x24GiB")
    lines = {each.copies: repr(each) for each in (plan.choice, *plan.alternatives)}
    assert "a copy on each of 4 GPUs" in lines[4]
    assert "shards on 4 GPUs" in repr(planned("tiiuae/falcon-40b", "4x24GiB").choice)
    assert "over 4 GPUs" in repr(planned("tiiuae/falcon-40b", "4x24GiB", "train.share=spread").choice)


def test_the_mildest_change_is_4_bits_then_shorter_sequences():
    whole = planned("meta-llama/Llama-3.1-70B", "H100", "model.quantization=none")
    assert "--set model.quantization=nf4" in whole.fixes[0]
    long = planned("meta-llama/Llama-3.1-8B", "1x24GiB", "data.seq_len_tokens=262144")
    (length,) = re.findall(r"--set data.seq_len_tokens=(\d+)", long.fixes[0])
    assert planned("meta-llama/Llama-3.1-8B", "1x24GiB", f"data.seq_len_tokens={length}").fits
    assert not planned("meta-llama/Llama-3.1-8B", "1x24GiB", f"data.seq_len_tokens={2 * int(length)}").fits


def test_an_instance_without_a_price_is_the_last_resort():
    settings = ["data.seq_len_tokens=1024", "model.quantization=none"]
    (named,) = planned("meta-llama/Llama-3.1-405B", "H100", *settings).fixes
    other, _, rest = named.partition(",")
    assert rest == " price not known"
    assert planned("meta-llama/Llama-3.1-405B", other, *settings).fits


def test_a_tight_plan_says_so():
    tight = planned("meta-llama/Llama-3.1-8B", "1x7.5GiB", "adapter.r=16")
    assert tight.choice.peak_gib > 0.97 * 7.5
    assert any("tight" in note for note in tight.notes)
    assert not any("tight" in note for note in planned("meta-llama/Llama-3.1-8B", "H100").notes)


def test_twice_the_epochs_take_twice_the_time():
    once, twice = planned("tiiuae/falcon-7b", "H100"), planned("tiiuae/falcon-7b", "H100", "train.epochs=2")
    assert twice.tokens == 2 * once.tokens
    assert twice.choice.seconds > 1.8 * once.choice.seconds


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_catalogued_model_gets_a_plan(name):
    plan = planned(f"random:{name}", "8xA100-80GB", tokens=1_000_000)
    assert plan.fits or plan.fixes or "405b" in name or "180b" in name
    assert json.loads(json.dumps(plan.to_dict()))["model"] == f"random:{name}"
    assert name in repr(plan)


def stages_counted(monkeypatch) -> list[int]:
    """A list that grows by one with each GPU whose memory is worked out: what a plan's time goes into."""
    counted, real = [], StepMemory.stage
    monkeypatch.setattr(StepMemory, "stage", lambda *args, **options: counted.append(1) or real(*args, **options))
    return counted


def test_thirty_changes_in_a_form_are_little_arithmetic(monkeypatch):
    """Where nothing fits and other settings are searched, a change still takes a few thousand times the memory of one GPU."""
    counted = stages_counted(monkeypatch)
    for change in range(30):
        settings = [f"adapter.r={change + 1}", "model.name=random:llama-3.1-70b", "train.micro_batch_size=16"]
        forecast(RECIPE.with_settings(settings), hardware=parse_gpus("24GiB"), tokens=10**6)
    assert 30 * 100 < len(counted) < 30 * 4_000


def test_a_plan_s_work_grows_with_the_logarithm_of_the_layers(monkeypatch):
    counted, work = stages_counted(monkeypatch), []
    for layers in (32, 1024):
        shape = SHAPES["llama-3.1-8b"] | {"num_hidden_layers": layers}
        before = len(counted)
        make_plan(Workload(RECIPE, shape, parse_gpus("24GiB"), tokens=10**6), fix=False)
        work.append(len(counted) - before)
    assert work[1] <= 2 * work[0]


def test_a_mixture_is_planned_with_its_experts_in_4_bits():
    plan = planned("mistralai/Mixtral-8x7B-v0.1", "A100-80GB")
    assert plan.fits
    held = plan.smallest.memory[0].weights_quantized / 1024**3
    assert 21 < held < 22  # 46.7 B weights less embeddings, half a byte each
    assert any("goes through 2 of 8, with 12," in note for note in plan.notes)  # "12.9 B active"
    assert plan.smallest.memory[0].working > 8 * 3 * 4096 * 14336 * 2  # a layer's experts, dequantised


def test_a_hybrid_s_plan_says_where_its_sizes_come_from_and_what_was_not_measured():
    plan = planned("Qwen/Qwen3.5-9B", "A100-80GB")
    assert plan.fits
    assert plan.to_dict()["counted"] == "built"
    assert any("counted on the layers that transformers builds" in note for note in plan.notes)
    assert any("75% of its layers carry a state" in note for note in plan.notes)


# the command


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "qlora_helpers", "plan", *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_command_answers_without_heavy_imports():
    """They take seconds; the answer takes milliseconds."""
    program = (
        "import sys\n"
        "from qlora_helpers.__main__ import main\n"
        "code = main(['plan', '--model', 'tiiuae/falcon-40b', '--gpus', '4x24GiB', '--json'])\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'pandas', 'matplotlib'} & set(sys.modules)), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    found = json.loads(done.stdout)
    assert found["fits"] and found["tokens"] == round(14_732 * 189.9)
    assert found["choice"]["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "many"], "these GPUs are not known"),
        (["--gpus", "H100", "--model", "random:nothing"], "no shape is catalogued"),
        (["--gpus", "H100", "--model", "./nowhere.gguf"], "a .gguf file can't be planned"),
        (["--gpus", "H100", "--set", "adapter.target_modules=foo"], "target_modules names layers"),
        (["--gpus", "H100", "--price", "-1"], "this is not a price"),
    ],
)
def test_bad_input_is_one_message(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
