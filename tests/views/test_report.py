"""The report page: what it says, what it never runs, and what it does when parts are missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_run import ROWS, SCORES, add_evaluation, add_progress, evaluation_values, fake_run, finished_run
from test_monitor import contrast

from qlora_helpers.base.config import SECTIONS
from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.runs import sigterm
from qlora_helpers.runs.folder import Run
from qlora_helpers.views import report_scores
from qlora_helpers.views.report import write_report
from qlora_helpers.views.report_scores import percent, turns

ROOT = Path(__file__).parents[2]
VOID = {"meta", "link", "img", "br", "hr", "input", "path", "use", "rect"}


class Page(HTMLParser):
    """A page as a browser sees it: its elements, its attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(self.source)
        self.close()
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes nothing at line {self.getpos()[0]}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def page_of(run: Run) -> Page:
    return Page(write_report(run))


def changed(path: Path, **changes: Any) -> None:
    write_json(path, read_json(path) | changes)


# what it says


def test_the_page_says_what_ran_and_how_good_it_became(tmp_path):
    run = finished_run(tmp_path)
    path = write_report(run)
    assert path == run.report_path
    text = Page(path).text
    for expected in (
        "SmolLM2-135M-Instruct learned to summarise chat dialogues from 240 examples, in 30 steps on a CPU.",
        "HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0)",
        "embedded (CC0-1.0)",
        "240 for training, 30 for the evaluation loss, 30 held out",
        "the recipe's plain text",
        "LoRA, r=8, alpha=32, dropout 0.05",
        "down_proj, k_proj, q_proj, v_proj",
        "4 packed sequences of 512 tokens per step and process",
        "252 seconds",
        "torch 2.13.0, transformers 5.23.0",
        "2026-01-01 00:00 UTC",
        "untuned 9.2 → tuned 27.3 +18.1 points by fine-tuning",
        "untuned 3 % → tuned 100 % +97 points by fine-tuning",
        "Training time 4 min 12 s 834 tokens/s",
        "Peak memory 1.42 GiB the whole process",
        "fine-tuning gained 18.1 points of ROUGE-L",
        "reaches 17.6; the tuned model is 9.7 points above that",
        "With only 30 dialogues",
        "1 of 30 prompts were cut",
        "Training loss: 3.059 → 2.165, steps 2 to 30.",
        "Evaluation loss: 2.463 → 2.229, steps 10 to 30.",
        "2,442,240 of 136,957,248 parameters were trained, 1.78 %.",
        "published stored bytes instead, in which two 4-bit weights count as one",
        "cpu 0.16 GiB 1.42 GiB",
        "9,642 (20.0 %)",
        "verdict PASS PASS",
        "dialogues.jsonl line 17: the last 31 tokens of its dialogue were cut off",
        "Yes. The adapter was saved, loaded onto a fresh base model",
        "3 of 3 answers are identical, and the next-token logits are equal",
        "6 min 42 s, including loading and evaluation",
    ):
        assert expected in text, expected
    assert "a-secret-host" not in Page(path).source


def test_the_table_of_scores(tmp_path):
    text = page_of(finished_run(tmp_path)).text
    assert "untuned 9.2 11.8 2.4 3 % 77 3.412 30.3" in text
    assert "untuned, its own chat template 17.6 24.9 5.8 87 % 44 – not measured – not measured" in text
    assert "tuned 27.3 33.5 11.9 100 % 29 2.236 9.4" in text


def test_five_dialogues_with_every_answer(tmp_path):
    page = page_of(finished_run(tmp_path))
    assert len(page.all("article")) == 5
    for row in ROWS[:5]:
        assert row["summary"] in page.text
        for text, _, _ in row["answers"].values():
            assert " ".join(text.split())[:300] in page.text
    assert "a sixth row" not in page.text
    assert "an empty answer" in page.text
    assert "1 token, ended by itself" in page.text
    assert "80 tokens, cut off at the token limit" in page.text


def test_every_setting_is_listed_and_described(tmp_path):
    page = page_of(finished_run(tmp_path))
    names = [f"{section}.{name}" for section, kind in SECTIONS.items() for name in kind.__dataclass_fields__]
    assert all(name in page.text for name in names)
    assert "train.learning_rate 0.001 (default 0.0002) Peak learning rate of the adapters." in page.text
    assert "train.warmup_steps 0 Optimizer steps in which" in page.text


def test_a_loss_that_rose_again_is_reported(tmp_path):
    run = fake_run(tmp_path)
    for step, loss in ((10, 2.4), (20, 2.1), (30, 2.6)):
        run.append_progress({"step": step, "eval_loss": loss})
    assert "It was lowest (2.100) at step 20; later steps did not improve it." in page_of(run).text


def test_a_worse_model_is_reported(tmp_path):
    run = finished_run(tmp_path)
    values = evaluation_values()
    values["scores"]["tuned"] |= {"rouge_l": 8.1, "stop_rate": 0.0}
    write_json(run.evaluation_path, values | {"rouge_l_gain": -1.1})
    page = page_of(run)
    assert "untuned 9.2 → tuned 8.1 −1.1 points by fine-tuning" in page.text
    assert "untuned 3 % → tuned 0 % −3 points" in page.text
    assert "fine-tuning lost 1.1 points" in page.text
    assert "9.5 points below that" in page.text
    assert [span["class"] for span in page.all("span") if "change" in (span.get("class") or "")] == ["change bad"] * 2


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100 %"), (0.999, "99 %"), (0.5, "50 %"), (0.001, "1 %"), (0.0, "0 %")]
)
def test_percent_is_0_or_100_only_if_exact(share, text):
    assert percent(share) == text


def test_a_resumed_run_says_that_its_time_is_the_last_sessions(tmp_path):
    run = finished_run(tmp_path)
    changed(run.status_path, session=2)
    assert "the last of 2 sessions" in page_of(run).text


def test_the_gpus_that_trained_are_named(tmp_path):
    run = finished_run(tmp_path)
    plan = read_json(run.plan_path)
    plan["measured"] |= {"machine": "2 x NVIDIA A10G", "peak_gib": {"cuda:0": 20.25, "cuda:1": 21.5}}
    write_json(run.plan_path, plan)
    assert "in 30 steps on 2 x NVIDIA A10G." in page_of(run).text


def test_folders_of_this_machine_stay_out_of_what_is_shown_first(tmp_path):
    run = finished_run(tmp_path)
    changed(
        run.config_path, model={"name": "/home/somebody/models/mine"}, data={"source": "/home/somebody/chats.jsonl"}
    )
    (run.data_dir / "prepared.json").unlink()
    before_settings = page_of(run).text.split("All settings")[0]
    assert "mine (licence: see the model card)" in before_settings
    assert "chats.jsonl (licence not known yet)" in before_settings
    assert "somebody" not in before_settings


def test_random_weights_are_reported(tmp_path):
    run = finished_run(tmp_path)
    add_evaluation(run, random_weights=True)
    page = page_of(run)
    assert "random weights, so its answers and scores mean nothing" in page.text
    assert "gained" not in page.text
    assert "change good" not in page.source
    assert "mean nothing" in page_of(fake_run(tmp_path, "tiny", profile="tiny")).text
    add_evaluation(run)
    assert "mean nothing" not in page_of(run).text


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        ({"state": "running", "pid": None, "heartbeat": 9e12}, "Training is at step 30 of 30 and still running"),
        ({"state": "stopped"}, "Training was stopped by request at step 30 of 30"),
        (
            {
                "state": "stopped",
                "exit_reason": "stopped and saved by its budget: 2.00 USD of train.stop_at_usd=2 are used",
            },
            "Training was stopped by its budget (2.00 USD of train.stop_at_usd=2 are used) at step 30 of 30",
        ),
        (
            {"state": "stopped", "exit_reason": sigterm.REASON},
            "Training was stopped by SIGTERM at step 30 of 30; the figures are for the adapter at that step.",
        ),
        ({"state": "failed", "exit_reason": "an error", "last_error": "OSError: full."}, ": an error; OSError: full."),
        (
            {"state": "running", "heartbeat": 0.0},
            "ended early, at step 30 of 30: the trainer's process ended without reporting why.",
        ),
    ],
)
def test_an_unfinished_run_says_so(tmp_path, status, sentence):
    run = finished_run(tmp_path)
    changed(run.status_path, **status)
    assert sentence in page_of(run).text
    changed(run.status_path, state="finished", last_error=None)
    assert sentence not in page_of(run).text


def test_many_notes_are_counted(tmp_path):
    run = finished_run(tmp_path)
    changed(run.data_dir / "prepared.json", notes=[f"line {number}: skipped" for number in range(1, 101)])
    text = page_of(run).text
    assert "line 20: skipped and 80 more" in text
    assert "line 21:" not in text


def test_it_understands_what_evaluation_writes(tmp_path):
    from qlora_helpers.evaluation import evaluate as evaluation

    assert set(report_scores.MODELS) == set(evaluation.MODELS)
    scores = {name: evaluation.Scores(*values) for name, values in SCORES.items()}
    rows = tuple(evaluation_values(rows=6)["rows"])
    written = evaluation.Evaluation(scores, rows, prompt_tokens_trimmed=1).to_dict() | {"random_weights": False}
    run = finished_run(tmp_path)
    expected = page_of(run).source
    write_json(run.evaluation_path, written | {"rows": evaluation_values()["rows"]})
    assert page_of(run).source == expected


def test_labels_have_their_measures_their_confusion_table_and_a_verdict(tmp_path):
    """Real scores of a classifier: the report says what the task is, which measure counts, and whether tuning was worth it."""
    from qlora_helpers.evaluation.evaluate import _scores
    from qlora_helpers.evaluation.metrics.labels import labels_metric
    from qlora_helpers.evaluation.result import Evaluation, Scoring
    from qlora_helpers.evaluation.scorecard import compare, score_answers

    metric, labels = labels_metric(), ["billing", "delivery", "<b>returns</b>"]
    rows = []
    for index in range(30):
        expected = labels[index % 3]
        texts = {"base": "I think billing", "base_few": "billing", "tuned": expected if index % 10 else "billing"}
        answers = {name: {"text": text, "tokens": 2, "stopped": True} for name, text in texts.items()}
        rows.append({"id": f"r{index}", "dialogue": f"Ticket {index}", "summary": expected, "answers": answers})
    score_answers(rows, metric)
    names = ("base", "base_few", "tuned")
    result = Evaluation(
        {name: _scores([row["answers"][name] for row in rows], metric) for name in names},
        tuple(rows),
        comparisons={name: compare(rows, name, "tuned", metric=metric) for name in names[:2]},
        scoring=Scoring("labels", metric.task, metric.main, metric.measures, "240 answers have 3 texts", metric.notes),
    )
    run = finished_run(tmp_path)
    write_json(run.evaluation_path, result.to_dict() | {"random_weights": False})
    page = page_of(run)
    assert (
        "The answers are labels, one of a few (metric labels: 240 answers have 3 texts); macro-F1 counts." in page.text
    )
    assert "Tuning was worth it: by macro-F1" in page.text
    assert "macro-F1 of the answers untuned 0.0 → tuned" in page.text
    assert "macro-F1 95 % interval accuracy is a label Ends by itself" in page.text
    assert "Expected labels, and what the tuned model answered" in page.text
    assert "billing 0 10 0 0" in page.text and "(no label)" in page.text
    assert "right, 2 tokens" in page.text and "wrong, 2 tokens" in page.text
    assert "ROUGE" not in page.text.split("All settings")[0] and "<b>returns" not in page.source


def test_votes_are_shown_as_what_they_are(tmp_path):
    from qlora_helpers.evaluation.votes import Vote, keep_vote

    run = finished_run(tmp_path)
    assert "What people preferred" not in page_of(run).text
    keep_vote(run, Vote("base", "tuned", "right", True, "<b>", ("a", "b"), {}), {"tuned": run})
    text = page_of(run).text
    assert "1 vote between untuned and tuned: untuned was preferred 0 times, tuned 1 time" in text
    assert "not a measurement" in text


def test_other_runs_stand_in_the_scores(tmp_path):
    values = evaluation_values()
    rows = [row | {"answers": row["answers"] | {"run:b": row["answers"]["tuned"]}} for row in values["rows"]]
    run = finished_run(tmp_path)
    write_json(
        run.evaluation_path, values | {"rows": rows, "scores": values["scores"] | {"run:b": values["scores"]["tuned"]}}
    )
    assert page_of(run).text.count("the run b") >= 2


def test_a_reloaded_adapter_that_differs_is_reported(tmp_path):
    run = finished_run(tmp_path)
    changed(run.plan_path, reload={"prompts": 3, "same_answers": 2, "largest_difference": 0.5})
    page = page_of(run)
    assert "No. The adapter was saved" in page.text
    assert "2 of 3 answers are identical, and the next-token logits differ by at most 5.0e-01." in page.text
    assert [each for each in page.all("strong") if each.get("class") == "bad"]


def test_a_huge_loss_has_a_perplexity(tmp_path):
    run = finished_run(tmp_path)
    values = evaluation_values()
    values["scores"]["tuned"]["loss"] = 1e4
    write_json(run.evaluation_path, values)
    assert "10000.000" in page_of(run).text, "exp() of it would overflow"


def test_only_few_dialogues_are_called_few():
    values = evaluation_values()
    row = values["rows"][0]
    for rows, is_few in ((99, True), (100, False)):
        sentences = report_scores.verdicts(values | {"rows": [row] * rows})
        assert any(text.startswith(f"With only {rows} dialogues") for text in sentences) is is_few


def test_a_loss_that_ends_at_its_lowest_is_not_remarked_on(tmp_path):
    run = fake_run(tmp_path)
    for step, loss in ((10, 2.4), (20, 2.1)):
        run.append_progress({"step": step, "eval_loss": loss})
    assert "It was lowest" not in page_of(run).text


# what is never run


def test_a_dialogue_is_shown_and_not_run(tmp_path):
    page = page_of(finished_run(tmp_path))
    assert "Devnull: try this <script>alert('run')</script> in the form" in page.text
    assert "Devnull: <img src=x onerror=alert(1)> then" in page.text
    assert "Kira: red alert? lol & no" in page.text, "the colour codes around it are gone"
    assert not page.all("script")
    assert not page.all("img")


HOSTILE = "</style></script>\"'><script>x()</script><img src=x onerror=x()>{{ 7*7 }}\x1b[31m\x9b2J\x00\x07\u202e\ud800"


def poisoned(value: Any) -> Any:
    """The same JSON with something hostile in every text."""
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_texts_of_files_are_never_markup(tmp_path):
    run = finished_run(tmp_path)
    clean = page_of(run)
    for path in (
        run.plan_path,
        run.evaluation_path,
        run.data_dir / "prepared.json",
        run.adapter_dir / "adapter_config.json",
    ):
        path.write_text(json.dumps(poisoned(read_json(path))))
    changed(run.status_path, state="failed")
    status = read_json(run.status_path) | {"exit_reason": HOSTILE, "last_error": HOSTILE}
    run.status_path.write_text(json.dumps(status))
    markup = "</style><script>x()</script><img src=x>"
    changed(run.config_path, model={"name": "a/b" + markup}, data={"source": markup, "dialogue_column": markup})
    page = page_of(run)
    kept = {"script", "img"} & {tag for tag, _ in page.tags}
    assert kept == set()
    assert page.text.count("x()") > 20
    assert "{{ 7*7 }}" in page.text, "a template in a text stays text"
    assert not [char for char in page.source if unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t"]
    assert "\u202e" not in page.source
    known = {(tag, *sorted(attributes)) for tag, attributes in clean.tags} | {("p", "class", "role")}
    assert {(tag, *sorted(attributes)) for tag, attributes in page.tags} <= known


def test_the_page_needs_no_network_and_no_script(tmp_path):
    page = page_of(finished_run(tmp_path))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"@import|url\((?!#)", page.source)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


# how it can be read


def test_the_page_is_well_built(tmp_path):
    page = page_of(finished_run(tmp_path))
    assert page.open == []
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    assert len(page.all("th")) > 50
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for section in page.all("section"):
        assert section.get("aria-label") or section.get("aria-labelledby") in ids
    (chart,) = page.all("svg")
    assert chart["role"] == "img"
    assert "training loss from 3.059" in chart["aria-label"]
    assert page.all("html")[0]["lang"] == "en"


def test_every_text_has_contrast_in_light_and_dark(tmp_path):
    source = page_of(finished_run(tmp_path)).source
    schemes = [dict(re.findall(r"--([\w-]+): ([^;]+)", block)) for block in re.findall(r":root \{([^}]+)\}", source)]
    colours, light, dark = schemes[:3]
    light = {name: colours.get(value[len("var(--") : -1], value) for name, value in light.items()}
    assert contrast(light["page"], dark["page"]) > 15
    for scheme in (light, dark):
        for name in ("ink", "quiet", "good", "bad", "accent"):
            for ground in ("page", "card", "tint"):
                assert contrast(scheme[name], scheme[ground]) >= 4.5, (name, ground)
        assert contrast(scheme["warn-ink"], scheme["warn"]) >= 4.5


# what is missing


def test_a_run_that_does_not_exist(tmp_path):
    with pytest.raises(RunError, match="does not exist yet"):
        write_report(Run(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_a_run_that_was_never_trained_names_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page_of(fake_run(Path("runs"))).text
    assert "SmolLM2-135M-Instruct will learn to summarise chat dialogues." in text
    assert text.count("not measured yet") == 4
    train = "Run python -m qlora_helpers train demo , then python -m qlora_helpers report demo ."
    evaluate = "Run python -m qlora_helpers evaluate demo , then python -m qlora_helpers report demo ."
    assert text.count(train) == 3
    assert text.count(evaluate) == 2
    assert "Not checked yet. Notebook 06_evaluate checks it" in text


def test_commands_name_a_run_elsewhere_by_its_path(tmp_path):
    run = fake_run(tmp_path / "a folder")
    assert f"python -m qlora_helpers train '{run.folder}'" in page_of(run).text


@pytest.mark.parametrize(
    "missing", ["plan.json", "evaluation.json", "data", "adapter", "status.json", "progress.jsonl"]
)
def test_any_part_may_be_missing(tmp_path, missing):
    run = finished_run(tmp_path)
    path = run.folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(run)
    assert page.open == []
    assert ("Run python" in page.text) == (missing in ("plan.json", "evaluation.json", "data", "progress.jsonl"))


def test_trained_and_not_evaluated(tmp_path):
    run = fake_run(tmp_path)
    add_progress(run, last=14)
    page = page_of(run)
    assert "Training loss: 3.059 → 2.208, steps 2 to 14." in page.text
    assert "Evaluation loss: 2.463 at step 10." in page.text


def test_a_page_that_is_being_read_is_replaced_whole(tmp_path):
    run = finished_run(tmp_path)
    old = page_of(run).source
    with open(run.report_path, encoding="utf-8") as reader:
        run.evaluation_path.unlink()
        assert page_of(run).source != old
        assert reader.read() == old


@pytest.mark.parametrize(
    "damaged", ["plan.json", "evaluation.json", "status.json", "data/prepared.json", "config.json"]
)
def test_a_damaged_file_is_named_and_the_old_page_stays(tmp_path, damaged):
    run = finished_run(tmp_path)
    old = page_of(run).source
    (run.folder / damaged).write_text('{"half": ')
    with pytest.raises(RunError, match=f"{Path(damaged).name} is damaged"):
        write_report(run)
    assert run.report_path.read_text(encoding="utf-8") == old
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".report")]


def test_reports_and_curves_need_no_torch(tmp_path):
    run = finished_run(tmp_path)
    code = (
        "import sys\nfrom qlora_helpers.runs.folder import Run\nfrom qlora_helpers.views import monitor, report\n"
        "light = [name for name in ('torch', 'matplotlib', 'jinja2', 'psutil') if name in sys.modules]\n"
        f"run = Run({str(run.folder)!r})\nreport.write_report(run)\nrepr(monitor.watch_once(run))\n"
        "print(light, [name for name in ('torch', 'transformers', 'accelerate') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[] []"


# dialogues


def test_speakers_are_found_and_no_text_is_lost():
    text = "Ann: hi: there\nhttps://example.org/x\nno speaker\n: empty name\n\nBo B. :trailing\n" + "x" * 50 + ": long"
    found = turns(text)
    assert found == [
        ("Ann", "hi: there"),
        ("", "https://example.org/x"),
        ("", "no speaker"),
        ("", ": empty name"),
        ("", ""),
        ("Bo B.", "trailing"),
        ("", "x" * 50 + ": long"),
    ]


def test_a_very_long_dialogue_is_shortened(tmp_path):
    run = finished_run(tmp_path)
    values = evaluation_values()
    values["rows"][0] |= {"dialogue": "Ann: " + "long " * 20_000}
    write_json(run.evaluation_path, values)
    page = page_of(run)
    assert "long long ..." in page.text
    assert page.text.count("long") < 1000


def test_differences_with_intervals_and_outcomes_to_browse(tmp_path):
    """Real scores of the made-up answers; the first row's tuned answer is the better one, and everything is still escaped."""
    from qlora_helpers.evaluation.scorecard import compare, score_answers

    run = finished_run(tmp_path)
    rows = [
        row | {"id": f"row {number}"} for number, row in enumerate(json.loads(json.dumps(evaluation_values()["rows"])))
    ]
    score_answers(rows)
    found = {name: compare(rows, name, "tuned").to_dict() for name in ("base", "base_chat")}
    add_evaluation(run, rows=rows, comparisons=found, skipped=["a", "b"], form=["30 answers at once"])
    page = Page(write_report(run))
    assert not page.open
    assert page.text.count("95 % interval") >= 2
    assert f"Tuned against untuned: {found['base']['verdict']}" in page.text
    assert "2 held-out dialogues also in the training set were not counted" in page.text
    assert "With only" not in page.text
    assert f"{len(found['base']['wins'])} answers closer to the reference than the untuned model's" in page.text
    assert "How the answers were made: 30 answers at once." in page.text
    assert not page.all("script") and "<script>alert" not in page.source
    for line in found["base"]["differences"]:
        assert line["verdict"] in page.text


def test_label_reports_of_two_sets_may_have_lines_of_their_own():
    from qlora_helpers.data.label_report import LabelReport
    from qlora_helpers.views.report_facts import labels

    train = LabelReport(2, 1, 90, 20, 2, 2, 2)
    held_out = LabelReport(
        2, 1, 90, 20, 2, 2, 2, trimmed=("a",), turns=2, trimmed_tokens=9, shown_cut="row 1: so [9 cut] it"
    )
    found = labels({"report": vars(train), "eval_report": vars(held_out)})
    assert ("one cut", "none", "row 1: so [9 cut] it") in found and (
        "trimmed",
        "none",
        "1: a, 9 tokens in all",
    ) in found
    assert found[-1] == ("verdict", "PASS", "PASS")
