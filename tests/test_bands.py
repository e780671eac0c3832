"""What each notebook takes: the page and the notebooks' first cells show what is computed, and it is computed of what they do."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import notebook_band_tables as tables  # noqa: E402
import notebook_bands as bands  # noqa: E402

SPEC = importlib.util.spec_from_file_location("bands_tool", ROOT / "tools" / "bands.py")
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)
NAMES = list(bands.WORK)
UNKNOWN = re.compile(r"not (?:run|measured|planned|known)|unknown|\bn/a\b|\| *\|", re.IGNORECASE)


def code_of(name: str) -> str:
    """All code of a notebook."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_every_notebook_but_the_start_page_has_a_band():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} - {"start"} == set(NAMES)


@pytest.mark.parametrize("name", [*NAMES, "start"])
def test_the_first_cell_shows_what_is_computed(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    assert tool.cells()[path] == tool.first_cell(path), "run tools/bands.py --write"


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_short_and_every_cell_is_known(name):
    rows = tables.table(name).splitlines()[2:]
    assert 2 <= len(rows) <= 8 and not UNKNOWN.search(tables.table(name))
    machines = ", ".join(row.split("|")[1].strip() for row in rows)
    assert all(gpu in machines for gpu in tables.ONE_GPU) and "laptop" in machines
    assert all(row.rstrip(" |").endswith(("measured", "computed")) for row in rows)
    assert "$" not in tables.table(name), "JupyterLab reads what is between two of these as a formula"


@pytest.mark.parametrize("name", NAMES)
def test_the_work_is_what_the_notebook_s_cells_do(name):
    code, work = code_of(name), bands.WORK[name]
    run = "throwaway" if work.always else "run"
    loads = rf"ql\.load\({run}\)|ql\.serve\({run}\)|load_model\(ql\.profile_config\(PROFILE\)"
    assert bool(re.search(loads, code)) == (work.loads > 0)
    assert bool(re.search(rf"ql\.train\({run}\b", code)) == work.trains
    assert ("ql.evaluate(run" in code) == (work.answering > 0)
    assert bool(re.search(r"ql\.export_(run|to)\(run", code)) == work.merges
    assert ("ql.prepare_data(run" in code) == work.prepares
    looked_at = len(re.findall(r"\bstep_cost\(", code)) + 2 * (
        "costs[again] = step_cost" in code
    )  # one of them three times
    assert looked_at == work.steps


def test_a_notebook_s_own_settings_are_its_run_s():
    config = bands.config_of("10_your_own_task", "demo")
    assert config.data.source == "embedded:tickets" and config.data.prompt.startswith("Answer with one JSON object")
    assert bands.config_of("04_train", "demo").data.source == "embedded"


def test_training_is_the_plan_s():
    from qlora_helpers.machine.hardware import parse_gpus
    from qlora_helpers.planning.run_plan import forecast

    config, hardware = bands.config_of("04_train", "demo"), parse_gpus("ml.g5.xlarge")
    found = bands.OnGpu("04_train", config, hardware, planned=False)
    asked = forecast(config, hardware=hardware).step
    assert (found.training.seconds, found.training.peak_gib) == (asked.seconds, asked.peak_gib)
    assert found.gib() == asked.peak_gib
    assert found.seconds() == pytest.approx(sum(found.parts().values())) and found.parts()["training"] > asked.seconds


def test_what_does_not_fit_is_said():
    text = tables.falcon_table()
    (row,) = [line for line in text.splitlines() if line.startswith("| L40S")]
    assert "does not fit" in row and not UNKNOWN.search(text)
    fullest = float(row.rstrip(" |").rpartition("|")[2].removesuffix("GiB"))
    assert fullest <= tables.machine("L40S", "ml.g6e.xlarge").usable_gib


def test_answers_are_no_faster_than_the_slowest_measured_case():
    found = bands.record("evaluation_speed_one_gpu")
    gpu = bands.parse_gpus("H100").gpu
    for case in found["cases"]:
        sizes, ours = (
            bands.model_sizes(bands.SHAPES[case["model"].lower().removesuffix("-instruct")]),
            case["variants"]["ours"],
        )
        passes = -(-ours["rows"] // case["batch"]) * found["options"]["new_tokens"]
        tokens = ours["rows"] * ours["mean_prompt_tokens"]
        computed = bands.answers_s(sizes, gpu, tokens, passes, copied="copies" in case["form"][0])
        assert bands.slower_than_computed() * computed >= min(ours["seconds"]) * 0.999


OLD = "# 99 · Title\n\nGoal.\n\n| machine | time |\n|---|---|\n| a | not run |\n\n**Before this:** nothing."


def test_only_the_table_of_a_cell_changes_and_it_can_be_written_again():
    new = tool.with_table(OLD, "| machine | time |\n| --- | --- |\n| b | 1 s |")
    assert new.startswith("# 99 · Title\n\nGoal.\n\n<!-- bands -->\n| machine") and new.endswith(
        "\n\n**Before this:** nothing."
    )
    assert "not run" not in new and "| b | 1 s |" in new
    again = tool.with_table(new, "| machine |\n| --- |\n| c |")
    assert "| b |" not in again and again.count(tool.START) == again.count(tool.END) == 1
    assert tool.with_table(again, "| machine | time |\n| --- | --- |\n| b | 1 s |") == new
    with pytest.raises(ValueError, match="no table"):
        tool.with_table("# Title", "| machine |")


def test_writing_touches_nothing_but_the_first_cell(tmp_path):
    path = tmp_path / "04_train.ipynb"
    before = (ROOT / "notebooks" / path.name).read_text(encoding="utf-8")
    path.write_text(before, encoding="utf-8")
    tool.store(path, "changed")
    old, new = json.loads(before), json.loads(path.read_text(encoding="utf-8"))
    assert "".join(new["cells"][0].pop("source")) == "changed" and old["cells"][0].pop("source")
    assert new == old


def test_the_start_page_s_times_are_those_of_the_notebooks_that_a_row_links():
    rows = (
        "| a | [1](01_load_model.ipynb), [2](02_lora_config.ipynb) | 1 hour |\n| b | [p](primer.ipynb) | 20 minutes |\n"
    )
    cell = f"# Start\n\n| you want to | open | time |\n|---|---|---|\n{rows}\nMore."
    new = tool.with_times(cell)
    by_name = {name: {band.profile: band.seconds for band in tables.on_laptop(name)} for name in NAMES}
    both = {each: by_name["01_load_model"][each] + by_name["02_lora_config"][each] for each in ("tiny", "demo")}
    assert f"| `tiny` {both['tiny']:.0f} s, `demo` {both['demo']:.0f} s; exercises 24 min |" in new
    assert f"| {by_name['primer']['every']:.0f} s; exercises 10 min |" in new
    assert new.startswith("# Start\n\n<!-- bands -->\n| you want to | open |") and new.endswith(
        "<!-- /bands -->\n\nMore."
    )
    assert tool.with_times(new) == new
    with pytest.raises(ValueError, match="no table"):
        tool.with_times("# Start")
