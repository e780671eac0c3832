"""A run in one line: each form of data, settings by the data, what is set by hand, and bad input that leaves nothing."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub import COMMIT, hub

import qlora_helpers as ql
from qlora_helpers import beginning, demo, workflow
from qlora_helpers.__main__ import main
from qlora_helpers.base.config import ModelConfig
from qlora_helpers.base.errors import ConfigError, DataError, ModelError, RunError, UserError
from qlora_helpers.data.lengths import covering
from qlora_helpers.data.templates import make_template
from qlora_helpers.machine import telemetry
from qlora_helpers.machine.hardware import Hardware, parse_gpus
from qlora_helpers.model.checkpoints import find_checkpoint
from qlora_helpers.model.shapes.catalog import known_shape
from qlora_helpers.planning import choosing
from qlora_helpers.planning.as_given import settings_as_given
from qlora_helpers.planning.decided import BY_HAND
from qlora_helpers.planning.layout import Layout
from qlora_helpers.planning.workload import Workload
from qlora_helpers.runs import locks
from qlora_helpers.runs.plan_file import read_plan
from qlora_helpers.views import report

WORDS = ("printer", "drops", "paper", "each", "morning", "please", "send", "one", "tray", "to", "our", "office")
LABELS = ("billing", "hardware", "access")
ROWS = 1000


def tickets() -> list[tuple[str, str, str]]:
    """A thousand tickets: text, reply, label."""
    draw = random.Random(0)

    def some(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    return [
        (f"Ticket {number}: {some(10, 60)}", f"We know of it: {some(5, 20)}", draw.choice(LABELS))
        for number in range(ROWS)
    ]


def json_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_messages(folder: Path) -> Path:
    turns = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]}
        for text, reply, _ in tickets()
    ]
    return json_lines(folder / "messages.jsonl", turns)


def as_alpaca(folder: Path) -> Path:
    rows = [{"instruction": "Answer.", "input": text, "output": reply} for text, reply, _ in tickets()]
    return json_lines(folder / "alpaca.jsonl", rows)


def as_conversations(folder: Path) -> Path:
    rows = [
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": reply}]}
        for text, reply, _ in tickets()
    ]
    return json_lines(folder / "sharegpt.jsonl", rows)


def as_labels(folder: Path) -> Path:
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("ticket", "label"), *((text, label) for text, _, label in tickets())])
    return folder / "labels.csv"


def as_questions(folder: Path) -> Path:
    return json_lines(folder / "qa.jsonl", [{"question": text, "answer": reply} for text, reply, _ in tickets()])


def as_dialogues(folder: Path) -> Path:
    return json_lines(folder / "talks.jsonl", [{"dialogue": text, "summary": reply} for text, reply, _ in tickets()])


def as_documents(folder: Path) -> Path:
    return json_lines(folder / "pages.jsonl", [{"text": text} for text, _, _ in tickets()])


FORMS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "messages": (as_messages, "text"),
    "alpaca": (as_alpaca, "text"),
    "conversations": (as_conversations, "text"),
    "columns": (as_labels, "labels"),
    "question_answer": (as_questions, "text"),
    "dialogue": (as_dialogues, "text"),
    "text": (as_documents, "auto"),
}


def new(folder: Path, data: Path, llama_folder: Path, *settings: str, name: str = "mine"):
    said: list[str] = []
    run = ql.new_run(
        name, model=str(llama_folder), data=str(data), settings=settings, root=folder / "runs", say=said.append
    )
    return run, "\n".join(said)


@pytest.mark.parametrize("form", FORMS)
def test_a_thousand_tickets_in_each_form_are_a_thousand_rows(tmp_path, llama_folder, form):
    write, metric = FORMS[form]
    run, said = new(tmp_path, write(tmp_path), llama_folder)
    config = run.config()
    assert (config.data.format, config.evaluation.metric, config.data.template) == (form, metric, "plain")
    assert config.data.train_rows is None
    assert config.train.epochs == 3.0  # 940 of them are for training
    reasons = {each.setting: each.reason for each in read_plan(run).decisions}
    for setting, reason in reasons.items():
        assert setting in said and reason in said and reason != BY_HAND
    assert "940 rows to train" in said and said.splitlines()[-1].startswith("Training: 940 rows, ")
    if form not in ("messages", "columns"):
        return
    tokenizer = beginning.tokenizer_of(find_checkpoint(config.model))
    data = workflow.prepare_data(run, tokenizer, shape=json.loads((llama_folder / "config.json").read_text()))
    assert (data.report.rows, data.eval_report.rows, len(data.test)) == (940, 30, 30)
    assert not data.report.skipped and data.report.passed
    assert len(data.report.trimmed) <= 0.01 * 940


def test_lengths_are_those_of_the_tokens(tmp_path, llama_folder):
    """Counted here by writing each training row out and tokenising it."""
    found = beginning.decide_settings(
        model=str(llama_folder), data=str(as_messages(tmp_path)), settings=["data.packing=false"]
    )
    corpus = beginning.read_corpus(found.config.data)
    tokenizer = beginning.tokenizer_of(find_checkpoint(found.config.model))
    template = make_template("plain", tokenizer)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    answers = sorted(count(row.answer + tokenizer.eos_token) for row in corpus.train)
    prompts = sorted(count(template.prompt(row).text) for row in corpus.train)
    answer = -(-(covering(answers, 0.99) * 1.25) // 8) * 8
    totals = sorted(count(template.render(row).text) for row in corpus.train)
    need = max(covering(totals, 0.99), covering(prompts, 0.99) + int(answer))
    assert found.config.evaluation.max_new_tokens == answer
    assert found.config.data.seq_len_tokens == -(-need // 64) * 64


def test_the_steps_that_are_said_are_those_that_are_trained(tmp_path, llama_folder):
    data = json_lines(
        tmp_path / "few.jsonl", [{"question": text, "answer": label} for text, _, label in tickets()[:40]]
    )
    run, said = new(tmp_path, data, llama_folder, "train.epochs=1", "data.loss_on=all")
    assert (run.config().data.eval_rows, run.config().data.test_rows) == (4, 4)
    lines: list[str] = []
    result = workflow.train(run, show_progress=False, say=lines.append)
    (line,) = [line for line in lines if "Training: " in line]
    assert f" {result.steps:,} steps: " in line and line.startswith("Training: 32 rows, ")
    again: list[str] = []
    run.change_config(run.config().with_settings({"train.epochs": 2.0}))
    longer = workflow.train(run, show_progress=False, say=again.append)
    assert any(f"{longer.steps:,} steps ({result.steps:,} done)" in line for line in again)
    page = report.write_report(run).read_text()
    assert "32 training rows: the fewer there are" not in page, "a value that was set by hand has no such reason"
    assert "for a model of" in page and "smaller ones take more" in page


def test_what_was_changed_since_has_no_reason_in_the_report(tmp_path, llama_folder):
    run, _ = new(tmp_path, as_labels(tmp_path), llama_folder)
    assert "smaller ones take more" in report.write_report(run).read_text()
    run.change_config(run.config().with_settings({"train.learning_rate": 0.001}))
    assert "smaller ones take more" not in report.write_report(run).read_text()


@pytest.mark.parametrize(
    "settings", [["train.epochs=7", "evaluation.metric=exact"], {"train.epochs": 7, "data.template": "plain"}]
)
def test_what_is_set_by_hand_stays_and_is_called_so(tmp_path, llama_folder, settings):
    run = ql.new_run(
        "mine",
        model=str(llama_folder),
        data=str(as_labels(tmp_path)),
        settings=settings,
        root=tmp_path,
        say=lambda text: None,
    )
    names = [str(each).partition("=")[0] for each in settings]
    by_hand = {each.setting for each in read_plan(run).decisions if each.reason == BY_HAND}
    assert by_hand == set(names) and run.config().train.epochs == 7


@pytest.fixture
def machine(monkeypatch):
    """Makes this a machine with some free cards, for a start."""

    def of(gpus: str) -> Hardware:
        hardware = parse_gpus(gpus)
        cards = tuple(f"GPU-{index}" for index in range(hardware.gpus))
        monkeypatch.setattr(locks, "visible_gpus", lambda: cards)
        monkeypatch.setattr(locks, "unlocked_gpus", lambda all_cards: tuple(all_cards))
        monkeypatch.setattr(choosing, "this_machine", lambda price=None: hardware)
        monkeypatch.setattr(telemetry, "used_shares", lambda: dict.fromkeys(cards, 0.02))
        return hardware

    return of


# model, GPUs, settings by hand -> the way of a start, how many GPUs it takes, micro-batch and passes of each process
STARTS = [
    ("falcon-40b", "ml.g5.12xlarge", [], ("shards", 4, 2, 1)),
    ("falcon-40b", "8xL4", [], ("shards", 8, 1, 1)),
    ("falcon-40b", "2xT4", [], ("spread", 2, 1, 8)),
    ("llama-3-8b", "2xL4", [], ("copies", 2, 4, 1)),
    ("llama-3-8b", "4xL4", ["train.share=one"], ("one", 1, 8, 1)),
    ("llama-3-8b", "4xL4", ["train.micro_batch_size=6", "train.gradient_accumulation_steps=2"], ("copies", 4, 3, 1)),
    ("llama-3-8b", "8xL4", ["train.max_steps=3", "train.usd_per_hour=9"], ("copies", 8, 1, 1)),
]


@pytest.mark.parametrize(("model", "gpus", "by_hand", "expected"), STARTS)
def test_what_is_said_of_several_gpus_is_what_a_start_takes(tmp_path, machine, model, gpus, by_hand, expected):
    """The way, its settings and its price; nothing is decided that the start decides itself."""
    hardware, data = machine(gpus), as_questions(tmp_path)
    found = beginning.decide_settings(
        model=f"random:{model}", data=str(data), settings=by_hand, hardware=hardware, say=lambda text: None
    )
    chosen = choosing.choose(found.config)
    each = found.config.with_settings(chosen.settings).train
    share, count, micro, passes = expected
    assert (chosen.share, len(chosen.gpus)) == (share, count)
    assert (each.micro_batch_size, each.gradient_accumulation_steps) == (micro, passes)
    many = "es" * (passes != 1)
    assert (
        f"takes {share} on {count} of {hardware.gpus} GPUs, micro-batch {micro} and {passes} pass{many} a step"
        in found.start
    )
    assert found.start in repr(found)
    # 561 sequences in three epochs are 72 steps of 8, or 48 of 12
    assert found.cost.steps == (3 if "train.max_steps=3" in by_hand else 48 if count * micro == 12 else 72)
    layout = Layout(**{"spread" if share == "spread" else share: count}) if share != "one" else Layout()
    tokens = round(found.cost.tokens)
    workload = Workload(
        found.config.with_settings(chosen.settings), known_shape(f"random:{model}"), hardware, tokens, 0.25
    )
    step = settings_as_given(workload, found.cost.steps, layout)
    assert found.cost.seconds == pytest.approx(step.seconds, rel=0.1)
    assert found.cost.peak_gib == pytest.approx(step.peak_gib, rel=0.1) and not found.cost.is_too_large
    price = hardware.price_usd_per_hour
    assert found.cost.dollars == (None if price is None else pytest.approx(price * found.cost.seconds / 3600))
    decided = {each.setting for each in found.decisions}
    assert ("train.checkpointed_layers" in decided) == ("train.share=one" in by_hand)
    if share != "one":
        train = found.config.train
        left = train.activation_checkpointing, train.checkpointed_layers, train.compile, train.offload_embeddings
        assert left == (True, None, "auto", False)


@pytest.mark.parametrize(
    ("model", "share", "why"),
    [("llama-3-8b", "copies of shards", "can't share the work so"), ("falcon-40b", "copies", "nothing fits so")],
)
def test_a_way_that_a_start_refuses_is_said_so(tmp_path, machine, model, share, why):
    hardware, settings = machine("2xA10G"), {"train.share": share}
    found = beginning.decide_settings(
        model=f"random:{model}", data=str(as_questions(tmp_path)), settings=settings, hardware=hardware
    )
    assert f"train.share={share} is refused at the start" in found.start and why in found.start
    with pytest.raises(UserError):
        choosing.choose(found.config)


def test_one_gpu_has_all_settings_of_its_plan(tmp_path):
    found = beginning.decide_settings(
        model="random:llama-3-8b", data=str(as_questions(tmp_path)), hardware=parse_gpus("L4"), say=lambda text: None
    )
    assert found.start == "" and found.config.train.checkpointed_layers == 0 and found.config.train.compile == "on"


def test_the_same_again_opens_the_run_and_another_is_refused(tmp_path, llama_folder):
    data = as_labels(tmp_path)
    run, _ = new(tmp_path, data, llama_folder)
    before = {path: path.read_bytes() for path in run.folder.iterdir()}
    assert new(tmp_path, data, llama_folder)[0].config() == run.config()
    with pytest.raises(RunError, match="there is a run 'mine' already.*train.epochs=3.0, not 9.0"):
        new(tmp_path, data, llama_folder, "train.epochs=9")
    assert {path: path.read_bytes() for path in run.folder.iterdir()} == before


def test_a_profile_decides_itself(tmp_path, llama_folder):
    assert ql.new_run("a", profile="tiny", root=tmp_path).config().profile == "tiny"
    with pytest.raises(UserError, match="a profile has settings of its own"):
        ql.new_run("b", profile="tiny", data=str(as_labels(tmp_path)), root=tmp_path)
    assert not (tmp_path / "b").exists()


# bad input


BAD: dict[str, tuple[dict, str, type[UserError]]] = {
    "no file": ({"data": "gone.jsonl"}, "gone.jsonl", UserError),
    "an empty file": ({"data": "empty.jsonl"}, "empty", DataError),
    "two ways": ({"data": "two.jsonl"}, "Choose one: `--set data.format=text`", DataError),
    "no model": ({"model": "./nothing"}, "no model folder", ModelError),
    "a folder without a model": ({"model": "empty"}, "holds no model", ModelError),
    "an unknown setting": ({"settings": ["train.epoch=1"]}, "did you mean train.epochs", ConfigError),
    "a template that is not there": ({"settings": ["data.template=chat"]}, "chat template", ModelError),
    "no room for an answer": (
        {"settings": ["data.seq_len_tokens=64", "evaluation.max_new_tokens=64"]},
        "expected less than data.seq_len_tokens",
        ConfigError,
    ),
    "no row that can be trained": ({"data": "hollow.jsonl"}, "too few usable rows", DataError),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_leaves_no_folder(tmp_path, llama_folder, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_bytes(b"")
    Path("empty").mkdir()
    json_lines(Path("two.jsonl"), [{"text": f"t{n}", "kind": "a"} for n in range(9)])
    json_lines(Path("hollow.jsonl"), [{"question": "", "answer": ""} for n in range(9)])
    changes, message, kind = BAD[case]
    asked = {"model": str(llama_folder), "data": str(as_labels(tmp_path)), "settings": []} | changes
    with pytest.raises(kind, match=message.replace(".", r"\.")):
        ql.new_run("mine", **asked, say=lambda text: None)
    assert not Path("runs").exists()
    settings = [part for each in asked["settings"] for part in ("--set", each)]
    assert main(["new", "mine", "--model", asked["model"], "--data", asked["data"], *settings]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert not Path("runs").exists()


def test_a_plan_that_can_t_be_written_leaves_no_run(tmp_path, llama_folder, monkeypatch):
    def full(run, **values):
        raise RunError("the disk is full")

    monkeypatch.setattr(beginning, "add_to_plan", full)
    with pytest.raises(RunError, match="the disk is full"):
        new(tmp_path, as_labels(tmp_path), llama_folder)
    assert not (tmp_path / "runs/mine").exists()
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/notes.txt").write_text("mine")
    with pytest.raises(RunError):
        new(tmp_path, as_labels(tmp_path), llama_folder)
    assert [path.name for path in (tmp_path / "runs/mine").iterdir()] == ["notes.txt"]


# models


def test_the_command_line_says_what_comes_next(tmp_path, llama_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    as_labels(tmp_path)
    assert main(["new", "mine", "--model", str(llama_folder), "--data", "labels.csv"]) == 0
    said = capsys.readouterr().out
    assert "train mine" in said.splitlines()[-1]
    assert "data.format" in said and "columns" in said


def test_of_a_hub_model_only_the_tokenizer_is_fetched(tmp_path, llama_folder, from_hub):
    files = {path.name: path.read_bytes() for path in llama_folder.iterdir()}
    with hub({"some/model": files}) as endpoint:
        from_hub(endpoint)
        found = beginning.decide_settings(model="some/model", data=str(as_labels(tmp_path)))
        (folder,) = (tmp_path / "hub").glob("models--some--model/snapshots/*")
        assert folder.name == COMMIT
        assert {"config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
        assert not list(folder.glob("*.safetensors"))
        local = beginning.decide_settings(model=str(llama_folder), data=str(as_labels(tmp_path)))
        assert found.decisions == local.decisions
        whole = find_checkpoint(ModelConfig(name="some/model"), say=lambda text: None)
        assert (whole.folder / "model.safetensors").is_file(), "the weights follow when it trains"


def test_a_hub_model_without_safetensors_is_refused_before_a_run_is_made(tmp_path, from_hub):
    with hub({"some/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"}}) as endpoint:
        from_hub(endpoint)
        with pytest.raises(ModelError, match="no weights as safetensors"):
            ql.new_run("mine", model="some/pickled", data=str(as_labels(tmp_path)), root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# the demo


def test_the_demo_on_a_file_decides_its_settings_and_keeps_its_run(tmp_path, llama_folder, monkeypatch):
    """Its own model would take minutes: the way from a label file to a report is the same with a tiny one."""
    monkeypatch.setattr(beginning, "MODEL", str(llama_folder))
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("ticket", "label"), *((text, label) for text, _, label in tickets()[:40])])
    said: list[str] = []
    page = demo.demo(data=str(tmp_path / "labels.csv"), root=tmp_path / "runs", say=said.append)
    assert page.is_file() and any(line.startswith("Training: 32 rows") for line in said)
    run = workflow.existing_run("demo-labels", root=tmp_path / "runs")
    assert run.config().evaluation.metric == "labels" and run.status().state == "finished"
    again: list[str] = []
    demo.demo(data=str(tmp_path / "labels.csv"), root=tmp_path / "runs", say=again.append)
    assert "finished already" in again[0]
