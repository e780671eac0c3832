"""The scripts that measure on a real GPU run small on a CPU, and write what they promise."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from qlora_helpers.base.config import DataConfig
from qlora_helpers.data.prompts import prompt_tokens
from qlora_helpers.data.sources import read_corpus
from qlora_helpers.data.templates import make_template
from qlora_helpers.model.checkpoints import corpus_tokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.usefixtures("cache", "torch")


def script(name, monkeypatch):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def run(name, monkeypatch, *arguments):
    """Runs a script's `main` in this process."""
    module = script(name, monkeypatch)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    module.main()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A training file, and a held-out file with two rows of it, one in capitals."""
    rows = read_corpus(DataConfig(train_rows=40)).train
    folder = tmp_path_factory.mktemp("files")
    parts = {"train": [(row.prompt, row.answer) for row in rows[:16]]}
    parts["dev"] = [(row.prompt, row.answer) for row in (*rows[16:28], rows[0])]
    parts["dev"].append((rows[1].prompt.upper(), rows[1].answer))
    for name, texts in parts.items():
        lines = [json.dumps({"dialogue": dialogue, "summary": summary}) for dialogue, summary in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def learned(files, tmp_path_factory):
    """What `learning` writes of two seeds, the second at once: two trainings here, and two in processes of their own."""
    out = tmp_path_factory.mktemp("learned") / "learning.json"
    with pytest.MonkeyPatch.context() as patch:
        run(
            "learning",
            patch,
            out,
            "--data",
            files / "train.jsonl",
            "--dev",
            files / "dev.jsonl",
            "--plain-rows",
            1,
            "--seeds",
            0,
            1,
            "--together",
            "--set",
            "model.name=random:falcon-tiny",
            "data.seq_len_tokens=256",
            "evaluation.max_new_tokens=4",
        )
    return out


def test_learning_compares_recipe_and_ours_on_rows_of_neither(files, learned):
    found = json.loads(learned.read_text())
    assert [(case["variant"], "error" in case) for case in found["cases"][:2]] == [("ours", False), ("recipe", False)]
    assert found["dev_rows_also_in_training"] == 2
    assert found["rows"] == {"tuning": 6, "report": 6}
    assert found["train_rows"] == 16
    ours, recipe = found["cases"][:2]
    assert recipe["trained_share"] > 0.9 > 0.5 > ours["trained_share"]
    assert recipe["plain_rows_timed"] == 1
    measures = {item["measure"] for item in found["ours_against_recipe"]["differences"]}
    assert {"rouge_l", "loss", "stop_rate"} <= measures
    assert "too few" in found["ours_against_recipe"]["verdict"]
    texts = (files / "dev.jsonl").read_text()
    assert json.loads(texts.splitlines()[0])["summary"] not in learned.read_text()


def test_learning_trains_all_seeds_but_the_first_at_once_and_joins_their_rows(learned):
    found = json.loads(learned.read_text())
    cases = [(case["variant"], case["seed"], case.get("others_on_the_gpu"), "error" in case) for case in found["cases"]]
    assert [*cases[:2], *sorted(cases[2:])] == [
        ("ours", 0, None, False),
        ("recipe", 0, None, False),
        ("ours", 1, 1, False),
        ("recipe", 1, 1, False),
    ]  # the last two in the order in which they end
    losses = {
        name: [case["scores"]["tuned"]["loss"] for case in found["cases"] if case["variant"] == name]
        for name in ("recipe", "ours")
    }
    assert losses["ours"][0] != losses["ours"][1]
    (loss,) = [item for item in found["ours_against_recipe"]["differences"] if item["measure"] == "loss"]
    for place, name in (("first", "recipe"), ("second", "ours")):  # a mean over rows of the seeds' means
        assert min(losses[name]) <= loss[place] <= max(losses[name])


@pytest.mark.only_slow
def test_learning_can_leave_no_seed_alone(files, tmp_path, monkeypatch):
    out = tmp_path / "learning.json"
    run(
        "learning",
        monkeypatch,
        out,
        "--data",
        files / "train.jsonl",
        "--dev",
        files / "dev.jsonl",
        "--plain-rows",
        0,
        "--together",
        "all",
        "--set",
        "model.name=random:falcon-tiny",
        "data.seq_len_tokens=256",
        "evaluation.max_new_tokens=4",
    )
    cases = {case["variant"]: case for case in json.loads(out.read_text())["cases"]}
    assert {name: case["others_on_the_gpu"] for name, case in cases.items()} == {"ours": 1, "recipe": 1}
    assert "base" in cases["ours"]["scores"]
    assert "base" not in cases["recipe"]["scores"]


def test_evaluation_speed_answers_the_same_rows_each_way(tmp_path, monkeypatch):
    out = tmp_path / "speed.json"
    options = ["--rows", 10, "--new-tokens", 4, "--seq-len", 512, "--plain-batches", 1, "--rounds", 1]
    run("evaluation_speed", monkeypatch, out, "falcon-tiny:4", "no-such-model:4", *options)
    good, bad = json.loads(out.read_text())["cases"]
    assert good["answers_equal_to_plain"] == [4, 4]
    assert good["margins_at_first_difference"] is None
    assert {name: one["rows"] for name, one in good["variants"].items()} == {
        "plain, batch 8": 8,
        "plain, batch 4": 4,
        "ours": 10,
    }
    assert "float32 copies" in good["form"][0]
    assert "error" in bad
    rows = read_corpus(DataConfig(train_rows=10, eval_rows=1, test_rows=1)).train
    template = make_template("recipe", corpus_tokenizer())
    lengths = sorted((len(prompt_tokens(row, template)) for row in rows), reverse=True)
    for name, taken in (("plain, batch 8", lengths[1:9]), ("plain, batch 4", lengths[3:7])):
        assert good["variants"][name]["mean_prompt_tokens"] == round(sum(taken) / len(taken), 1)
        assert good["variants"][name]["padded_share"] == round(1 - sum(taken) / (len(taken) * max(taken)), 4)
    assert 0 < good["variants"]["ours"]["padded_share"] < 0.5


def test_evaluation_speed_takes_batches_of_like_length_for_the_plain_side(monkeypatch):
    speed = script("evaluation_speed", monkeypatch)
    assert speed.plain_rows(51, 5, 1) == [23, 24, 25, 26, 27]  # 25 is the median
    assert speed.plain_rows(51, 4, 3) == [6, 7, 8, 9, 23, 24, 25, 26, 40, 41, 42, 43]
    assert speed.plain_rows(51, 17, 3) == speed.plain_rows(51, 64, 2) == list(range(51))
    for size in range(1, 20):
        for batches in range(1, 6):
            rows = speed.plain_rows(51, size, batches)
            assert rows == sorted(set(rows)) and len(rows) == min(size * batches, 51)
            assert rows[0] >= 0 and rows[-1] < 51


def test_evaluation_speed_says_how_near_the_choice_was_where_answers_part(tmp_path, monkeypatch):
    from qlora_helpers.evaluation import generate

    answered, word = generate.answer_fast, corpus_tokenizer()(" cake")["input_ids"][0]

    def otherwise(*args, **kwargs):
        return [[line[0], word, *line[2:]] for line in answered(*args, **kwargs)]

    monkeypatch.setattr(generate, "answer_fast", otherwise)
    out = tmp_path / "speed.json"
    options = ["--rows", 10, "--new-tokens", 4, "--seq-len", 512, "--plain-batches", 1, "--rounds", 1]
    run("evaluation_speed", monkeypatch, out, "falcon-tiny:4", *options)
    (case,) = json.loads(out.read_text())["cases"]
    assert case["answers_equal_to_plain"] == [0, 4]
    margins = case["margins_at_first_difference"]
    assert 0 < margins["median"] < margins["largest"] < 100


def test_the_margin_is_that_after_what_two_answers_share(monkeypatch, llama, torch):
    speed = script("evaluation_speed", monkeypatch)
    with torch.no_grad():
        first, second = llama(torch.tensor([[5, 6, 7, 8]])).logits[0, -1].topk(2).values.tolist()
    assert speed.margin(llama, [5, 6], [7, 8, 9, 3], [7, 8, 10]) == pytest.approx(first - second, rel=1e-3)


def test_export_memory_merges_and_checks(tmp_path, monkeypatch):
    out = tmp_path / "memory.json"
    run("export_memory", monkeypatch, out, "falcon-tiny", "--folder", tmp_path)
    found = json.loads(out.read_text())
    (case,) = found["cases"]
    assert case["merged"] > 0
    assert (
        case["largest_error_in_last_places"] <= 0.75
    )  # rounded once; half a place, and the rounding of the sums in 32 bits
    assert case["merging_gib"] < case["bound_gib"]
    assert 0.5 < found["arithmetic"]["falcon-40b"]["bound_gib"] < 0.6
    assert list(tmp_path.iterdir()) == [out]


def test_quality_compares_both_paths_seed_by_seed(files, tmp_path, monkeypatch):
    """In this process: the script gives each training one of its own."""
    out = tmp_path / "one.json"
    for path in ("plain", "fast"):
        run(
            "quality",
            monkeypatch,
            out.with_name(f"{path}.json"),
            "--model",
            "random:falcon-tiny",
            "--data",
            files / "train.jsonl",
            "--steps",
            2,
            "--blocks",
            1,
            "--eval-rows",
            2,
            "--one",
            path,
            0,
        )
    plain, fast = (json.loads((tmp_path / f"{path}.json").read_text()) for path in ("plain", "fast"))
    assert plain["steps"] == fast["steps"] == 2
    summary = sys.modules["benchmark_quality"].summary([plain, fast, {"exit_code": 1}])
    assert summary == {"0": pytest.approx(0, abs=1e-4)}
    assert sys.modules["benchmark_quality"].summary([plain, fast | {"eval_loss": 2 * plain["eval_loss"]}])["0"] == 1


def test_steps_of_several_sizes_are_measured_one_setting_at_a_time(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("step_speed.WARM", 1)
    monkeypatch.setattr("step_speed.TIMED", 1)
    out = tmp_path / "growth.json"
    run(
        "growth",
        monkeypatch,
        out,
        "--models",
        "falcon-tiny",
        "--seq-len",
        128,
        256,
        "--blocks",
        1,
        "--rows",
        20,
        40,
    )
    points = json.loads(out.read_text())["points"]
    assert [(point["seq_len_tokens"], point["rows"]) for point in points] == [(128, 20), (256, 20), (128, 40)]
    assert all(point["step_s"] > 0 and point["tokens_per_s"] > 0 for point in points)


def test_data_speed_prepares_a_file_of_each_size(tmp_path, monkeypatch):
    out = tmp_path / "data.json"
    options = ["--rows", 210, 230, "--characters", 300, "--model", "random:falcon-tiny", "--template", "plain"]
    run("data_speed", monkeypatch, *options, "--seq-len", 512, "--out", out)
    found = json.loads(out.read_text())["points"]
    assert [point["rows"] + 60 for point in found] == [210, 230]  # 30 evaluate, 30 are held out
    assert all(point["whole_s"] >= point["reading_s"] and point["template"] == "plain" for point in found)
    assert found[0]["tokens"] < found[1]["tokens"]


def test_tickets_are_measured_over_seeds(tmp_path, monkeypatch):
    out = tmp_path / "tickets.json"
    limits = ["data.train_rows=12", "data.eval_rows=4", "data.test_rows=4", "train.max_steps=2"]
    small = ["model.device_map=cpu", "evaluation.max_new_tokens=8", "train.eval_steps=2", "train.save_steps=2"]
    run("tickets", monkeypatch, out, "--model", "random:falcon-tiny", "--seeds", 0, 1, "--set", *limits, *small)
    found = json.loads(out.read_text(encoding="utf-8"))
    first, second = found["cases"]
    assert found["machine"] and found["versions"]["torch"] and set(found["over_seeds"]) == {"base", "base_few"}
    assert first["eval_loss"] != second["eval_loss"], "each seed draws other adapters"
    for one, other in zip(first["rows"], second["rows"], strict=True):
        rivals = [{name: row["answers"][name] for name in ("base", "base_few")} for row in (one, other)]
        assert rivals[0] == rivals[1] and one["answers"]["tuned"]["fields_wanted"] == 5
        assert not [value for answer in one["answers"].values() for value in answer.values() if isinstance(value, str)]
    assert first["reached"] == {"valid": False, "over_untuned": False, "over_few_shot": False}


def test_tickets_are_trained_as_in_the_notebook(monkeypatch):
    notebook = json.loads((BENCHMARKS.parent / "notebooks" / "10_your_own_task.ipynb").read_text(encoding="utf-8"))
    (cell,) = [text for text in ("".join(cell["source"]) for cell in notebook["cells"]) if "SETTINGS = {" in text]
    names: dict[str, object] = {"PROFILE": "demo"}
    exec(cell.partition("run = ")[0], names)
    assert names["SETTINGS"] == script("tickets", monkeypatch).SETTINGS
