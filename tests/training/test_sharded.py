"""Layers that are shared out over several processes (FSDP2), and copies of a model: real processes that meet by gloo on the CPU.

They are forked from this process, which has imported everything. Each trains as the command line does, by `workflow.train`.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from forked_ranks import Ranks, in_ranks
from sharded_runs import LONG, SETTINGS, difference, import_all, losses, status, train, wait_for_steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def imported(torch, cache):
    import_all()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(root, imported):
    """One process that adds up two passes a step: it sees the same packed sequences."""
    (found,) = in_ranks(train, root, "alone", {"train.gradient_accumulation_steps": 2}, processes=1)
    return found


@pytest.fixture(scope="module")
def shards(root, imported):
    """Two processes that share the layers, in two sessions: the second goes on from the first one's checkpoint."""
    in_ranks(train, root, "shards", {"train.share": "shards", "train.max_steps": 2})
    shutil.copytree(root / "shards", root / "halfway")
    return in_ranks(train, root, "shards", {"train.share": "shards"})


def test_shards_learn_what_one_process_learns_to_the_bit_and_resume_so(root, alone, shards):
    assert losses(root, "shards") == losses(root, "alone")
    assert difference(root, "shards", "alone") == 0.0
    assert (root / "shards/adapter/adapter_model.safetensors").read_bytes() == (
        root / "alone/adapter/adapter_model.safetensors"
    ).read_bytes()
    assert not alone["sharded"] and all(each["sharded"] for each in shards)


def test_the_fast_step_is_the_same_with_shards(alone, shards):
    assert shards[0]["fast"] == shards[1]["fast"] == alone["fast"]
    assert "3 of 4 layers with activation checkpointing, each skipping 2 unused outputs" in shards[0]["fast"]
    assert "on   block-diagonal attention" in shards[0]["fast"] and "on   loss in chunks" in shards[0]["fast"]


def test_the_certificate_of_shards_passes(root, shards):
    found = json.loads((root / "shards/adapter/certificate.json").read_text())
    assert found["passed"] and found["prompts"] == 3 and found["largest_difference"] == 0.0


def test_what_each_process_holds_is_reported(root, alone, shards):
    assert len(shards[0]["held_gib"]) == 2 and "shared out over 2 processes" in shards[0]["audit"]
    assert "16 of 16 linear layers in nf4" in shards[1]["audit"] and alone["held_gib"] == ()
    assert set(shards[0]["peaks"]) == {"cpu", "cpu of process 2"}
    assert set(json.loads((root / "shards/plan.json").read_text())["measured"]["peak_gib"]) == set(shards[0]["peaks"])


def test_one_process_goes_on_from_two_in_the_same_order_of_the_data(root, alone, shards):
    """2 -> 1 and 1 -> 2 are the same run: the steps take the same sequences, whoever takes them."""
    shutil.copytree(root / "halfway", root / "one-goes-on")
    in_ranks(train, root, "one-goes-on", {"train.share": "shards"}, processes=1)
    assert losses(root, "one-goes-on") == losses(root, "alone")
    assert difference(root, "one-goes-on", "alone") == 0.0


def test_two_processes_go_on_from_one_as_copies(root, alone):
    accumulated = {"train.gradient_accumulation_steps": 2}
    in_ranks(train, root, "copies", accumulated | {"train.max_steps": 2}, processes=1)
    found = in_ranks(train, root, "copies", accumulated | {"train.share": "copies"})
    assert not found[0]["sharded"] and losses(root, "copies") == losses(root, "alone")
    assert difference(root, "copies", "alone") == 0.0


def held_bytes() -> int:
    """Bytes of all tensors that this process has made, each storage once."""
    import torch

    found = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor) and each.device.type == "cpu" and type(each).__name__ != "DTensor":
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def load(folder: str | None) -> dict[str, Any]:
    """Loads a model as a process of several does, and counts the bytes that are held whenever a weight has been quantised."""
    import torch

    from qlora_helpers.base.config import ModelConfig
    from qlora_helpers.model import sharding
    from qlora_helpers.model.loading import load_model
    from qlora_helpers.model.nf4 import stored_bytes
    from qlora_helpers.model.random_weights import build_random_model
    from qlora_helpers.model.shapes.catalog import SHAPES
    from qlora_helpers.model.shares import Sharing
    from qlora_helpers.model.wiring import decoder_layers
    from qlora_helpers.training.processes import join

    join(on_cpu=True)
    gc.freeze()  # what the fork inherited is not listed any more
    most, own = 0, sharding.PartKeeper.part_of

    def counted(self: Any, weight: Any) -> Any:
        nonlocal most
        most = max(most, held_bytes())
        return own(self, weight)

    sharding.PartKeeper.part_of = counted
    sharing = Sharing(1, 2)
    if folder is None:
        mesh = sharing.mesh("cpu")
        config = ModelConfig(name="random:falcon-tiny", device_map="cpu")
        model = build_random_model(
            SHAPES["falcon-tiny"] | {"num_hidden_layers": 12},
            config,
            dtype=torch.float32,
            attention=None,
            keeper=sharding.PartKeeper(mesh),
        )
        sharding.share_layers(model, mesh)
    else:
        model = load_model(ModelConfig(name=folder), sharing=sharing, say=lambda text: None).model
    linears = sharding.sharded_linears(model)
    rows = {id(each.row) for each in linears}
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return {
        "most": most,
        "weights": len(linears),
        "all": sum(each.row.numel() for each in linears),
        "here": sum(each.row.to_local().numel() for each in linears),
        "whole": sum(stored_bytes(each) for each in [*model.parameters(), *model.buffers()] if id(each) not in rows),
        "layer": max(
            sum(each.in_features * each.out_features for each in sharding.sharded_linears(layer))
            for layer in decoder_layers(model)
        ),
        "logits": logits,
    }


@pytest.fixture(scope="module")
def deep_llama(tmp_path_factory, imported):
    """A checkpoint whose decoder layers are most of it, stored in bfloat16."""
    import torch
    from tiny import tiny_llama

    from qlora_helpers.model.checkpoints import corpus_tokenizer

    folder = tmp_path_factory.mktemp("checkpoints") / "deep-llama"
    shape = {"num_hidden_layers": 12, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    tiny_llama(**shape).to(torch.bfloat16).save_pretrained(folder)
    corpus_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("source", ["a folder", "random weights"])
def test_no_process_ever_holds_more_than_its_share_and_a_layer(source, deep_llama):
    found = in_ranks(load, str(deep_llama) if source == "a folder" else None)
    for each in found:
        full = 8 * each["all"]  # of the layers in float32: 4 bits and their constants take a little more than an eighth
        assert abs(each["here"] - each["all"] / 2) <= each["weights"]
        # The embedding and norms are whole; one layer in float32 and in 4 bits is being read.
        bound = each["here"] + each["whole"] + 4 * each["layer"] + each["all"] / 12
        assert each["most"] <= bound < 0.75 * (full + each["whole"])
    assert found[0]["logits"].equal(found[1]["logits"])


def test_shared_layers_of_a_checkpoint_compute_what_a_whole_model_does(deep_llama):
    import torch

    from qlora_helpers.base.config import ModelConfig
    from qlora_helpers.model.loading import load_model

    whole = load_model(ModelConfig(name=str(deep_llama)), say=lambda text: None).model
    with torch.no_grad():
        expected = whole(input_ids=torch.arange(2, 22)[None]).logits
    assert in_ranks(load, str(deep_llama))[0]["logits"].equal(expected)


def refused(name: str, settings: dict[str, Any]) -> str:
    """What a process says that can't share a model as asked."""
    from qlora_helpers import workflow
    from qlora_helpers.base.errors import UserError

    root = Path(os.environ["QLORA_TEST_ROOT"])
    run = workflow.open_run(f"{name}-{os.environ['RANK']}", profile="tiny", settings=SETTINGS | settings, root=root)
    try:
        workflow.add_adapters(run, workflow.load(run, say=lambda text: None))
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model.quantization": "none"}, "only 4-bit weights"),
        ({"adapter.use_dora": True}, "DoRA reads whole weights"),
        ({"train.share": "spread"}, "takes one process"),
    ],
)
def test_what_can_t_be_shared_out_is_refused_in_one_sentence(settings, said, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_TEST_ROOT", str(tmp_path))
    for each in in_ranks(refused, "refused", {"train.share": "shards"} | settings):
        assert said in each


def test_a_mixture_of_experts_is_refused_before_its_stacks_are_read(tmp_path, monkeypatch):
    from mixtures import save, tiny_mixture

    monkeypatch.setenv("QLORA_TEST_ROOT", str(tmp_path))
    folder = save(tiny_mixture("qwen3_moe"), tmp_path / "mixture")
    for each in in_ranks(refused, "mixture", {"train.share": "shards", "model.name": str(folder)}):
        assert "a mixture of experts can't be shared out" in each


@pytest.mark.parametrize("how", ["a request", "SIGTERM"])
def test_shards_stop_together_and_save(how, root, imported):
    from qlora_helpers.runs.folder import Run

    name = f"stopped-by-{how.split()[-1]}"
    ranks = Ranks(train, root, name, LONG)
    wait_for_steps(root, name, 2, ranks)
    if how == "SIGTERM":
        for pid in ranks.pids:
            os.kill(pid, signal.SIGTERM)
    else:
        Run(root / name).request("stop")
    assert ranks.wait() == [0, 0], ranks.said()
    first, second = ranks.found(0), ranks.found(1)
    done = status(root, name)
    assert done["state"] == "stopped" and done["step"] == first["steps"] == second["steps"] < 200
    assert (root / name / f"checkpoints/checkpoint-{first['steps']}/verified.json").is_file()
    assert (root / name / "adapter/certificate.json").is_file() == (how != "SIGTERM")


def test_a_request_to_save_now_is_met_by_shards_which_then_go_on(root, imported):
    from qlora_helpers.runs.folder import Run

    run = Run(root / "saved-now")
    ranks = Ranks(train, root, "saved-now", LONG)
    wait_for_steps(root, "saved-now", 2, ranks)
    run.request("save")
    until = time.monotonic() + 60
    while not (answers := [each.answer for each in run.requests if each.answer]) and time.monotonic() < until:
        time.sleep(0.05)
    assert answers, ranks.said()
    saved = int(answers[0].removeprefix("saved at step "))
    wait_for_steps(root, "saved-now", saved + 2, ranks)
    run.request("stop")
    assert ranks.wait() == [0, 0], ranks.said()
    assert (root / f"saved-now/checkpoints/checkpoint-{saved}/verified.json").is_file()
    assert status(root, "saved-now")["state"] == "stopped" and status(root, "saved-now")["step"] > saved


def spoiled(root: Path, name: str, rank: int) -> Any:
    """What each process does of a training in which the loss of one is no number in its third step."""
    from qlora_helpers.base.errors import RunError
    from qlora_helpers.training.trainer import SummaryTrainer

    own = SummaryTrainer.compute_loss

    def compute_loss(self: Any, *arguments: Any, **more: Any) -> Any:
        loss = own(self, *arguments, **more)
        return loss * float("nan") if self.model.training and self.state.global_step == 2 else loss

    if os.environ["RANK"] == str(rank):
        SummaryTrainer.compute_loss = compute_loss
    try:
        train(root, name, {"train.share": "shards"})
    except RunError as error:
        return str(error)
    return None


def test_a_loss_that_is_no_number_in_one_process_ends_all_with_its_rows(root, imported):
    """The averaged gradients are none in both; the first process must not blame its own rows."""
    first, second = in_ranks(spoiled, root, "spoiled", 1)
    assert first == second
    assert first.startswith(
        "the loss is no longer a finite number (nan) at step 3 in process 2 of 2; its data: sequence "
    )
    assert "its last good checkpoint, of step 2" in first
    assert (root / "spoiled/checkpoints/checkpoint-2/verified.json").is_file()
    assert (status(root, "spoiled")["state"], status(root, "spoiled")["last_error"]) == (
        "failed",
        f"CommonFailure: {first}",
    )


def explodes(root: Path, name: str, rank: int) -> Any:
    """What each process does of a training in which the loss of one is ten times as high since its 13th step."""
    from qlora_helpers.base.errors import RunError
    from qlora_helpers.training.trainer import SummaryTrainer

    own = SummaryTrainer.compute_loss

    def compute_loss(self: Any, *arguments: Any, **more: Any) -> Any:
        loss = own(self, *arguments, **more)
        return loss * 10 if self.model.training and self.state.global_step >= 12 else loss

    if os.environ["RANK"] == str(rank):
        SummaryTrainer.compute_loss = compute_loss
    steps = {"train.max_steps": 40, "train.logging_steps": 5, "train.save_steps": 4, "train.eval_steps": 40}
    try:
        train(root, name, steps | {"train.share": "copies", "train.checkpoints_kept": 2})
    except RunError as error:
        return str(error)
    return None


def test_a_loss_that_explodes_in_another_process_than_the_first_ends_all_at_a_log(root, imported):
    """The first one's own loss is as it was: it would train on, and the other would end alone or not at all."""
    first, second = in_ranks(explodes, root, "explodes", 1)
    assert first == second
    assert first.startswith("the loss exploded to ") and "at step 13 in process 2 of 2; its data: sequence " in first
    assert "the run goes on from its last healthy checkpoint, of step 8: checkpoint 12 is set aside (" in first
    assert losses(root, "explodes")[-1][0] == 10, "found before the log of step 15 was written"
    in_ranks(train, root, "explodes", {"train.share": "copies", "train.max_steps": 9})
    assert status(root, "explodes")["state"] == "finished"
    assert '"resumed_from": 8' in (root / "explodes/progress.jsonl").read_text()


def run_out(root: Path, name: str, settings: dict[str, Any], place: str, rank: int) -> Any:
    """What each process does of a training in which one runs out of memory."""
    import contextlib

    from out_of_memory import exhausted_at

    from qlora_helpers import workflow
    from qlora_helpers.machine.hardware import parse_gpus
    from qlora_helpers.planning import run_plan
    from qlora_helpers.planning.out_of_memory import OutOfMemory

    run_plan.this_machine = lambda price=None: parse_gpus("2xL4")  # what would fit is worked out for these
    run = workflow.open_run(name, profile="tiny", settings=SETTINGS | settings, root=root)
    loaded = workflow.load(run, say=lambda text: None)
    model = workflow.add_adapters(run, loaded)
    fails = os.environ["RANK"] == str(rank)
    with exhausted_at(place, model, after=2) if fails else contextlib.nullcontext() as exhausted:
        try:
            workflow.train(run, model=model, loaded=loaded, show_progress=False)
        except OutOfMemory as error:
            return {"where": error.where, "step": error.step, "freed": exhausted.freed if fails else True}
    return None


def what_failed_in_shards(folder: Path) -> float:
    """Nine tenths of what the plan says that each of two processes held, in GiB, with CUDA's context."""
    from qlora_helpers.machine.hardware import parse_gpus
    from qlora_helpers.planning.layout import Layout
    from qlora_helpers.planning.run_plan import predicted_step
    from qlora_helpers.runs.folder import Run

    of_shards = {"hardware": parse_gpus("2xL4"), "layout": Layout(shards=2)}
    step = {"compiled": False, "checkpointed": 3, "trained_share": 0.2}
    return 0.9 * predicted_step(Run(folder).config(), **of_shards, **step)["reserved_gib"]["cuda:0"] + 0.75


def test_where_one_process_runs_out_of_memory_all_learn_of_it_and_let_go(root, imported):
    found = in_ranks(run_out, root, "full", {"train.share": "shards"}, "backward", 1)
    assert found[1]["where"] == "backward" and found[1]["freed"]
    assert found[0] == {"where": "process 2 of 2, backward", "step": found[1]["step"], "freed": True}
    ended, plan = status(root, "full"), json.loads((root / "full/plan.json").read_text())
    assert (ended["state"], ended["exit_reason"]) == ("failed", "out of memory")
    assert plan["out_of_memory"]["where"] == "process 2 of 2, backward"
    assert plan["out_of_memory"]["most_gib"] == pytest.approx(what_failed_in_shards(root / "full"), abs=2e-3)
    in_ranks(train, root, "full", {"train.share": "shards"})  # and it goes on
    assert status(root, "full")["state"] == "finished"


def evaluate(root: Path, name: str) -> dict[str, Any]:
    from qlora_helpers import workflow

    found = workflow.evaluate(workflow.open_run(name, root=root), say=lambda text: None)
    return {"rows": found.rows, "form": str(found.answered_by) if hasattr(found, "answered_by") else repr(found)}


def test_shards_answer_and_score_as_one_process_does(root, alone, shards):
    (one,) = in_ranks(evaluate, root, "alone", processes=1)
    written = json.loads((root / "alone/evaluation.json").read_text())
    first, second = in_ranks(evaluate, root, "shards")
    assert first["rows"] == second["rows"] == one["rows"]
    assert json.loads((root / "shards/evaluation.json").read_text())["scores"] == written["scores"]


def exported(root: Path, name: str) -> None:
    from qlora_helpers import workflow

    workflow.export_run(workflow.open_run(name, root=root), drift=False, say=lambda text: None)


def test_what_leaves_a_run_of_shards_is_byte_for_byte_that_of_one_process(root, alone, shards):
    """The certificate is examined anew from the saved folder, and the merged model is loaded by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from qlora_helpers.export.certificate import require_certificate

    folders = []
    for name in ("alone", "shards"):
        in_ranks(exported, root, name, processes=1)
        assert require_certificate(root / name / "adapter").passed
        assert require_certificate(root / name / "export/adapter").passed
        folders.append(root / name / "export")
    weights = [{path.relative_to(each): path.read_bytes() for path in each.rglob("*.safetensors")} for each in folders]
    assert len(weights[0]) >= 2 and weights[0] == weights[1]
    one, other = (AutoModelForCausalLM.from_pretrained(each / "merged").eval() for each in folders)
    with torch.no_grad():
        ids = torch.arange(2, 22)[None]
        assert one(input_ids=ids).logits.equal(other(input_ids=ids).logits)
    certificates = [json.loads((each / "adapter/certificate.json").read_text()) for each in folders]
    same = ("weights_sha256", "base_sha256", "parameters", "data_fingerprint", "largest_difference", "passed")
    assert [certificates[0][each] for each in same] == [certificates[1][each] for each in same]


def four_and_two_machines(root: Path) -> dict[str, Any]:
    return train(root, "copies-of-shards", {"train.share": "copies of shards", "train.max_steps": 2})


@pytest.mark.only_slow
def test_copies_of_shards_learn_what_one_process_learns(root, imported):
    found = in_ranks(four_and_two_machines, root, processes=4, here=2)
    more = {"train.gradient_accumulation_steps": 4, "train.max_steps": 2}
    in_ranks(train, root, "alone-with-four", more, processes=1)
    assert all(len(each["held_gib"]) == 4 and each["sharded"] for each in found)
    pairs = zip(losses(root, "copies-of-shards"), losses(root, "alone-with-four"), strict=True)
    assert all(abs(one[1] - other[1]) < 1e-5 for one, other in pairs)


def killed_and_resumed(root: Path, name: str, kills: int, steps: int, seed: int) -> None:
    """Trains with shards, while one process or both are killed again and again at moments drawn by seed."""
    draw = random.Random(seed)
    settings = {"train.share": "shards", "train.max_steps": steps, "train.eval_steps": steps}
    for kill in range(kills):
        done = len(losses(root, name)) if (root / name / "progress.jsonl").exists() else 0
        ranks = Ranks(train, root, name, settings)
        wait_for_steps(root, name, done + draw.randint(1, 3), ranks)  # of this session, which may take some again
        time.sleep(draw.uniform(0, 0.5))
        victim = draw.choice([0, 1, None])
        if ranks.ended():
            break
        for rank, pid in enumerate(ranks.pids):
            if victim in (rank, None):
                os.kill(pid, signal.SIGKILL)
        codes = ranks.wait(60)
        if 0 not in codes:
            assert codes.count(-signal.SIGKILL) == (2 if victim is None else 1), (kill, codes, ranks.said())
        if victim == 1 and codes[0] > 0:  # the first process learned of it, and reported
            assert "another process of this training ended" in status(root, name)["last_error"]
    in_ranks(train, root, name, settings)


@pytest.mark.parametrize(
    ("kills", "steps"),
    [pytest.param(2, 6, id="2 kills"), pytest.param(20, 60, id="20 kills", marks=pytest.mark.only_slow)],
)
def test_a_run_of_shards_that_is_killed_again_and_again_ends_as_one_that_was_not(kills, steps, root, imported):
    in_ranks(
        train,
        root,
        f"never-killed-{kills}",
        {"train.max_steps": steps, "train.eval_steps": steps, "train.share": "shards"},
    )
    killed_and_resumed(root, f"killed-{kills}", kills, steps, seed=kills)
    assert difference(root, f"killed-{kills}", f"never-killed-{kills}") == 0.0
    final = dict(losses(root, f"killed-{kills}"))  # of a step that was taken twice the last
    assert final == dict(losses(root, f"never-killed-{kills}"))
