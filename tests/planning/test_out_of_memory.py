"""Out of memory: the error says where and what next, nothing keeps the memory, and the run can continue."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
import traceback
import weakref

import pytest
from out_of_memory import PLACES, exhausted_at, held_bytes

from qlora_helpers import workflow
from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import read_json
from qlora_helpers.base.place import at
from qlora_helpers.machine.hardware import Hardware, find_gpu
from qlora_helpers.planning import out_of_memory, run_plan
from qlora_helpers.planning.layout import Layout
from qlora_helpers.planning.out_of_memory import OutOfMemory, is_out_of_memory, rescued
from qlora_helpers.planning.rescue import Failure, find_rescue
from qlora_helpers.runs.plan_file import read_plan
from qlora_helpers.workflow import open_run

SETTINGS = {
    "train.max_steps": 4,
    "train.save_steps": 2,
    "train.eval_steps": 2,
    "train.logging_steps": 1,
    "train.micro_batch_size": 4,
    "train.tensorboard": "off",
    "data.train_rows": 8,
    "data.eval_rows": 2,
    "data.test_rows": 1,
    "data.seq_len_tokens": 192,
}


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def loaded(cache, torch, tmp_path_factory):
    return workflow.load(open_run("base", profile="tiny", root=tmp_path_factory.mktemp("base")), say=quiet)


@pytest.fixture
def run(tmp_path):
    return open_run("mine", profile="tiny", settings=SETTINGS, root=tmp_path)


@pytest.fixture
def model(run, loaded):
    from qlora_helpers.model import lora

    model = workflow.add_adapters(run, loaded)
    yield model
    lora.remove_adapters(model)


def train(run, model, loaded):
    return workflow.train(run, model=model, loaded=loaded, show_progress=False, say=quiet)


# where, and what is held


@pytest.mark.parametrize("place", PLACES)
def test_the_place_is_named_and_the_step_s_memory_is_freed(run, model, loaded, place, monkeypatch):
    """As in a notebook, where the last error is kept."""
    gc.collect()
    before = held_bytes()
    with exhausted_at(place, model, after=1) as exhaust, pytest.raises(OutOfMemory) as caught:
        train(run, model, loaded)
    monkeypatch.setattr(sys, "last_value", caught.value, raising=False)
    assert caught.value.where.startswith(PLACES[place])
    assert f"({caught.value.where})" in str(caught.value)
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    assert exhaust.freed
    assert held_bytes() <= 1.01 * before
    assert all(weight.grad is None for weight in model.parameters())
    status = run.status()
    assert (status.state, status.exit_reason) == ("failed", "out of memory")
    assert status.last_error.startswith("OutOfMemory: out of memory after ")
    with pytest.raises(RunError, match="is failed"):
        run.request("stop")


class Layered:
    """Builds a small model whose layers are checkpointed, and which fails where it is told to."""

    def __init__(self, torch):
        from torch.utils.checkpoint import checkpoint

        self.fail = lambda layer: False
        self.calls = dict.fromkeys(range(3), 0)
        case = self

        class Layer(torch.nn.Module):
            def __init__(self, number):
                super().__init__()
                self.number, self.linear = number, torch.nn.Linear(4, 4)

            def forward(self, x):
                case.calls[self.number] += 1
                if case.fail(self.number):
                    raise MemoryError
                return self.linear(x).tanh()

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = torch.nn.ModuleList(Layer(number) for number in range(3))

            def forward(self, x):
                for layer in self.layers:
                    x = checkpoint(layer, x, use_reentrant=False)
                return x.sum()

        self.model, self.x = Model(), torch.ones(2, 4, requires_grad=True)

    def where(self, *places):
        """What the failure of a step says, with `places` around it."""

        def step(trainer):
            with contextlib.ExitStack() as entered:
                for place in places:
                    entered.enter_context(at(place))
                with at("forward"):
                    loss = trainer.model(self.x)
                with at("backward"):
                    loss.backward()

        try:
            Trainer(self.model).run(step)
        except MemoryError as error:
            return out_of_memory.failure_of(error).where
        return "no failure"


class Trainer:
    def __init__(self, model):
        self.model = model

    def run(self, step):
        step(self)


def test_a_layer_that_fails_is_named_in_the_forward_pass_and_when_it_is_recomputed(torch):
    case = Layered(torch)
    case.fail = lambda layer: layer == 1 and case.calls[1] == 1
    assert case.where() == "forward of layer 2 of 3"
    case.calls[1] = 0
    assert case.where("evaluation") == "evaluation, forward of layer 2 of 3"
    case.calls[1] = -1
    assert case.where() == "backward, recomputation of layer 2 of 3"
    case.fail = lambda layer: False
    assert case.where() == "no failure"


def test_a_backward_pass_that_fails_outside_of_a_recomputation_names_no_layer(torch):
    case = Layered(torch)
    case.x.register_hook(lambda gradient: fail())
    assert case.where() == "backward"


def test_a_failure_outside_of_all_places_names_its_function():
    try:
        fail()
    except MemoryError as error:
        assert out_of_memory.failure_of(error) == out_of_memory.Failure("in fail")


def test_the_places_of_a_chain_of_errors_begin_with_the_first_error():
    @at("evaluation")
    def step():
        try:
            with at("optimizer"):
                fail()
        except MemoryError as error:
            raise RuntimeError("the step failed") from error

    try:
        step()
    except RuntimeError as error:
        assert out_of_memory.failure_of(error).where == "evaluation, optimizer"


def fail():
    raise MemoryError


def test_without_the_rescue_the_frames_would_hold_it(run, model, loaded):
    """The measurement would notice."""
    with exhausted_at("forward", model) as exhaust, pytest.raises(RuntimeError) as caught:
        workflow.train.__wrapped__(run, model=model, loaded=loaded, show_progress=False, say=quiet)
    assert is_out_of_memory(caught.value)
    assert not exhaust.freed


def test_in_a_notebook_s_shell(run, model, loaded):
    """IPython keeps the error in `sys` and in its own formatter, and shows a short traceback."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    try:
        shell.push({"run": run, "model": model, "loaded": loaded, "train": train})
        with exhausted_at("backward", model, after=1) as exhaust:
            outcome = shell.run_cell("result = train(run, model, loaded)")
            assert isinstance(outcome.error_in_exec, OutOfMemory)
            assert isinstance(sys.last_value, OutOfMemory)
            assert exhaust.freed
            shown = traceback.extract_tb(outcome.error_in_exec.__traceback__)
            assert "wrapper" in [frame.name for frame in shown]
            assert len(shown) < 8
    finally:
        shell.reset()
        InteractiveShell.clear_instance()


def test_an_error_that_python_keeps_from_an_earlier_cell_is_released(torch, monkeypatch):
    """Such as the error of an answer that was asked for by hand."""

    def by_hand():
        large = torch.ones(1000, 1000)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    held = []
    try:
        by_hand()
    except RuntimeError as error:
        monkeypatch.setattr(sys, "last_value", error, raising=False)
    assert held[0]() is not None
    out_of_memory.free_memory()
    assert held[0]() is None


def test_an_error_caused_by_lack_of_memory_counts(torch):
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("out of memory lane"))
    wrapped = ValueError("the compiler failed")
    wrapped.__cause__ = RuntimeError("CUDA error: out of memory")
    assert is_out_of_memory(wrapped)


def test_other_errors_are_not_changed(run):
    @rescued
    def step(run):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        step(run)
    assert caught.traceback[-1].name == "step"


# what next


def card(usable_gib: float) -> Hardware:
    return Hardware("H100", 1, usable_gib, find_gpu("NVIDIA H100 80GB HBM3"), None, "")


@pytest.fixture
def falcon_7b(tmp_path, monkeypatch):
    """A run of Falcon-7B on a card of 24 GiB, whose batches were too large."""
    monkeypatch.setattr(run_plan, "this_machine", lambda price=None: card(24.0))
    settings = {
        "model.name": "tiiuae/falcon-7b",
        "train.micro_batch_size": 16,
        "train.gradient_accumulation_steps": 1,
        "train.activation_checkpointing": False,
        "data.seq_len_tokens": 1024,
    }
    run = open_run("large", profile="falcon-40b", settings=settings, root=tmp_path)

    @rescued
    def step(run):
        with at("forward", facts=lambda: {"step": 3, "compiled": False, "checkpointed": None}):
            raise MemoryError

    return run, step


def test_the_next_settings_are_ranked_by_speed_with_their_gib(falcon_7b):
    run, step = falcon_7b
    with pytest.raises(OutOfMemory) as caught:
        step(run)
    found = caught.value.candidates
    assert len(found) == 3
    assert [each.tokens_per_s for each in found] == sorted((each.tokens_per_s for each in found), reverse=True)
    assert all(each.peak_gib <= 24.0 for each in found)
    assert all(
        each.micro_batch_size * each.gradient_accumulation_steps == 16 for each in found
    )  # the same optimizer step
    for number, each in enumerate(found, start=1):
        assert f"\n  {number}. {each!r}" in str(caught.value)
        assert f"{each.peak_gib:.1f} GiB" in str(caught.value)
    assert "workflow.retry(run) continues from the last checkpoint with the first of them" in str(caught.value)


def test_settings_that_should_have_fitted_are_not_offered_again(falcon_7b, monkeypatch):
    """The prediction was wrong for them; the next settings must hold clearly less."""
    run, step = falcon_7b
    monkeypatch.setattr(run_plan, "this_machine", lambda price=None: card(400.0))
    with pytest.raises(OutOfMemory) as first:
        step(run)
    held = run_plan.predicted_step(
        run.config(), hardware=card(400.0), compiled=False, checkpointed=0, trained_share=0.2
    )["reserved_gib"]
    assert first.value.candidates
    context = 0.5  # what PyTorch reserves is held beside it
    assert all(each.peak_gib - context < 0.91 * held["cuda:0"] for each in first.value.candidates)


@pytest.mark.parametrize(("processes", "gpus"), [("1", 4), ("4", 1)])
def test_under_torchrun_each_process_plans_for_its_own_gpu(falcon_7b, monkeypatch, processes, gpus):
    run, step = falcon_7b
    monkeypatch.setattr(run_plan, "this_machine", lambda price=None: dataclasses.replace(card(12.0), gpus=4))
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(OutOfMemory) as caught:
        step(run)
    assert caught.value.candidates
    assert {len(each.layers_per_gpu) for each in caught.value.candidates} == {gpus}


@pytest.mark.parametrize("gpus", [3, 4])
def test_candidates_that_take_torchrun_hide_no_others(falcon_7b, monkeypatch, gpus):
    """A copy of the model on each GPU would be faster, but is not possible in this process."""
    run, step = falcon_7b
    monkeypatch.setattr(run_plan, "this_machine", lambda price=None: dataclasses.replace(card(24.0), gpus=gpus))
    with pytest.raises(OutOfMemory) as caught:
        step(run)
    assert len(caught.value.candidates) == 3
    assert {(each.copies, len(each.layers_per_gpu)) for each in caught.value.candidates} == {(1, gpus)}


def in_four_processes(monkeypatch, share: str, run) -> None:
    run.save_config(run.config().with_settings([f"train.share={share}"]))
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)


def test_processes_that_share_layers_are_offered_what_fits_in_shards(falcon_7b, monkeypatch):
    """Four cards of 8 GiB: a quarter of the layers fits on each, and smaller micro-batches do; a whole copy would not."""
    run, step = falcon_7b
    monkeypatch.setattr(run_plan, "this_machine", lambda price=None: dataclasses.replace(card(8.0), gpus=4))
    in_four_processes(monkeypatch, "shards", run)
    with pytest.raises(OutOfMemory) as caught:
        step(run)
    found = caught.value.candidates
    assert found and all(each.share == "shards" and each.step.shards == 4 for each in found)
    assert all(each.micro_batch_size * each.gradient_accumulation_steps == 16 for each in found)  # of each process
    assert found[0].micro_batch_size < 16 and "train.share=shards" in found[0].settings
    for each in found:
        again = run.config().with_settings(each.settings)
        held = run_plan.predicted_step(
            again,
            hardware=dataclasses.replace(card(8.0), gpus=4),
            compiled=each.compiled,
            checkpointed=each.checkpointed,
            trained_share=0.2,
            layout=Layout(shards=4),
        )["reserved_gib"]["cuda:0"]
        assert held + 0.75 == pytest.approx(each.peak_gib, abs=2e-3) and each.peak_gib <= 8.0
    assert read_plan(run).out_of_memory.next[0] == tuple(found[0].settings)
    assert "workflow.retry" not in str(caught.value) and "ql.start(run)" in str(caught.value)


def test_copies_that_do_not_fit_are_offered_shards(falcon_7b, monkeypatch):
    run, step = falcon_7b
    monkeypatch.setattr(run_plan, "this_machine", lambda price=None: dataclasses.replace(card(4.5), gpus=4))
    in_four_processes(monkeypatch, "copies", run)
    with pytest.raises(
        OutOfMemory, match=r"What would fit: ql.start\(run, gpus=4, share='shards'\): .* shards on 4 GPUs: 4\.3 GiB"
    ) as caught:
        step(run)
    assert caught.value.candidates == ()


def test_shards_are_offered_more_of_this_machine_s_gpus(falcon_7b, monkeypatch):
    """Two of eight cards are in use: a smaller part of the layers on each leaves room for what did not fit."""
    run, step = falcon_7b
    monkeypatch.setattr(run_plan, "this_machine", lambda price=None: dataclasses.replace(card(5.0), gpus=8))
    in_four_processes(monkeypatch, "shards", run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(OutOfMemory, match=r"ql.start\(run, gpus=8, share='shards'\): .* shards on 8 GPUs: 4\.\d GiB"):
        step(run)


def test_what_is_free_is_that_of_the_process_that_ran_out_and_of_its_own_card(torch, monkeypatch):
    """Rank 1 of two: the other card is full of what rank 0 holds, which says nothing about this one."""
    free = {0: 0.2, 1: 6.0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (int(free[index] * 2**30), 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 3 * 2**30)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MemoryError) as caught:
        fail()
    assert out_of_memory.failure_of(caught.value).usable_gib == 9.75  # with 0.75 for the context
    monkeypatch.setenv("WORLD_SIZE", "1")  # layers that are spread over both
    assert out_of_memory.failure_of(caught.value).usable_gib == pytest.approx(3.95)


def test_a_card_of_which_another_program_holds_a_part_is_planned_with_the_rest(falcon_7b, monkeypatch):
    run, _ = falcon_7b
    monkeypatch.setattr(run_plan, "this_machine", lambda price=None: dataclasses.replace(card(24.0), gpus=4))
    in_four_processes(monkeypatch, "shards", run)
    failure = Failure("process 2 of 4, backward", step=3, checkpointed=0, compiled=True)
    whole, part = (find_rescue(run.config(), dataclasses.replace(failure, usable_gib=gib)) for gib in (None, 9.0))
    assert part.most_gib == 9.0 < whole.most_gib
    assert all(each.peak_gib <= 9.0 for each in part.candidates) and part.candidates[0] != whole.candidates[0]


def test_the_error_names_what_would_fit(falcon_7b, monkeypatch):
    run, step = falcon_7b
    monkeypatch.setattr(run_plan, "this_machine", lambda price=None: card(4.5))
    with pytest.raises(OutOfMemory, match=r"What would fit: .*ml\.") as caught:
        step(run)
    assert caught.value.candidates == ()


def test_answers_that_run_out_of_memory_get_their_own_advice(run, model, loaded):
    open_run(run.folder, settings={"train.max_steps": 1})
    train(run, model, loaded)
    with exhausted_in_the_first_step(loaded), pytest.raises(OutOfMemory) as caught:
        workflow.evaluate(run, model=model, loaded=loaded, say=quiet)
    assert caught.value.where == "generation, forward of layer 2 of 4"
    assert "Lower evaluation.batch_size or evaluation.max_new_tokens" in str(caught.value)
    assert run.status().state == "finished"  # the training was


# retry


def test_retry_continues_from_the_last_checkpoint(run, model, loaded, monkeypatch, tmp_path):
    offered = ["data.seq_len_tokens=64", "train.micro_batch_size=2", "train.gradient_accumulation_steps=2"]
    with exhausted_at("optimizer", model, after=2), pytest.raises(OutOfMemory, match="after 2 steps"):
        train(run, model, loaded)
    from qlora_helpers.base.files import write_json

    plan = read_json(run.plan_path)
    assert plan["out_of_memory"] == {"where": "optimizer", "step": 2, "next": []}  # a CPU has no plan
    plan["out_of_memory"]["next"] = [offered]
    write_json(run.plan_path, plan)
    said = []
    result = workflow.retry(run, model=model, loaded=loaded, show_progress=False, say=said.append)
    assert said[0] == "Going on with train.micro_batch_size=2, train.gradient_accumulation_steps=2"
    assert (result.steps, result.new_steps) == (4, 2)
    assert [(line["session"], line["step"]) for line in run.progress() if "loss" in line] == [
        (1, 1),
        (1, 2),
        (2, 3),
        (2, 4),
    ]
    assert run.config().train.micro_batch_size == 2
    assert run.config().data.seq_len_tokens == SETTINGS["data.seq_len_tokens"]
    assert run.status().state == "finished"


def test_retry_takes_settings_of_the_caller(run, model, loaded):
    with exhausted_at("forward", model), pytest.raises(OutOfMemory):
        train(run, model, loaded)
    result = workflow.retry(
        run, model=model, loaded=loaded, settings=["train.max_steps=1"], show_progress=False, say=quiet
    )
    assert result.steps == 1


def test_a_session_that_fails_before_its_first_checkpoint_leaves_the_adapters_as_they_were(
    run, model, loaded, tmp_path
):
    """So that the next one, in the same process, is the run that never failed."""
    import torch

    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    with exhausted_at("optimizer", model, after=1), pytest.raises(OutOfMemory):
        train(run, model, loaded)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters() if name in before)
    train(run, model, loaded)
    fresh = open_run("fresh", profile="tiny", settings=SETTINGS, root=tmp_path)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in before:
                weight.copy_(before[name])
    train(fresh, model, loaded)
    name = "adapter_model.safetensors"
    assert (run.adapter_dir / name).read_bytes() == (fresh.adapter_dir / name).read_bytes()


def test_adapters_added_for_a_session_are_removed_when_it_fails(run, loaded):
    names = {name for name, _ in loaded.model.named_modules()}
    for _ in range(2):
        with pytest.raises(OutOfMemory), exhausted_in_the_first_step(loaded):
            workflow.train(run, loaded=loaded, show_progress=False, say=quiet)
        assert {name for name, _ in loaded.model.named_modules()} == names


def exhausted_in_the_first_step(loaded):
    import contextlib

    from qlora_helpers.model.wiring import decoder_layers

    @contextlib.contextmanager
    def hooked():
        def fail(module, inputs):
            raise MemoryError

        hook = decoder_layers(loaded.model)[1].register_forward_pre_hook(fail)
        try:
            yield
        finally:
            hook.remove()

    return hooked()
