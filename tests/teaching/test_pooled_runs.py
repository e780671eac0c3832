"""Shared runs: the numbers are the run's own, predictions came before, and a picture claims no more than its runs show."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.runs.folder import Run
from qlora_helpers.teaching import attempts, collecting, measured, receiving, sending
from qlora_helpers.teaching.board import make_board
from qlora_helpers.teaching.measured import Measured, recipe_of
from qlora_helpers.teaching.pooled_plot import pooled
from tests.teaching.test_drawings import extent, texts

CONFIG = profile_config("tiny")


def trained(folder, *losses, settings=(), state="finished"):
    """A run folder with these evaluation losses, the first of which was measured in the year 2100."""
    run = Run(folder)
    run.folder.mkdir(parents=True)
    run.save_config(CONFIG.with_settings(list(settings)))
    records = [
        {"time": 4.1e9 + step, "session": 1, "step": step, "eval_loss": loss} for step, loss in enumerate(losses, 1)
    ]
    run.progress_path.write_text("".join(json.dumps(record) + "\n" for record in records))
    run.set_status(state=state)
    return run


def one(seat, rank=8, loss=2.0, *, seed=0, rate=1e-3, predicted=None, recipe="abc"):
    return Measured(str(seat), recipe, rank, rate, seed, loss, predicted, 1.0)


def test_a_run_is_shared_in_its_own_numbers(tmp_path, learner, monkeypatch):
    monkeypatch.setenv("QLORA_SEAT", "7")
    run = trained(tmp_path / "mine", 3.0, 2.25, 2.5, settings=["adapter.r=16", "train.seed=7"])
    assert measured.predict(trained(tmp_path / "new", state="new"), 2.0).startswith("Committed: 2 for new")
    found = measured.share(run)
    assert (found.seat, found.rank, found.seed, found.loss, found.predicted) == ("7", 16, 7, 2.25, None)
    (line,) = (learner / "attempts.jsonl").read_text().splitlines()
    assert "mine" not in line and str(tmp_path) not in line
    assert collecting.read_content(line.encode()).runs == [found]


def test_a_prediction_counts_only_where_nothing_was_measured_yet(tmp_path, learner):
    run = trained(tmp_path / "mine", state="running")
    measured.predict(run, 2.0)
    measured.predict(run, 2.5)
    late = {"run": json.loads((learner / "predictions.jsonl").read_text().splitlines()[0])["run"]}
    with open(learner / "predictions.jsonl", "a") as file:
        file.write(json.dumps(late | {"loss": 2.25, "time": 4.2e9}) + "\nno line\n")
    run.progress_path.write_text(json.dumps({"time": 4.1e9, "step": 1, "eval_loss": 2.25}) + "\n")
    run.set_status(state="finished")
    assert measured.measure(run).predicted == 2.5, "the last one that was committed before the measurement"
    with pytest.raises(UserError, match="this would be no prediction"):
        measured.predict(run, 2.25)
    assert "new, which does not exist yet" in measured.predict(Run(tmp_path / "new"), 2.0)
    with pytest.raises(UserError, match="can't be a loss"):
        measured.predict(run, float("nan"))


def test_what_has_not_finished_is_not_shared(tmp_path):
    with pytest.raises(RunError, match="a training that finished; got running|got dead"):
        measured.share(trained(tmp_path / "one", 2.0, state="running"))
    with pytest.raises(RunError, match="has no evaluation loss"):
        measured.share(trained(tmp_path / "two"))


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_LEARNER", str(tmp_path / "file"))
    monkeypatch.setenv("QLORA_SEAT", "1")
    with pytest.raises(RunError, match="can't be kept in the learner's folder"):
        measured.share(trained(tmp_path / "one", 2.0))


@pytest.mark.parametrize(
    ("setting", "same"),
    [
        ("adapter.r=64", True),
        ("train.learning_rate=0.01", True),
        ("train.seed=5", True),
        ("train.logging_steps=3", True),
        ("adapter.lora_alpha=8", False),
        ("train.max_steps=5", False),
        ("train.eval_steps=1", False),
        ("data.embedded_train_rows=8", False),
        ("model.name=random:falcon-7b", False),
        ("train.gradient_accumulation_steps=2", False),
    ],
)
def test_runs_of_one_recipe_differ_in_rank_rate_and_seed_alone(setting, same):
    assert (recipe_of(CONFIG.with_settings([setting])) == recipe_of(CONFIG)) == same


def test_the_same_rows_in_another_file_are_the_same_recipe(tmp_path):
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / f"{name}.jsonl").write_text(text)
    first, same, other = (
        recipe_of(CONFIG.with_settings({"data.source": str(tmp_path / f"{name}.jsonl")})) for name in "abc"
    )
    assert first == same != other


def test_numbers_that_cannot_be_are_left_out():
    good = {"kind": "measured"} | one(7).__dict__
    bad = [{"loss": -1}, {"loss": float("nan")}, {"rank": 0}, {"rank": 10**6}, {"learning_rate": 2}, {"seed": -1}]
    bad += [{"recipe": "../x"}, {"predicted": 1e9}, {"kind": "other"}, {"time": float("inf")}, {"loss": "x"}]
    lines = [json.dumps(good | each) for each in bad] + ["[" * 5000, "{}", json.dumps(good)]
    assert measured.read_measured("\n".join(lines).encode()) == [one(7)]
    assert len(measured.read_measured("\n".join([json.dumps(good)] * 100).encode())) == measured.MOST_OF_A_SEAT


def test_a_run_of_a_seat_counts_once():
    runs = [one(1, 1, 2.5), one(1, 1, 2.4), one(2, 8, 2.0)]
    (picture,) = pooled(runs)
    assert "2 runs that share" in picture.description and "Rank 1: 1 run with 1 seed, 2.40." in picture.description


def test_one_recipe_is_drawn_and_the_others_are_counted():
    runs = [one(1, 1), one(2, 8), one(3, 8, recipe="other"), one(4, 8, rate=1e-2)]
    ranks, rates = pooled(runs)
    assert ranks.title == "Rank and evaluation loss" and rates.title == "Learning rate and evaluation loss"
    assert "2 runs that share all settings but rank and seed" in ranks.description
    assert "2 runs that differ in more than the rank are left out." in ranks.description
    assert "Learning rate 0.01: 1 run" in rates.description


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({1: [2.5, 2.6], 8: [2.3, 2.4]}, "No ranges overlap: with these seeds, rank 8 has the lowest loss."),
        ({1: [2.5, 2.6], 8: [2.3, 2.55]}, "The ranges of 8 and 1 overlap: these runs don't tell them apart."),
        ({1: [2.5, 2.6], 8: [2.3]}, "Rank 8 has one seed: nobody knows yet by how much its loss varies."),
    ],
)
def test_a_picture_says_whether_its_runs_tell_the_ranks_apart(losses, said):
    runs = [one(seed, rank, loss, seed=seed) for rank, several in losses.items() for seed, loss in enumerate(several)]
    (picture,) = pooled(runs)
    assert said in picture.description and said in [text.text for text in texts(picture)]


def test_the_same_seed_twice_is_no_spread():
    runs = [one(seat, rank, 2.0 + rank / 100, seed=3) for rank in (1, 8) for seat in "ab"]
    assert "Rank 1 has one seed" in pooled(runs)[0].description


def test_predictions_are_drawn_beside_what_was_measured():
    assert pooled([one(1)]) == ()
    (picture,) = pooled([one(1, predicted=2.1), one(2, predicted=4.0), one(3, predicted=1.0)])
    assert "1 of 3 predictions is within a tenth" in picture.description
    assert "1 of them is lower than what was measured, and 2 not." in picture.description


def test_a_run_that_exploded_leaves_the_others_readable():
    runs = [one(seat, rank, 2 + rank / 100, seed=seat) for seat, rank in enumerate((1, 8, 64))]
    drawn = pooled([*runs, one(9, 16, 900.0, seed=9)])[0]
    heights = sorted(float(dot.get("cy")) for dot in ElementTree.fromstring(drawn.svg()).iter() if dot.get("r") == "5")
    assert heights[-1] - heights[1] > 100, "the other runs are spread over the picture"
    assert any((text.text or "").startswith("above ") for text in texts(drawn))


MANY = [one(seat, (1, 8, 64)[seat % 3], 2 + seat / 50, seed=seat, predicted=1.5 + seat / 9) for seat in range(24)]
RATES = [one(number, 8, 2 + number, rate=10.0 ** -(number / 2), seed=1) for number in range(16)]


@pytest.mark.parametrize("picture", pooled([*MANY, *RATES, one(0, 1024, 900.0), one(1, 512, 0.0, rate=1.0)]), ids=str)
def test_texts_lie_inside_and_over_no_other_text(picture):
    root = ElementTree.fromstring(picture.svg())
    assert root.get("role") == "img" and picture.description.endswith(".") and len(picture.description) > 80
    boxes = [(element.text, extent(element)) for element in texts(picture)]
    for text, (left, top, right, bottom) in boxes:
        assert left >= 0 and right <= picture.width and top >= 0 and bottom <= picture.height, text
    for number, (text, (left, top, right, bottom)) in enumerate(boxes):
        for other, (x, y, to_x, to_y) in boxes[number + 1 :]:
            assert right <= x or to_x <= left or bottom <= y or to_y <= top, (text, other)


def test_pictures_hold_no_seat():
    runs = [replace(each, seat=f"seat-{each.seat}") for each in MANY]
    page = make_board([], runs).page()
    assert page.count("<figure>") == 2 and "seat-" not in page
    assert "Rank and evaluation loss" in repr(make_board([], runs))


def test_a_run_arrives_over_the_network_as_its_sender_s(tmp_path, monkeypatch):
    receiver = receiving.Receiver(("127.0.0.1", 0), tmp_path / "class", "class7")
    threading.Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("QLORA_BOARD", f"http://class7@127.0.0.1:{receiver.server_port}")
    monkeypatch.setenv("QLORA_SEAT", "7")
    monkeypatch.setattr(measured, "send_soon", lambda: None)
    shared = measured.share(trained(tmp_path / "mine", 2.0))
    attempts.append({"kind": "measured"} | replace(shared, seat="somebody else", rank=64).__dict__)
    sending.send()
    found = collecting.collect(receiver.folder).runs
    receiver.shutdown()
    receiver.server_close()
    assert [(run.seat, run.rank) for run in found] == [("7", 8), ("7", 64)]


def test_a_class_shares_runs_over_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_BOARD", str(tmp_path / "common"))
    monkeypatch.setenv("QLORA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(measured, "send_soon", lambda: None)  # the command itself waits until they are there
    for seat, rank in enumerate((1, 8)):
        monkeypatch.setenv("QLORA_SEAT", str(seat))
        monkeypatch.setenv("QLORA_LEARNER", str(tmp_path / f"learner-{seat}"))
        run = trained(tmp_path / "runs" / f"rank-{rank}", state="new", settings=[f"adapter.r={rank}"])
        assert main(["board", "--predict", run.name, "2.4"]) == 0
        run.progress_path.write_text(json.dumps({"time": 4.1e9, "step": 1, "eval_loss": 2.5 - rank / 100}) + "\n")
        run.set_status(state="finished")
        assert main(["board", "--share", run.name]) == 0
    out = capsys.readouterr().out
    assert "Rank 8, learning rate 0.001, seed 42: loss 2.4200" in out and "Predicted: 2.4" in out and "Sent: " in out
    assert sorted(run.rank for run in collecting.collect(tmp_path / "common").runs) == [1, 8]
    assert main(["board", str(tmp_path / "common"), "--page", str(tmp_path / "board.html")]) == 0
    assert "Predicted and measured loss" in (tmp_path / "board.html").read_text(encoding="utf-8")
