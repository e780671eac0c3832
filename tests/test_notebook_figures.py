"""Figures that the notebooks' texts quote are those of the records under benchmarks/, rounded as they are quoted."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import notebook_bands  # noqa: E402
from document_values import values  # noqa: E402
from records import compared, ours_beside, record, target_of  # noqa: E402

from qlora_helpers.data.sources import read_corpus  # noqa: E402
from qlora_helpers.evaluation.metrics.fields import json_metric  # noqa: E402


def text_of(name: str) -> str:
    """All Markdown of a notebook."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def learnt(variant: str, measure: str) -> float:
    """The mean over seeds of a tuned model's score."""
    cases = record("learning_one_gpu")["cases"]
    return mean(case["scores"]["tuned"][measure] for case in cases if case["variant"] == variant)


def times_the_recipe() -> float:
    """Our Falcon-40B on a whole card beside the recipe."""
    (group,) = [group for group in compared() if target_of(group[0]) == ("falcon-40b", 79)]
    (recipe,) = [case for case in group if case["variant"] == "recipe"]
    return ours_beside(recipe)["tokens_per_s"] / recipe["tokens_per_s"]


def times_in_fp8() -> float:
    """The Llama shape on a whole H200, FP8 beside bfloat16."""
    cases = [case for case in record("fp8_step_speed_one_gpu")["cases"] if case["limit_gib"] == 79]
    speeds = {case["fp8"]: case["tokens_per_s"] for case in cases if case["model"] == "llama-3.1-8b"}
    return speeds[True] / speeds[False]


def field_f1_without_a_model() -> float:
    """Field F1, in per cent, of answering each of notebook 10's held-out tickets with the commonest value of each field."""
    corpus = read_corpus(notebook_bands.config_of("10_your_own_task", "demo").data)
    known = [json.loads(row.answer) for row in corpus.train]
    answer = json.dumps({key: Counter(row[key] for row in known).most_common(1)[0][0] for key in known[0]})
    rows = json_metric().score([answer] * len(corpus.test), [[row.answer] for row in corpus.test])
    right, given, wanted = (sum(row[f"fields_{name}"] for row in rows) for name in ("right", "given", "wanted"))
    return 200 * right / (given + wanted)


def percent(name: str) -> float:
    """A document's percentage as a number."""
    return float(values()[name].rstrip("%"))


QUOTED = [
    ("01_load_model", r"tensors within (\d+) %", lambda: percent("off_allocated"), "at most"),
    ("01_load_model", r"seconds within (\d+) %", lambda: percent("off_seconds_held_out"), "at most"),
    ("06_evaluate", r"on ([\d,]+) rows of DialogSum", lambda: record("learning_one_gpu")["train_rows"], "equal"),
    ("06_evaluate", r"ROUGE-L is (\d+) against", lambda: learnt("recipe", "rouge_l"), "equal"),
    ("06_evaluate", r"ROUGE-L is \d+ against (\d+)", lambda: learnt("ours", "rouge_l"), "equal"),
    ("06_evaluate", r"the loss ([\d.]+) against", lambda: learnt("recipe", "loss"), "equal"),
    ("06_evaluate", r"the loss [\d.]+ against ([\d.]+\d)", lambda: learnt("ours", "loss"), "equal"),
    ("07_scale_out", r"made ([\d,]+) tokens/s", lambda: record("two_gpus")["copied"]["tokens_per_s"], "equal"),
    ("09_fast_step", r"lies within (\d+) % of the steps", lambda: percent("off_seconds_held_out"), "at most"),
    ("09_fast_step", r"FP8 trains a Llama of 8 B ([\d.]+) times", times_in_fp8, "equal"),
    ("09_fast_step", r"Falcon-40B trains ([\d.]+) times", times_the_recipe, "equal"),
    ("09_fast_step", r"a Llama of 8 B ([\d.]+) times as many", lambda: float(values()["ahead_wide"]), "equal"),
    ("10_your_own_task", r"the mean of its line, is (\d+)", field_f1_without_a_model, "equal"),
]


@pytest.mark.parametrize(("notebook", "pattern", "measured", "how"), QUOTED, ids=[f"{a}-{b}" for a, b, *_ in QUOTED])
def test_a_quoted_figure_is_the_measured_one(notebook, pattern, measured, how):
    quoted = re.findall(pattern, text_of(notebook))
    assert quoted, f"{notebook} no longer says {pattern}"
    for figure in quoted:
        decimals = len(figure.partition(".")[2])
        found = measured()
        if how == "at most":
            assert found <= float(figure) < found + 2
        else:
            assert round(found, decimals) == float(figure.replace(",", ""))


def test_records_that_a_notebook_names_are_there():
    named = [
        name
        for path in (ROOT / "notebooks").glob("*.ipynb")
        for name in re.findall(r"benchmarks/[\w.]+\w", text_of(path.stem))
    ]
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


BESIDE = ("primer", "00_setup", "01_load_model", "02_lora_config", "03_prepare_data", "04_train")
FIGURE = re.compile(r"(?<!within )(?<![\w.,])(\d[\d,]*(?:\.\d+)?)(?= ?(?:GiB|%|tokens))")


def figures_beside(name: str) -> set[float]:
    """All numbers in a notebook's code and in what is stored below it."""
    pieces = []
    for cell in json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            pieces.append("".join(cell["source"]))
            pieces += ["".join(out.get("text", out.get("data", {}).get("text/plain", ""))) for out in cell["outputs"]]
    return {float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*(?:\.\d+)?", "\n".join(pieces))}


def strangers(text: str, known: set[float]) -> list[str]:
    """Figures with a unit in a text that no known number rounds to."""
    text = re.sub(r"<!-- bands -->.*?<!-- /bands -->|`[^`\n]*`|\$[^$]*\$", " ", text, flags=re.DOTALL)
    found = []
    for figure in FIGURE.findall(text):
        value, decimals = float(figure.replace(",", "")), len(figure.partition(".")[2])
        if not any(round(number, decimals) == value for number in known):
            found.append(figure)
    return found


@pytest.mark.parametrize("name", BESIDE)
def test_figures_in_a_text_are_those_of_the_cells(name):
    counted_in = {"00_setup": "01_load_model"}  # which counts Falcon-40B
    assert strangers(text_of(name), figures_beside(name) | figures_beside(counted_in.get(name, name))) == []


def test_a_figure_that_no_cell_has_is_found():
    assert strangers("Of 1,234 tokens 21.4 % are trained, in 3.1 GiB.", {1234.0, 21.42, 2.9}) == ["3.1"]
