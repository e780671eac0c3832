"""lm-eval's tasks: what is asked of it, what is read of its results, and (in `make slow`, where it is installed) a real one.

`suite_results.json` holds what lm-eval 0.4.13 returned for a tiny run's base and tuned model on 24 held-out dialogues, without its
texts.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
from fake_run import fake_run, finished_run

from qlora_helpers import workflow
from qlora_helpers.__main__ import main
from qlora_helpers.base.errors import DataError, ModelError, RunError, UserError
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.data.examples import one_turn
from qlora_helpers.data.prompts import prompt_tokens
from qlora_helpers.data.templates import make_template
from qlora_helpers.evaluation import suite
from qlora_helpers.evaluation.suite_file import Suite, TaskScore, keep_suite, read_suite
from qlora_helpers.evaluation.suite_scores import scores_of
from qlora_helpers.evaluation.suite_task import write_held_out
from qlora_helpers.views.report import write_report

STORED = json.loads((Path(__file__).parent / "suite_results.json").read_text(encoding="utf-8"))


def test_a_stored_result_of_lm_eval_is_read_with_paired_intervals():
    assert STORED["tuned"]["lm_eval_version"] == "0.4.13"
    first, second = scores_of(STORED["base"], STORED["tuned"], limit=None)
    assert first == TaskScore(
        "held_out", "acc", 5 / 24, 6 / 24, pytest.approx(0.0), pytest.approx(0.125), 24, True, 0, "1", None, False
    )
    assert (second.measure, second.base, second.tuned) == ("acc_norm", 8 / 24, 7 / 24)
    assert first.verdict() == second.verdict() == "no clear difference"


def test_an_interval_is_that_of_the_rows_of_both_models_in_one_order():
    rows = [{"doc_id": number, "filter": "none", "acc": float(number % 2)} for number in range(40)]
    better = [row | {"acc": 1.0} for row in reversed(rows)]
    results = [
        {
            "results": {"t": {"acc,none": value, "acc_stderr,none": 0.1, "alias": "t"}},
            "samples": {"t": samples},
            "higher_is_better": {"t": {"acc": up}},
            "n-samples": {"t": {"effective": 40}},
        }
        for value, samples, up in ((0.5, rows, True), (1.0, better, True))
    ]
    (score,) = scores_of(*results)
    assert score.low > 0.3 and score.high < 0.7 and score.verdict() == "better"
    results[1]["higher_is_better"]["t"]["acc"] = False
    assert scores_of(*results)[0].verdict() == "worse"
    results[1]["results"]["t"]["acc,none"] = 0.97  # no mean of the rows: another aggregation
    assert scores_of(*results)[0].verdict() == "no interval"
    few = [dict(result, samples={}) for result in results]
    assert scores_of(*few)[0].low is None


def test_what_lm_eval_calls_no_number_is_not_taken():
    values = {"acc,none": "N/A", "f1,none": float("nan"), "em,none": 1, "ok,strict": 0.5, "sample_len": 3}
    result = {"results": {"t": values}, "n-samples": {"t": {"effective": 3}}}
    names = [score.measure for score in scores_of(result, result)]
    assert names == ["em", "ok (strict)"]


def score(task: str, **more) -> TaskScore:
    return dataclasses.replace(TaskScore(task, "acc", 0.25, 0.5, 0.1, 0.4, 24, True), **more)


def found(*scores: TaskScore, sha: str = "a" * 64, **more) -> Suite:
    return Suite(scores, sha, "0.4.13", **more)


def test_scores_of_other_tasks_stay_as_long_as_the_adapter_is_the_same(tmp_path):
    run = fake_run(tmp_path)
    assert read_suite(run) is None
    keep_suite(run, found(score("one"), score("two"), notes=("a note",)))
    kept = keep_suite(run, found(dataclasses.replace(score("two"), tuned=0.75), score("three")))
    assert [(each.task, each.tuned) for each in kept.scores] == [("one", 0.5), ("two", 0.75), ("three", 0.5)]
    assert kept.notes == ("a note",) and read_suite(run) == kept
    assert "one" in repr(kept) and "+0.100 to +0.400" in repr(kept) and "better" in repr(kept)
    kept = keep_suite(run, found(score("four"), sha="b" * 64))
    assert [each.task for each in kept.scores] == ["four"]
    write_json(run.folder / "suite.json", {"scores": "x"})
    with pytest.raises(RunError, match="suite.json is damaged"):
        read_suite(run)


def test_the_report_shows_them_beside_the_scorecard(tmp_path):
    run = finished_run(tmp_path)
    before = write_report(run).read_text(encoding="utf-8")
    assert "lm-eval" not in before
    keep_suite(run, found(score("<b>arc</b>"), score("few", low=None, high=None, rows=5, limit=5)))
    page = write_report(run).read_text(encoding="utf-8")
    assert "Tasks of lm-eval 0.4.13" in page and "&lt;b&gt;arc&lt;/b&gt;" in page and "<b>arc</b>" not in page
    assert "+0.100 to +0.400" in page and "first 5" in page and "too few rows" in page
    assert "an earlier adapter" in page  # this run's certificate is of another one, or of none


@pytest.fixture
def template(tokenizer):
    return make_template("recipe", tokenizer)


def write(tmp_path, template, tokenizer, rows, trained, *, encode=None, keys=frozenset()):
    class Data:
        test, train_answers, train_keys = rows, trained, keys

    def ours(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    notes = write_held_out(tmp_path, tmp_path, Data, template, tokenizer, [0], encode=encode or ours, most_new_tokens=9)
    lines = (tmp_path / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    return notes, read_json(tmp_path / "held_out.yaml"), [json.loads(line) for line in lines]


def rows_of(*answers: str):
    return tuple(one_turn(f"r{n}", "x", f"Ann: {n}", answer) for n, answer in enumerate(answers))


def test_labels_are_chosen_among_all_labels(tmp_path, template, tokenizer):
    _, task, docs = write(tmp_path, template, tokenizer, rows_of("low", "high"), ("high", "low", "normal") * 9)
    assert task["output_type"] == "multiple_choice" and task["target_delimiter"] == ""
    assert [(doc["choices"], doc["answer"]) for doc in docs] == [
        (["high", "low", "normal"], 1),
        (["high", "low", "normal"], 0),
    ]
    assert docs[0]["prompt"] == "Ann: 0\n---\nSummary:\n"


def test_a_text_is_chosen_among_those_of_other_rows(tmp_path, template, tokenizer):
    texts = [f"Ann tells Bo at length about the weather of day {number} and what she did." for number in range(6)]
    _, task, docs = write(tmp_path, template, tokenizer, rows_of(*texts), texts)
    assert task["output_type"] == "multiple_choice"
    assert [doc["choices"][doc["answer"]] for doc in docs] == texts
    assert [doc["answer"] for doc in docs] == [0, 1, 2, 3, 0, 1]  # no place is the right one more often by much
    assert all(len(set(doc["choices"])) == 4 for doc in docs)


def test_a_short_answer_has_to_be_written(tmp_path, template, tokenizer):
    trained = [f"{number} km" for number in range(30)]
    _, task, docs = write(tmp_path, template, tokenizer, rows_of("3 km ", "4 km"), trained)
    assert task["output_type"] == "generate_until" and [doc["answer"] for doc in docs] == ["3 km", "4 km"]
    assert task["generation_kwargs"] == {"until": [tokenizer.decode([0])], "do_sample": False, "max_gen_toks": 9}
    assert task["metric_list"][0]["metric"] == "exact_match"


def test_rows_that_lm_eval_would_ask_with_other_tokens_are_skipped_and_counted(tmp_path, template, tokenizer):
    from qlora_helpers.data.duplicates import prompt_key

    rows = rows_of("3 km", "4 km", "5 km")
    first = prompt_tokens(rows[0], template).ids

    def encode(text: str) -> list[int]:
        return first if "Ann: 0" in text else [5, *tokenizer(text)["input_ids"]]

    notes, _, docs = write(tmp_path, template, tokenizer, rows, ("1 km",), encode=encode, keys={prompt_key(rows[2])})
    assert [doc["answer"] for doc in docs] == ["3 km"]
    assert notes == [
        "held_out: 1 rows are also in the training set and were skipped",
        "held_out: 1 rows were skipped, since lm-eval makes other tokens of their prompts than the run does",
    ]
    with pytest.raises(DataError, match="no held-out row can be asked by lm-eval"):
        write(tmp_path, template, tokenizer, rows[1:2], ("1 km",), encode=encode)


def test_arguments_are_checked_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "need_harness", lambda: None)
    assert suite.check_tasks("a, b,a") == suite.check_tasks(["a", "b"]) == ["a", "b"]
    run = fake_run(tmp_path)
    for tasks in ("", " , ", []):
        with pytest.raises(UserError, match="no task was named"):
            workflow.evaluate_suite(run, tasks)
    with pytest.raises(UserError, match="limit can't be that; expected at least 1; got 0"):
        workflow.evaluate_suite(run, "a", limit=0)
    with pytest.raises(ModelError, match="certificate"):
        workflow.evaluate_suite(run, "a", shots=0)


def test_without_lm_eval_one_message_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else found(name))
    run = fake_run(tmp_path)
    assert main(["suite", str(run.folder), "--tasks", "arc_easy"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "not installed. Install it: pip install 'lm-eval" in said


# With lm-eval itself

SETTINGS = [
    *("train.max_steps=2", "train.learning_rate=0.05", "data.train_rows=4", "data.eval_rows=1", "data.test_rows=24"),
    *("data.seq_len_tokens=512", "evaluation.max_new_tokens=12"),
]


@pytest.mark.only_slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is installed on demand")
def test_lm_eval_asks_the_adapter_on_its_4_bit_base_and_leaves_it_as_it_was(cache, tmp_path):
    run = workflow.open_run("mine", profile="tiny", settings=SETTINGS, root=tmp_path)
    workflow.train(run, show_progress=False, say=str)
    loaded = workflow.load(run, say=str)
    model = workflow.load_adapter(run, loaded)
    before = [workflow.ask(run, model, loaded, "Ann: hi\nBo: ho", tuned=tuned) for tuned in (False, True)]
    kept = workflow.evaluate_suite(run, "held_out", model=model, loaded=loaded, say=str)
    after = [workflow.ask(run, model, loaded, "Ann: hi\nBo: ho", tuned=tuned) for tuned in (False, True)]
    assert before == after
    assert [(each.task, each.measure, each.rows) for each in kept.scores] == [
        ("held_out", "acc", 24),
        ("held_out", "acc_norm", 24),
    ]
    assert all(each.low is not None for each in kept.scores) and kept.random_weights
    assert sorted(path.name for path in (run.folder / "suite").iterdir()) == ["held_out.jsonl", "held_out.yaml"]
    assert "Tasks of lm-eval" in write_report(run).read_text(encoding="utf-8")
    assert "an earlier adapter" not in write_report(run).read_text(encoding="utf-8")
    with pytest.raises(UserError, match="lm-eval has no such task; got 'no_such_task'"):
        workflow.evaluate_suite(run, "no_such_task", model=model, loaded=loaded, say=str)
    # A task of a file that a person names: an answer is written, and has to be equal
    (tmp_path / "rows.jsonl").write_text('{"q": "Ann: hi\\n---\\nSummary:\\n", "a": "never"}\n' * 3)
    task = {"task": "own", "dataset_path": "json", "test_split": "test", "output_type": "generate_until"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "doc_to_text": "{{q}}"}
    task |= {"doc_to_target": "{{a}}", "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 4}}
    write_json(tmp_path / "own.yaml", task | {"metric_list": [{"metric": "exact_match"}]})
    kept = workflow.evaluate_suite(run, str(tmp_path / "own.yaml"), limit=2, model=model, loaded=loaded, say=str)
    (own,) = [each for each in kept.scores if each.task == "own"]
    assert (own.measure, own.base, own.tuned, own.rows, own.limit) == ("exact_match", 0.0, 0.0, 2, 2)
    assert len(kept.scores) == 3
