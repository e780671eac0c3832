"""Training on tiny real models: it learns, stops and resumes as it says, and its figures are what they are called."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import shutil
import signal
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from datasets import concatenate_datasets
from pretended_captures import PretendedCapture
from tiny import prepared_data, tiny_llama
from transformers import Trainer, TrainerCallback

from qlora_helpers.base.config import AdapterConfig, TrainConfig
from qlora_helpers.base.errors import ModelError, RunError
from qlora_helpers.base.files import write_json
from qlora_helpers.data import batches
from qlora_helpers.data.batches import AllLogits, BlockDiagonalMask, KeptLogits, PaddingMask, SequenceCollator
from qlora_helpers.data.labels import IGNORED
from qlora_helpers.model.lora import add_adapters
from qlora_helpers.model.wiring import decoder_layers, row_losses
from qlora_helpers.runs import sigterm
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.progress import Progress
from qlora_helpers.runs.status import BY_INTERRUPT
from qlora_helpers.training import checkpoints as saved
from qlora_helpers.training.arguments import half_of, training_arguments
from qlora_helpers.training.callback import RunFolderCallback
from qlora_helpers.training.checkpoint_choice import choice_in_words
from qlora_helpers.training.fast_step import loss as token_loss
from qlora_helpers.training.fast_step import parts
from qlora_helpers.training.row_isolation import check_isolation
from qlora_helpers.training.step import make_collator
from qlora_helpers.training.train import SummaryTrainer, train

pytestmark = pytest.mark.usefixtures("cache", "torch")


def tuned(base=None, **settings):
    """A model with fresh adapters; no dropout unless asked for."""
    config = AdapterConfig(**{"r": 4, "lora_dropout": 0.0} | settings)
    return add_adapters(base or tiny_llama(), config, seed=0)


def settings(**changes) -> TrainConfig:
    values = {
        "max_steps": 4,
        "micro_batch_size": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_steps": 2,
        "save_steps": 2,
        "activation_checkpointing": False,
    }
    return TrainConfig(**values | changes)


@pytest.fixture
def teach(run, tokenizer, data):
    """Trains a fresh tiny Llama in the run; settings as keywords."""

    def teach(*callbacks, model=None, on=run, data=data, **changes):
        model = model or tuned()
        return model, train(
            model, tokenizer, data, settings(**changes), on, extra_callbacks=callbacks, show_progress=False
        )

    return teach


def adapter(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def largest_difference(one, other) -> float:
    one, other = adapter(one), adapter(other)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def difference(one, other) -> float:
    """Between two trained adapters, as a share of what they learned since they were made."""
    start, one, other = (adapter(model) for model in (tuned(), one, other))
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return math.sqrt(apart / sum(float((one[name] - start[name]).square().sum()) for name in one))


def checkpoints(run) -> list[int]:
    return [saved.step_of(path) for path in saved.all_checkpoints(run.checkpoints_dir)]


class At(TrainerCallback):
    """Acts when a step begins, so that a request is received when that step ends."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.action()


# learning


def test_the_loss_falls(teach, run):
    _, result = teach(max_steps=30, eval_steps=30, save_steps=30, micro_batch_size=2)
    losses = [line["loss"] for line in run.progress() if "loss" in line]
    assert len(losses) == 30
    assert losses[0] > 5
    assert losses[-1] < 0.5 * losses[0]
    assert result.loss == losses[-1]
    assert result.steps == 30
    assert "finished after 30 steps: loss" in repr(result)


def test_a_falcon_in_4_bits_learns_too(teach, run, own_falcon):
    base = {name: weight.detach().clone() for name, weight in own_falcon.model.named_parameters()}
    model, _ = teach(model=tuned(own_falcon.model, r=8), max_steps=8, eval_steps=4, save_steps=8, learning_rate=2e-2)
    losses = [line["eval_loss"] for line in run.progress() if "eval_loss" in line]
    assert losses[-1] < losses[0]
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            name = name.removeprefix("base_model.model.").replace("base_layer.", "")
            assert torch.equal(weight, base[name])  # only the adapters have moved


def test_the_same_seed_gives_the_same_adapter(teach, run, tmp_path):
    """Dropout and the order of the rows included."""
    one, _ = teach(model=tuned(lora_dropout=0.3))
    again, _ = teach(model=tuned(lora_dropout=0.3), on=Run(tmp_path / "again"))
    other, _ = teach(model=tuned(lora_dropout=0.3), on=Run(tmp_path / "other"), seed=7)
    assert largest_difference(one, again) == 0
    assert largest_difference(one, other) > 1e-4


def test_what_is_in_the_run_folder_afterwards(teach, run):
    _, result = teach()
    lines = run.progress()
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    for line in lines:
        assert line["session"] == 1
        assert line["process"]["rss_gib"] > 0
        if "loss" in line:
            assert {"time", "epoch", "learning_rate", "grad_norm", "tokens_per_s"} <= set(line)
            assert line["tokens_per_s"] > 0
    assert (run.status().step, run.status().max_steps, run.status().session) == (4, 4, 1)
    assert run.status().state == "running"  # how it ended is workflow's to say
    assert checkpoints(run) == [2, 4]
    assert all(saved.is_good(path) for path in saved.all_checkpoints(run.checkpoints_dir))
    assert (result.steps, result.stopped, result.loss) == (4, False, lines[-2]["loss"])
    assert result.eval_loss == lines[-1]["eval_loss"]
    assert result.tokens_per_s > 0
    assert result.peak_gib["cpu"] > 0


def test_the_learning_rate_follows_its_schedule(teach, run):
    teach(max_steps=4, warmup_steps=2, learning_rate=0.01)
    rates = [line["learning_rate"] for line in run.progress() if "loss" in line]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.005])


# stop, save, resume


def test_a_stop_request_saves_and_stops_at_once(teach, run):
    _, result = teach(At(3, lambda: run.request("stop")), max_steps=10, eval_steps=10, save_steps=10)
    assert (result.stopped, result.steps) == (True, 3)
    assert "stopped by request after 3 steps" in repr(result)
    assert checkpoints(run) == [3]
    (request,) = run.requests
    assert request.answer == "saved at step 3"
    assert run.status().step == 3


def test_a_save_request_saves_and_goes_on(teach, run):
    _, result = teach(At(1, lambda: run.request("save")), max_steps=3, eval_steps=10, save_steps=10)
    assert (result.stopped, result.steps) == (False, 3)
    assert checkpoints(run) == [1, 3]
    assert [request.answer for request in run.requests] == ["saved at step 1"]


@pytest.mark.parametrize("step", [1, 3])
def test_a_request_in_a_run_that_saves_after_each_epoch(teach, run, step):
    """An epoch has three steps here: a request in its last step, and any stop, save twice at one step."""
    epochs = {"max_steps": None, "epochs": 2.0, "eval_steps": None, "save_steps": None}
    teach(At(step, lambda: run.request("stop")), **epochs)
    assert saved.step_of(saved.newest_good(run.checkpoints_dir)) == step
    _, result = teach(**epochs)
    assert result.steps == 6
    assert [line["step"] for line in run.progress() if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_request_of_an_earlier_session_is_not_received(teach, run):
    run.start_session(max_steps=4, resumed_from=0)
    run.request("stop")
    _, result = teach()
    assert not result.stopped
    assert [request.answer for request in run.requests] == ["stale: the session it was meant for has ended"]


class WhileEvaluating(TrainerCallback):
    """Acts in the evaluation after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.action and state.global_step == self.step:
            self.action = self.action() and None


@pytest.mark.parametrize("kind", ["stop", "save"])
def test_requests_during_an_evaluation_are_done_right_after(teach, run, kind):
    callback = WhileEvaluating(2, lambda: run.request(kind))
    _, result = teach(callback, max_steps=6, eval_steps=2, save_steps=6)
    assert result.steps == (2 if kind == "stop" else 6)
    assert checkpoints(run)[0] == 2
    assert [request.answer for request in run.requests] == ["saved at step 2"]


def test_sigterm_during_an_evaluation_cuts_it_short_and_saves(teach, run, data):
    """The signal comes in the second of many batches."""

    class Counted(TrainerCallback):
        batches = 0

        def on_prediction_step(self, args, state, control, **kwargs):
            self.batches += 1
            if self.batches == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    many = dataclasses.replace(data, eval=concatenate_datasets([data.eval] * 20))
    counted = Counted()
    with sigterm.catching():
        _, result = teach(counted, data=many, max_steps=6, eval_steps=3, save_steps=100)
    assert len(many.eval) >= 20 and counted.batches == 2
    assert [line["step"] for line in run.progress() if "eval_loss" in line] == []
    assert (result.steps, result.eval_loss, result.stop_reason) == (3, None, sigterm.REASON)
    assert checkpoints(run) == [3]
    assert saved.is_good(run.checkpoints_dir / "checkpoint-3")
    counted.batches = 2
    with sigterm.catching():
        _, result = teach(counted, data=many, max_steps=6, eval_steps=3, save_steps=100)
    assert result.steps == 6 and counted.batches == 2 + len(many.eval)
    assert [line["step"] for line in run.progress() if "eval_loss" in line] == [6]


def test_an_interrupt_saves_within_a_step_and_says_so(teach, run):
    with sigterm.catching():
        _, result = teach(At(3, lambda: os.kill(os.getpid(), signal.SIGINT)), max_steps=6, save_steps=100)
    assert (result.steps, result.stop_reason) == (3, BY_INTERRUPT)
    assert "stopped when it was interrupted" in repr(result)
    assert checkpoints(run) == [3]


def test_the_status_says_what_the_trainer_does_now(teach, run):
    class Seen(TrainerCallback):
        phases: ClassVar[list[tuple[str, int, str]]] = []

        def note(self, moment, state):
            self.phases.append((moment, state.global_step, run.status().phase))

        def on_step_begin(self, args, state, control, **kwargs):
            self.note("step", state)

        def on_prediction_step(self, args, state, control, **kwargs):
            self.note("evaluation", state)

        def on_evaluate(self, args, state, control, **kwargs):
            self.note("evaluated", state)

    seen = Seen()
    teach(seen, max_steps=3, eval_steps=2, save_steps=2)
    assert {phase for moment, _, phase in seen.phases if moment == "step"} == {"training"}
    assert {phase for moment, _, phase in seen.phases if moment == "evaluation"} == {"evaluating"}
    assert ("evaluated", 2, "saving") in seen.phases
    progress = Progress(run.progress_path)
    progress.read()
    assert progress.events == [("saved", 2), ("saved", 3)]


# the budget


def test_patience_stops_and_saves_after_evaluations_without_a_better_loss(teach, run):
    """A learning rate that ruins the model: the first evaluation is the best."""
    _, result = teach(max_steps=10, eval_steps=1, save_steps=10, learning_rate=0.9, patience=2)
    assert result.stopped and result.steps == 3
    assert "in 2 evaluations (train.patience)" in result.stop_reason
    assert "stopped by its budget (no better evaluation loss" in repr(result)
    assert checkpoints(run) == [3]
    counted = [line["evaluations_without_better"] for line in run.progress() if "eval_loss" in line]
    assert counted == [0, 1, 2]


def test_a_run_that_lost_its_patience_can_be_resumed(teach, run):
    teach(max_steps=10, eval_steps=1, save_steps=10, learning_rate=0.9, patience=2)
    _, result = teach(max_steps=10, eval_steps=1, save_steps=10, learning_rate=0.9, patience=2)
    assert result.steps >= 5  # two evaluations more, at the least


@pytest.fixture
def an_hour_later(monkeypatch):
    """Puts the budget's clock an hour ahead."""
    from qlora_helpers.runs import budget

    return lambda: monkeypatch.setattr(budget, "time", SimpleNamespace(time=lambda: time.time() + 3600))


def test_the_limit_in_dollars_stops_and_saves(teach, run, an_hour_later):
    changes = {"max_steps": 50, "eval_steps": 50, "save_steps": 50, "stop_at_usd": 10.0, "usd_per_hour": 10.0}
    _, result = teach(At(3, an_hour_later), **changes)
    assert result.stopped and result.steps == 3 and checkpoints(run) == [3]
    assert "USD of train.stop_at_usd=10 are used" in result.stop_reason
    first, *_, last = [line["usd"] for line in run.progress()]
    assert first < 1 and last >= 10


def test_dollars_count_over_sessions(teach, run):
    status = {"state": "stopped", "started_at": 1000.0, "usd_per_hour": 10.0, "session": 1, "heartbeat": 1000.0 + 3600}
    write_json(run.status_path, status)
    _, result = teach(max_steps=4, stop_at_usd=10.0, usd_per_hour=10.0)
    assert result.stopped and result.steps == 1
    assert run.progress()[0]["usd"] >= 10


def test_the_limit_in_minutes_stops_and_saves_and_counts_per_session(teach, run, an_hour_later, monkeypatch):
    changes = {"max_steps": 5, "eval_steps": 50, "save_steps": 50, "stop_at_minutes": 60.0}
    _, result = teach(At(2, an_hour_later), **changes)
    assert result.stopped and result.steps == 2 and checkpoints(run) == [2]
    assert "of train.stop_at_minutes=60 are over" in result.stop_reason
    monkeypatch.undo()
    _, result = teach(**changes)
    assert not result.stopped and result.steps == 5


def test_a_limit_reached_with_the_last_step_stops_nothing(teach, run):
    _, result = teach(max_steps=3, eval_steps=1, learning_rate=0.9, patience=2)
    assert not result.stopped and result.steps == 3


def test_a_resumed_run_ends_as_one_that_was_never_stopped(teach, run, tmp_path):
    """Weights, optimizer, learning rate, order of the rows and dropout continue where they were."""
    whole, _ = teach(model=tuned(lora_dropout=0.2), on=Run(tmp_path / "whole"), max_steps=6)
    teach(At(3, lambda: run.request("stop")), model=tuned(lora_dropout=0.2), max_steps=6)
    resumed, result = teach(model=tuned(lora_dropout=0.2), max_steps=6)
    assert result.steps == 6
    assert largest_difference(whole, resumed) < 1e-6
    lines = run.progress()
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["session"] for line in lines if "loss" in line] == [1, 1, 1, 2, 2, 2]
    same = Run(tmp_path / "whole").progress()
    for name in ("loss", "eval_loss", "learning_rate", "grad_norm"):
        expected = [line[name] for line in same if name in line]
        assert [line[name] for line in lines if name in line] == pytest.approx(expected, rel=1e-4)
    assert run.status().session == 2


def test_adapters_on_experts_resume_as_they_were(teach, run, tmp_path):
    from mixtures import tiny_mixture

    def mixture():
        return tuned(tiny_mixture("qwen3_moe"), target_modules=("q_proj", "experts"))

    whole, _ = teach(model=mixture(), on=Run(tmp_path / "whole"))
    teach(At(3, lambda: run.request("stop")), model=mixture())
    resumed, result = teach(model=mixture())
    assert result.steps == 4 and [line["session"] for line in run.progress() if "loss" in line] == [1, 1, 1, 2]
    assert largest_difference(whole, resumed) < 1e-6 < largest_difference(mixture(), resumed)


def test_a_damaged_checkpoint_is_skipped(teach, run):
    teach(max_steps=4)
    weights = run.checkpoints_dir / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.warns(UserWarning, match="checkpoint-4 is incomplete or damaged"):
        _, result = teach(max_steps=6)
    assert result.steps == 6
    assert [line["session"] for line in run.progress() if "loss" in line] == [1, 1, 2, 2, 2, 2]
    assert checkpoints(run) == [4, 6]
    assert saved.is_good(run.checkpoints_dir / "checkpoint-4")  # written anew


def test_a_checkpoint_without_a_seal_does_not_count(teach, run):
    """Such as a process leaves that is killed while it saves."""
    teach(max_steps=2)
    (run.checkpoints_dir / "checkpoint-2" / saved.SEAL).unlink()
    with pytest.warns(UserWarning, match="checkpoint-2 is incomplete or damaged"):
        _, result = teach(max_steps=2)
    assert [line["session"] for line in run.progress() if "loss" in line] == [2, 2]
    assert result.steps == 2


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_are_kept_as_asked(teach, run, keep):
    teach(max_steps=5, save_steps=1, checkpoints_kept=keep)
    assert checkpoints(run) == [1, 2, 3, 4, 5][-keep:]


def test_a_finished_run_is_loaded_and_not_trained(teach, run):
    first, _ = teach()
    again, result = teach()
    assert largest_difference(first, again) == 0
    assert (result.steps, result.tokens_per_s) == (4, 0)
    longer, result = teach(max_steps=5)
    assert result.steps == 5
    assert largest_difference(first, longer) > 0


def test_a_resumed_run_uses_the_current_settings(teach, run):
    """Trainer itself would continue with the learning rate and steps of the checkpoint, whatever was set since."""
    teach(max_steps=2)
    teach(max_steps=8, learning_rate=1e-3, logging_steps=2, eval_steps=3, save_steps=3, checkpoints_kept=9)
    lines = [line for line in run.progress() if line["session"] == 2]
    assert [line["step"] for line in lines if "loss" in line] == [4, 6, 8]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6, 8]  # and at the end
    assert checkpoints(run) == [2, 3, 6, 8]
    # linear to zero over eight steps: the rate of steps 4, 6 and 8
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates == pytest.approx([1e-3 * (8 - done) / 8 for done in (3, 5, 7)])


@pytest.mark.parametrize("course", ["linear", "cosine", "constant"])
def test_a_finished_run_that_is_extended_learns_in_its_first_step(teach, run, course):
    """At the end of the first session the rate was zero."""
    first, _ = teach(max_steps=2, lr_scheduler_type=course)
    longer, _ = teach(max_steps=3, lr_scheduler_type=course)
    expected = {"linear": 1 / 3, "cosine": 0.5 + 0.5 * math.cos(math.pi * 2 / 3), "constant": 1}[course]
    assert run.progress()[-1 if "loss" in run.progress()[-1] else -2]["learning_rate"] == pytest.approx(1e-2 * expected)
    assert largest_difference(first, longer) > 1e-4


# figures


def test_the_evaluation_s_loss_is_over_tokens_whatever_the_batch_size(teach, tmp_path, tokenizer, corpus):
    padded = prepared_data(corpus, tokenizer, packing=False)
    results = {}
    for size in (1, 2):
        _, result = teach(
            on=Run(tmp_path / f"b{size}"),
            data=padded,
            max_steps=1,
            eval_steps=1,
            learning_rate=1e-12,
            micro_batch_size=size,
        )
        results[size] = result.eval_loss
    assert results[1] == pytest.approx(results[2], rel=1e-6)
    model = tiny_llama().requires_grad_(False)
    total = count = 0.0
    means = []
    for row in padded.eval:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits, torch.tensor(row["labels"][1:]), ignore_index=IGNORED, reduction="none"
        )
        trained = sum(label != IGNORED for label in row["labels"])
        total, count = total + float(losses.sum()), count + trained
        means.append(float(losses.sum()) / trained)
    assert results[1] == pytest.approx(total / count, rel=1e-5)
    assert abs(sum(means) / len(means) - total / count) > 1e-3  # a mean of batches would be another


def test_packed_and_padded_rows_have_the_same_evaluation_loss(teach, tmp_path, tokenizer, corpus, data):
    results = []
    for kind, blocks_ in (("packed", data), ("padded", prepared_data(corpus, tokenizer, packing=False))):
        _, result = teach(on=Run(tmp_path / kind), data=blocks_, max_steps=1, eval_steps=1, learning_rate=1e-12)
        results.append(result.eval_loss)
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_row_losses_are_sums_over_trained_tokens(padded_data):
    model = tuned().eval()
    rows = padded_data.train.to_list()
    full, kept = (SequenceCollator(1, PaddingMask(), targets)(rows) for targets in (AllLogits(), KeptLogits()))
    (sums, tokens), (same, too) = row_losses(model, full), row_losses(model, kept)
    assert torch.allclose(sums, same, rtol=1e-6)
    assert tokens.tolist() == too.tolist() == [sum(label != IGNORED for label in row["labels"]) for row in rows]
    assert model(**full).loss.item() == pytest.approx(float(sums.sum() / tokens.sum()), rel=1e-6)


@pytest.mark.parametrize("packing", [True, False])
def test_accumulated_gradients_are_those_of_one_batch(teach, tmp_path, tokenizer, corpus, packing):
    """Two forward passes of one block each make the step that one pass of two blocks makes, rows of any length."""
    made = prepared_data(corpus, tokenizer, packing=packing)
    models = {}
    for size, passes in ((2, 1), (1, 2)):
        run = Run(tmp_path / f"{size}x{passes}")
        models[size], _ = teach(
            on=run, data=made, micro_batch_size=size, gradient_accumulation_steps=passes, max_steps=3
        )
        models[size].losses = [line["loss"] for line in run.progress() if "loss" in line]
    assert models[1].losses == pytest.approx(models[2].losses, rel=1e-5)
    # As a share of what was learned: Adam makes steps of the same length of gradients that are rounding alone.
    assert difference(models[1], models[2]) < 1e-3


def test_activation_checkpointing_changes_nothing(teach, tmp_path):
    plain, _ = teach(on=Run(tmp_path / "plain"))
    checkpointed, _ = teach(on=Run(tmp_path / "checkpointed"), activation_checkpointing=True)
    assert largest_difference(plain, checkpointed) < 1e-6


def test_a_model_without_activation_checkpointing_trains_and_says_so(teach, padded_data, caplog):
    """The first GPT and CTRL; transformers raises a ValueError for them."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    sizes = {"vocab_size": 2048, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512}
    model = tuned(OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes)))
    _, result = teach(model=model, data=padded_data, activation_checkpointing=True, fast_step=False, max_steps=1)
    assert result.steps == 1
    assert "no activation checkpointing: transformers has none for OpenAIGPTLMHeadModel" in caplog.text


def test_an_embedding_on_the_host_trains_the_same_and_is_saved_as_any(teach, tmp_path):
    """Evaluations, checkpoints and accumulation included."""
    settings = {"fast_step": True, "micro_batch_size": 1, "gradient_accumulation_steps": 2}
    plain, _ = teach(on=Run(tmp_path / "plain"), **settings)
    offloaded, result = teach(on=Run(tmp_path / "offloaded"), offload_embeddings=True, **settings)
    assert "host's memory" in result.fast_step
    assert largest_difference(plain, offloaded) == 0
    names = [
        sorted(path.name for path in Run(tmp_path / name).checkpoints_dir.rglob("*")) for name in ("plain", "offloaded")
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("offloaded", [False, True], ids=["", "embedding on the host"])
def test_captured_passes_train_the_same(teach, tmp_path, monkeypatch, offloaded):
    """Evaluations, checkpoints, accumulation and a last batch that is not full included."""
    settings = {"fast_step": True, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    settings |= {"offload_embeddings": offloaded, "save_steps": 2}
    plain, expected = teach(on=Run(tmp_path / "plain"), **settings)
    captures = []

    def capture():
        captures.append(PretendedCapture())
        return captures[-1]

    monkeypatch.setattr("qlora_helpers.training.fast_step.parts.graph_refusal", lambda *args, **options: None)
    monkeypatch.setattr("qlora_helpers.training.fast_step.graphs.CudaCapture", capture)
    monkeypatch.setattr("qlora_helpers.training.fast_step.graphs.MIN_REPLAYS", 1)
    replayed, result = teach(on=Run(tmp_path / "replayed"), **settings)
    assert result.captured and "on   passes captured as CUDA graphs" in result.fast_step and not expected.captured
    # Captured again after each evaluation, and freed at the end.
    assert captures[0].captures == 3 == captures[0].freed
    assert largest_difference(plain, replayed) < 1e-6
    lines = [
        [line for line in Run(tmp_path / name).progress() if "eval_loss" in line] for name in ("plain", "replayed")
    ]
    assert [line["eval_loss"] for line in lines[0]] == pytest.approx([line["eval_loss"] for line in lines[1]], rel=1e-6)
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in replayed.parameters())


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"max_steps": 7}, 4),
        ({"max_steps": None, "epochs": 2.0, "micro_batch_size": 3}, 4),
        ({"max_steps": None, "epochs": 1.5, "micro_batch_size": 1, "gradient_accumulation_steps": 3}, 4),
        ({"max_steps": None, "epochs": 0.3, "micro_batch_size": 1}, 4),
        ({"max_steps": None, "epochs": 1.0, "micro_batch_size": 8, "gradient_accumulation_steps": 4}, 4),
    ],
)
def test_planned_steps_are_the_steps_done(teach, run, tokenizer, padded_data, changes, rows):
    assert len(padded_data.train) == rows
    _, result = teach(data=padded_data, eval_steps=100, save_steps=100, **changes)
    assert run.status().max_steps == result.steps


def test_tokens_are_counted_without_padding(run, tokenizer, padded_data):
    model = tuned()
    trainer = SummaryTrainer(
        model=model,
        args=training_arguments(settings(micro_batch_size=2), run, on_cpu=True, half=None),
        train_dataset=padded_data.train,
        eval_dataset=padded_data.eval,
        data_collator=make_collator(model, tokenizer, padded_data),
    )
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    assert len(batches) == 2
    assert int(trainer.tokens_seen) == padded_data.report.tokens


# what goes wrong


def test_a_loss_that_is_not_finite_stops_the_training(teach, run):
    """Trainer's own default logs a NaN as 0.0 and goes on."""
    with pytest.raises(
        RunError, match=r"is no longer a finite number \(\w+\) at step \d.* lower train.learning_rate"
    ) as caught:
        teach(max_steps=20, save_steps=20, eval_steps=20, learning_rate=1e30)
    assert "loss" in str(caught.value) or "grad_norm" in str(caught.value)
    assert "the run goes on from its start" in str(caught.value)
    assert all(math.isfinite(line.get("loss", 0)) for line in run.progress())
    assert checkpoints(run) == []


@pytest.mark.parametrize("fast_step", [True, False])
def test_the_batch_and_rows_of_a_loss_that_is_not_finite_are_named(teach, run, padded_data, fast_step):
    """One word that is not a number, in one row. Two forward passes a step; logs every tenth step only."""
    counts = {}
    for row in padded_data.train:
        for token in set(row["input_ids"]):
            counts.setdefault(token, []).append(row["row_ids"][0])
    token, (row_id,) = next((token, ids) for token, ids in counts.items() if len(ids) == 1)
    number = [row["row_ids"][0] for row in padded_data.train].index(row_id)
    model = tuned()

    def spoil():
        with torch.no_grad():
            model.get_input_embeddings().weight[token] = float("nan")

    teach(model=model, data=padded_data, max_steps=2, fast_step=fast_step)  # a good checkpoint
    with pytest.raises(RunError) as caught:
        teach(
            At(3, spoil),
            model=model,
            data=padded_data,
            max_steps=20,
            gradient_accumulation_steps=2,
            logging_steps=10,
            save_steps=20,
            eval_steps=20,
            fast_step=fast_step,
        )
    said = str(caught.value)
    assert said.startswith("the loss is no longer a finite number (nan) at step ")
    assert f"of 2; its data: sequence {number} (rows {row_id})" in said
    assert "the run goes on from its last good checkpoint, of step 2." in said
    assert all(bool(torch.isfinite(weight).all()) for weight in adapter(model).values())
    assert checkpoints(run) == [2]


def test_a_loss_that_explodes_stops_at_the_last_checkpoint_from_before(teach, run):
    model = tuned()

    def ruin():
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.copy_(torch.linspace(-9, 9, weight.numel()).view_as(weight))

    with pytest.raises(
        RunError, match=r"the loss exploded to \d+\.\d+, where \d\.\d+ was usual at step 31; its data: sequence"
    ):
        teach(At(31, ruin), model=model, max_steps=50, save_steps=1, eval_steps=50, micro_batch_size=2)
    assert [line["step"] for line in run.progress()][-1] == 32  # one hard batch is no explosion
    assert saved.step_of(saved.newest_good(run.checkpoints_dir)) == 29
    assert choice_in_words(run.checkpoints_dir) == (
        "Training goes on from checkpoint 29, the last healthy one: checkpoints 30, 31 and 32 are set aside "
        "(the loss exploded at step 31)."
    )
    _, result = teach(max_steps=32, save_steps=1, eval_steps=50, learning_rate=1e-3, micro_batch_size=2)
    assert (result.steps, result.new_steps) == (32, 3)
    assert checkpoints(run) == [31, 32]
    assert all(saved.is_good(path) for path in saved.all_checkpoints(run.checkpoints_dir))


def test_a_checkpoint_with_weights_that_are_not_finite_is_not_sealed(teach, run):
    """Where the step's own update ruined them: no loss has shown it yet."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    next(weight for weight in model.parameters() if weight.requires_grad).fill_(float("nan"))

    model = tuned()
    teach(max_steps=2, save_steps=2, eval_steps=100)
    with pytest.raises(RunError, match="not finite"):
        teach(Spoil(), model=model, max_steps=10, logging_steps=10, save_steps=3, eval_steps=100)
    assert checkpoints(run) == [2]
    assert saved.step_of(saved.newest_good(run.checkpoints_dir)) == 2


def test_a_float16_gradient_may_overflow(run):
    """The loss scaler skips such a step; the loss itself must stay finite."""
    run.start_session(max_steps=4, resumed_from=0)
    callback = RunFolderCallback(run, settings(), session=1, is_writer=True)
    state = SimpleNamespace(global_step=1, epoch=0.1)
    logs = {"loss": 2.0, "grad_norm": float("inf"), "learning_rate": 1e-3}
    callback.on_log(SimpleNamespace(fp16=True), state, None, logs)
    (line,) = run.progress()
    assert line["loss"] == 2.0
    assert "grad_norm" not in line  # JSON has no infinity
    with pytest.raises(RunError, match="grad_norm is no longer a finite number"):
        callback.on_log(SimpleNamespace(fp16=False), state, None, logs)
    with pytest.raises(RunError, match="loss is no longer a finite number"):
        callback.on_log(SimpleNamespace(fp16=True), state, None, logs | {"loss": float("nan")})


def test_float16_gradients_that_overflow_at_every_step_stop_it_over_two_sessions(teach, run, monkeypatch):
    """A CPU has no float16; norms that are not finite from step 6 on stand in for the loss scaler."""
    init, norm = SummaryTrainer.__init__, Trainer._get_grad_norm

    def with_float16(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.watch.may_overflow = True
        self.args.fp16 = True  # what is read of it while steps are made: whether a norm may be infinite

    def overflow(self, *args, **kwargs):
        found = norm(self, *args, **kwargs)
        return found if self.state.global_step < 5 else found * float("nan")

    monkeypatch.setattr(SummaryTrainer, "__init__", with_float16)
    monkeypatch.setattr(Trainer, "_get_grad_norm", overflow)
    often = {"learning_rate": 1e-4, "eval_steps": 100, "save_steps": 20}
    _, result = teach(max_steps=20, **often)
    assert result.steps == 20
    with pytest.raises(RunError) as caught:
        teach(max_steps=60, **often)
    assert str(caught.value) == (
        "nothing was learned since step 5: float16 gradients overflowed in 31 steps in a row, first at step 6. Lower "
        "train.learning_rate, or give a new run model.compute_dtype=float32; the run goes on from its last good checkpoint, of "
        "step 20."
    )
    assert [line["step"] for line in run.progress()][-1] == 35


def test_rows_that_attend_to_each_other_stop_before_training(teach, run, monkeypatch):
    def leaking_mask(segments):
        return torch.ones(*segments.shape, segments.shape[1]).tril()[:, None].bool()

    monkeypatch.setattr(batches, "block_diagonal_mask", leaking_mask)
    with pytest.raises(ModelError, match=r"lets packed rows attend to each other; expected .* Set data.packing=false"):
        teach(fast_step=False)
    assert not run.status_path.exists()


def test_rows_that_the_kernel_lets_attend_to_each_other_get_a_mask(teach, monkeypatch):
    def one_row(segments, most_rows):
        return torch.tensor([0, segments.numel()], dtype=torch.int32)

    monkeypatch.setattr(batches, "row_starts", one_row)
    _, result = teach(max_steps=1)
    assert "off  block-diagonal attention" in result.fast_step and "its rows reach each other" in result.fast_step


def test_a_fast_step_with_other_losses_stops_before_training(teach, run, monkeypatch):
    """Where no part's own proof saw it: a part that makes every value of a layer a thousandth larger."""

    @contextlib.contextmanager
    def larger(model):
        layer = decoder_layers(model)[0]
        hook = layer.register_forward_hook(lambda module, args, out: out * 1.001)
        yield
        hook.remove()

    place = parts.PARTS.index(parts.CHECK)
    wrong = parts.Part("larger", lambda request, on: larger(request.inner))
    monkeypatch.setattr(parts, "PARTS", (*parts.PARTS[:place], wrong, *parts.PARTS[place:]))
    with pytest.raises(ModelError, match=r"does not give this model's own losses; .* Set train.fast_step=false"):
        teach()
    assert not run.status_path.exists()


def test_a_loss_in_chunks_that_is_not_the_model_s_is_off_with_its_reason(teach, monkeypatch):
    right = token_loss.token_losses
    monkeypatch.setattr(token_loss, "token_losses", lambda hidden, *args, **more: right(hidden * 1.01, *args, **more))
    _, result = teach(max_steps=1)
    assert "off  loss in chunks" in result.fast_step and "differs from the loss in chunks by" in result.fast_step


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_fast_step_trains_the_plain_steps_adapter(teach, tmp_path, packing, accumulation, data, padded_data):
    """Through Trainer, over several steps, evaluations and accumulation."""
    data = data if packing else padded_data
    runs = {fast: Run(tmp_path / str(fast)) for fast in (True, False)}
    models = {}
    for fast, each in runs.items():
        models[fast], _ = teach(
            on=each,
            data=data,
            fast_step=fast,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
            max_grad_norm=1e3,
            activation_checkpointing=fast,
            checkpointed_layers=1,
        )
    assert difference(models[True], models[False]) < 1e-3
    lines = {fast: each.progress() for fast, each in runs.items()}
    for one, other in zip(lines[True], lines[False], strict=True):
        for name in ("loss", "eval_loss", "grad_norm"):
            assert (name in one) == (name in other)
            if name in one:
                assert one[name] == pytest.approx(other[name], rel=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_block_diagonal_attention_in_bfloat16(tokenizer, data, attention):
    """Rounding does not count as a leak."""
    model = tiny_llama(attn_implementation=attention).to(torch.bfloat16)
    changed, apart = check_isolation(model, make_collator(model, tokenizer, data), longest=128)
    assert changed == 0
    assert apart < 0.05


def test_a_disk_that_fills_up_while_saving_leaves_the_last_good_checkpoint(teach, run, monkeypatch):
    teach(max_steps=2)
    monkeypatch.setattr(saved, "write_json", _full)
    with pytest.raises(RunError, match="could not be written"):
        teach(max_steps=4)
    assert checkpoints(run) == [2]
    assert saved.step_of(saved.newest_good(run.checkpoints_dir)) == 2


def _full(*args):
    raise RunError("verified.json could not be written (No space left on device)")


# devices


@pytest.mark.parametrize("halves", [False, True])
def test_a_model_that_is_dispatched_over_devices_trains(teach, tmp_path, halves):
    """With accelerate's hooks on every layer, as over several GPUs; here all are the CPU."""
    from accelerate import dispatch_model

    whole, _ = teach(on=Run(tmp_path / "whole"))
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    base = dispatch_model(tiny_llama(), places if halves else {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in base.modules())
    dispatched, result = teach(model=tuned(base), on=Run(tmp_path / "dispatched"))
    assert result.steps == 4
    assert largest_difference(whole, dispatched) < 1e-6


@pytest.mark.parametrize(
    ("optim", "fast", "on_cpu", "taken"),
    [
        ("adamw_torch", True, False, "adamw_torch_fused"),
        ("adamw_torch", False, False, "adamw_torch"),
        ("adamw_torch", True, True, "adamw_torch"),
        ("adamw_8bit", True, False, "adamw_8bit"),
    ],
)
def test_the_fast_step_on_a_gpu_takes_a_fused_optimizer(run, optim, fast, on_cpu, taken):
    assert training_arguments(settings(optim=optim), run, on_cpu=on_cpu, half=None, fast=fast).optim == taken


def test_arguments_are_the_recipe_s(run):
    args = training_arguments(TrainConfig(), run, on_cpu=True, half=None)
    assert (args.learning_rate, args.per_device_train_batch_size, args.num_train_epochs) == (2e-4, 8, 1.0)
    assert (args.max_grad_norm, args.warmup_steps, args.optim) == (1.0, 0, "adamw_torch")
    assert (args.seed, args.data_seed) == (42, 42)
    assert args.logging_nan_inf_filter is False
    assert args.save_total_limit is None  # we rotate, after we have verified
    assert args.report_to == []
    assert args.use_cpu
    assert getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing
    assert training_arguments(settings(max_steps=None), run, on_cpu=True, half=None).max_steps == -1


def test_adapters_train_in_float32_beside_16_bits():
    assert half_of(tuned(tiny_llama().to(torch.bfloat16))) == torch.bfloat16
    assert half_of(tuned(tiny_llama().to(torch.float16))) == torch.float16
    assert half_of(tuned()) is None


def test_the_collator_fits_the_model(tokenizer, data, padded_data):
    packed = make_collator(tuned(), tokenizer, data)
    assert packed == SequenceCollator(1, BlockDiagonalMask(), KeptLogits(), length=128)
    assert make_collator(tuned(), tokenizer, padded_data) == SequenceCollator(1, PaddingMask(), KeptLogits())
    eager = tiny_llama(attn_implementation="eager").to(torch.bfloat16)
    assert make_collator(tuned(eager), tokenizer, data).attention == BlockDiagonalMask(torch.bfloat16)


def test_an_eager_model_trains_as_an_sdpa_one(teach, tmp_path):
    sdpa, _ = teach(on=Run(tmp_path / "sdpa"))
    eager, _ = teach(model=tuned(tiny_llama(attn_implementation="eager")), on=Run(tmp_path / "eager"))
    assert largest_difference(sdpa, eager) < 1e-4


def test_the_heart_beats_while_nothing_is_logged(teach, run, monkeypatch):
    monkeypatch.setattr("qlora_helpers.training.callback.HEARTBEAT_S", 0.0)
    beats = []
    teach(At(3, lambda: beats.append(copy.copy(run.status()))), logging_steps=100, eval_steps=100, save_steps=100)
    assert beats[0].step == 2
    assert beats[0].heartbeat > 0


def test_a_copied_run_folder_goes_on(teach, run, tmp_path):
    """Such as on other hardware."""
    teach(max_steps=2)
    shutil.copytree(run.folder, tmp_path / "elsewhere")
    _, result = teach(on=Run(tmp_path / "elsewhere"), max_steps=4)
    assert result.steps == 4
    assert dataclasses.asdict(result)["stopped"] is False
