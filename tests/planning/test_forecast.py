"""What settings lead to as they are, and what makes them fit."""

from __future__ import annotations

import dataclasses

import pytest

from qlora_helpers.base.profiles import profile_config
from qlora_helpers.machine.hardware import parse_gpus
from qlora_helpers.model.shapes.catalog import known_shape
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.planning import fixes
from qlora_helpers.planning.memory import predict, usable_with_margin
from qlora_helpers.planning.run_plan import forecast, plan_run
from qlora_helpers.planning.step_settings import step_settings

FALCON = profile_config("falcon-40b")


def look(gpus: str, *settings: str, config=FALCON):
    return forecast(config.with_settings(settings), hardware=parse_gpus(gpus))


def test_the_settings_are_taken_as_they_are():
    found = look("H100", "train.checkpointed_layers=55", "train.compile=off")
    shape = known_shape("tiiuae/falcon-40b")
    step = step_settings(
        FALCON, shape, micro_batch_size=8, checkpointed=55, compiled=False, captured=True, trained_share=0.2
    )
    _, memory = predict(model_sizes(shape), step)
    assert found.step.memory == memory and found.fits and not found.fixes
    assert found.plan.choice.micro_batch_size != 8, "the plan searches"
    assert (found.adapter_parameters, found.parameters) == (55_541_760, 41_358_835_712)


def test_more_of_everything_takes_more():
    base = look("H100")
    assert look("H100", "adapter.r=64").step.peak_gib != base.step.peak_gib
    assert look("H100", "train.epochs=2").step.seconds > 1.9 * base.step.seconds
    assert look("H100", "train.max_steps=3").steps == 3
    assert look("H100", "data.train_rows=100").step.seconds < base.step.seconds / 10
    assert look("ml.p5.4xlarge").step.dollars == pytest.approx(7.912 * base.step.seconds / 3600)


@pytest.mark.parametrize(
    ("gpus", "settings"),
    [
        ("H100", ["train.activation_checkpointing=false"]),
        ("H100", ["adapter.r=512"]),
        ("24GiB", []),
    ],
)
def test_the_first_fix_fits_and_no_smaller_one_does(gpus, settings):
    found = look(gpus, *settings)
    assert not found.fits and found.shortfall_gib > 0
    fix = found.fixes[0]
    fixed = look(gpus, *settings, *fix.settings)
    assert fixed.fits
    assert (
        fixed.step.micro_batch_size * fixed.step.gradient_accumulation_steps
        == found.step.micro_batch_size * found.step.gradient_accumulation_steps
    )
    if any("checkpointed_layers" in each for each in fix.settings):
        less = [f"train.checkpointed_layers={fixed.step.checkpointed - 1}"]
    else:  # the trainer chooses the layers and leaves a margin: then the next larger micro-batch must not fit
        per_step = found.step.micro_batch_size * found.step.gradient_accumulation_steps
        more = min(count for count in range(fixed.step.micro_batch_size + 1, per_step + 1) if per_step % count == 0)
        less = [f"train.micro_batch_size={more}", f"train.gradient_accumulation_steps={per_step // more}"]
    assert not look(gpus, *settings, *fix.settings, *less).fits


@pytest.mark.parametrize(
    ("plan_seconds", "usable_gib", "faster"),
    [(98.9, 80, True), (99.0, 80, False), (99.5, 80, False), (200.0, 80, False), (200.0, 1, True), (None, 1, False)],
)
def test_a_plan_is_worth_taking_from_a_hundredth_on(plan_seconds, usable_gib, faster):
    """Or where the settings do not fit at all."""
    found = look("H100")
    choice = plan_seconds and dataclasses.replace(found.plan.choice, seconds=plan_seconds)
    hardware = dataclasses.replace(found.hardware, usable_gib=usable_gib)
    plan = dataclasses.replace(found.plan, choice=choice, workload=found.plan.workload.on(hardware))
    found = dataclasses.replace(found, step=dataclasses.replace(found.step, seconds=100.0), plan=plan)
    assert found.plan_is_faster is faster


def test_layers_are_checkpointed_as_the_step_is_compiled():
    """An uncompiled layer keeps more, so that more layers are checkpointed."""
    compiled, eager = (look("H100", "train.micro_batch_size=4", f"train.compile={way}").step for way in ("on", "off"))
    assert compiled.compiled and not eager.compiled
    assert compiled.checkpointed < eager.checkpointed < 60
    assert eager.peak_gib <= 0.97 * 79.11


@pytest.mark.parametrize(
    ("gpus", "share", "way"),
    [
        ("2xH100", "auto", "copies"),
        ("ml.g5.12xlarge", "auto", "shards"),
        ("ml.g5.12xlarge", "spread", "spread"),
        ("2xH100", "one", "one"),
        ("2xml.g5.12xlarge", "auto", "copies of shards"),
    ],
)
def test_several_gpus_are_used_as_a_start_uses_them(gpus, share, way):
    """With a micro-batch and passes that make up the same step; `plan_run` is what a start asks."""
    found = look(gpus, f"train.share={share}")
    step = found.step
    assert (step.share, found.started, found.plan_is_faster) == (way, True, False) and found.fits
    assert step.micro_batch_size * step.gradient_accumulation_steps * step.processes == 8
    if share != "one":
        hardware = parse_gpus(gpus)
        spare = dataclasses.replace(hardware, usable_gib=usable_with_margin(hardware.usable_gib))
        choice = plan_run(FALCON.with_settings([f"train.share={share}"]), hardware=spare).choice
        assert (choice.layout, choice.micro_batch_size) == (step.layout, step.micro_batch_size)
    assert (found.spread is not None) == (way in ("copies", "shards"))


def test_one_gpu_is_not_started_on_several():
    assert not look("H100").started and look("H100").spread is None
    assert look("2xH100", "train.micro_batch_size=1", "train.gradient_accumulation_steps=1").step.processes == 1


def test_what_was_set_by_hand_and_does_not_fit_in_shards_is_left_to_the_start():
    found = look("ml.g5.12xlarge", "train.activation_checkpointing=false")
    (fix,) = found.fixes
    assert not found.fits and fix.settings == ("train.activation_checkpointing=true",)
    assert look("ml.g5.12xlarge", "train.activation_checkpointing=false", *fix.settings).fits


@pytest.mark.parametrize(
    ("asked", "answer", "fitting", "longest"),
    [
        (2048, 128, 10**6, 1984),
        (2049, 128, 10**6, 2048),
        (2048, 128, 1000, 960),
        (2048, 128, 255, None),
        (2048, 700, 10**6, 1984),
        (2048, 700, 700, None),
        (2048, 700, 704, 704),
        (2048, 704, 704, None),
        (320, 128, 10**6, 256),
        (257, 128, 10**6, 256),
        (256, 128, 10**6, None),
        (512, 600, 10**6, None),
    ],
)
def test_the_longest_sequence_that_fits_is_shorter_than_asked_and_longer_than_an_answer(
    asked, answer, fitting, longest
):
    config = FALCON.with_settings([f"data.seq_len_tokens={asked}", "evaluation.max_new_tokens=64"])
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, max_new_tokens=answer))
    tried = []

    def fits(setting: str) -> bool:
        tried.append(int(setting.removeprefix("data.seq_len_tokens=")))
        return tried[-1] <= fitting

    assert fixes._longest_fitting(config, fits) == (longest and f"data.seq_len_tokens={longest}")
    assert all(answer < length < asked for length in tried) and len(tried) <= 6


def test_a_fix_keeps_the_layers_that_were_asked_to_be_checkpointed():
    """They are at least as many as asked for, though a smaller micro-batch would do with fewer; more than all are all."""
    settings = ["train.checkpointed_layers=59", "train.micro_batch_size=61", "train.compile=off"]  # a prime number
    found = look("48GiB", *settings)
    fixed = look("48GiB", *settings, *found.fixes[0].settings)
    assert not found.fits and fixed.fits and fixed.step.micro_batch_size == 1
    assert fixed.step.checkpointed == 59
    free = [setting for setting in settings if "checkpointed" not in setting]
    assert look("48GiB", *free, "train.micro_batch_size=1").step.checkpointed < 59
    assert look("H100", "train.checkpointed_layers=100").step.checkpointed == 60


def test_offloading_the_embedding_is_the_fix_where_it_is_enough():
    llama = FALCON.with_settings(["model.name=meta-llama/Llama-3.1-8B", "data.seq_len_tokens=2048", "adapter.r=16"])
    asked = ["train.micro_batch_size=2", "train.checkpointed_layers=32"]
    found = look("8GiB", *asked, config=llama)
    assert found.fixes[0].settings == ("train.offload_embeddings=true",)
    fixed = look("8GiB", *asked, *found.fixes[0].settings, config=llama)
    assert fixed.fits and not fixed.fixes


def test_an_instance_is_named_where_no_setting_helps():
    found = look("4GiB")
    assert [bool(fix.settings) for fix in found.fixes] == [False]
    assert look(found.fixes[0].hardware).plan.fits


def test_a_forecast_checkpoints_as_many_layers_as_the_trainer():
    """Both leave the trainer's margin free."""
    from qlora_helpers.model.shapes.sizes import model_sizes
    from qlora_helpers.planning.candidates import fewest_checkpointed
    from qlora_helpers.planning.memory import MEMORY_MARGIN
    from qlora_helpers.planning.step_settings import step_settings

    config = FALCON.with_settings(["train.micro_batch_size=4", "train.compile=on", "data.seq_len_tokens=2048"])
    found = look("H100", config=config)
    shape = known_shape("tiiuae/falcon-40b")
    step = step_settings(config, shape, micro_batch_size=4, trained_share=0.2)
    usable = parse_gpus("H100").usable_gib
    chosen, without = (
        fewest_checkpointed(model_sizes(shape), step, share * usable) for share in (1 - MEMORY_MARGIN, 1)
    )
    assert found.step.checkpointed == chosen > without


def test_a_fix_without_the_fast_step_checkpoints_all_layers():
    llama = FALCON.with_settings(["model.name=meta-llama/Llama-3.1-8B", "train.fast_step=false"])
    asked = ["train.activation_checkpointing=false", "train.micro_batch_size=2", "train.gradient_accumulation_steps=1"]
    found = look("16GiB", *asked, config=llama)
    assert (found.fits, found.step.compiled) == (False, False)
    assert "train.checkpointed_layers=32" in found.fixes[0].settings
    assert look("16GiB", *asked, *found.fixes[0].settings, config=llama).fits


def test_a_model_that_can_not_be_packed_is_planned_on_padded_rows():
    found = look("H100", "model.name=tiiuae/Falcon-H1-7B-Base", "data.seq_len_tokens=2048")
    assert not found.step.compiled and not found.plan.choice.compiled
    assert found.steps == 1842
    for notes in (found.notes, found.plan.notes):
        assert any("not packed" in note and "carry their state from row to row" in note for note in notes)
    window = look("H100", "model.name=microsoft/Phi-3-mini-4k-instruct", "data.seq_len_tokens=2048")
    assert window.steps < 1842, "a window shorter than the sequence is no obstacle"
    assert not any("packed" in note for note in (*window.notes, *window.plan.notes))


def test_padded_rows_count_at_full_length():
    packed = look("H100", "train.activation_checkpointing=true")
    padded = look("H100", "data.packing=false")
    assert padded.steps == 1842 and packed.steps == 171  # 14,732 rows by 8, and 1,366 packed sequences by 8
    assert any("padded" in note for note in padded.notes)


def test_an_unknown_size_is_noted_and_a_file_is_read_once(tmp_path, monkeypatch):
    from qlora_helpers.planning import run_plan

    found = look("H100", "data.source=somebody/something")
    assert any("not known" in note for note in found.notes)
    assert run_plan.data_size(FALCON.with_settings(["data.source=https://example.org/corpus.7z"]).data) is None
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"dialogue": "A: {n} hello there", "summary": "A says {n}."}}\n' for n in range(40)))
    config = FALCON.with_settings({"data.source": str(path), "data.eval_rows": 5, "data.test_rows": 5})
    first = run_plan.data_size(config.data)
    assert first.rows == 30 and 5 < first.tokens_per_row < 20
    monkeypatch.setattr(run_plan, "read_corpus", None)
    assert run_plan.data_size(config.with_settings(["data.train_rows=3"]).data) == first
