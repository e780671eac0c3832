"""The run folder: names, settings and several runs side by side."""

from __future__ import annotations

import pytest

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.files import write_json
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.opening import find_runs


@pytest.mark.parametrize("name", ["demo", "A", "7b_r8.lr-1e-3", "x" * 100])
def test_names_that_are_accepted(tmp_path, name):
    assert Run(tmp_path / name).name == name


@pytest.mark.parametrize("name", ["..", ".", "", ".hidden", "-rf", "a b", "a\n", "ä", "a:b", "a\0b", "x" * 101, "a*"])
def test_names_that_are_refused(tmp_path, name):
    with pytest.raises(RunError, match="this can't be the name of a run"):
        Run(f"{tmp_path}/{name}" if name not in ("", ".") else name)


# configuration


def test_settings_are_read_as_they_were_saved(run):
    assert not run.exists()
    with pytest.raises(RunError, match=r"the run 'mine' does not exist yet\. Run notebook 00_setup"):
        run.config()
    config = RunConfig().with_settings({"train.max_steps": 7, "adapter.target_modules": ["q_proj"]})
    run.save_config(config)
    assert run.exists()
    assert run.config() == config


def test_damaged_settings_are_reported(run):
    run.folder.mkdir(parents=True)
    for content in ("{", "[]", '{"train": {"max_steps": -1}}', '{"modle": {}}', '"text"', "null"):
        run.config_path.write_text(content)
        with pytest.raises(UserError):
            run.config()


def test_a_missing_product_names_what_makes_it(run):
    with pytest.raises(RunError, match=r"mine/adapter is not there yet\. Notebook 04_train makes it; run that first\."):
        run.need(run.adapter_dir, "Notebook 04_train")
    run.adapter_dir.mkdir(parents=True)
    assert run.need(run.adapter_dir, "Notebook 04_train") == run.adapter_dir


def test_several_runs_side_by_side(tmp_path):
    runs = [Run(tmp_path / name) for name in ("b", "a")]
    for number, run in enumerate(runs):
        run.save_config(RunConfig().with_settings({"train.max_steps": number + 1}))
        run.start_session(max_steps=number + 1, resumed_from=0)
        run.append_progress({"step": 1, "loss": float(number)})
    (tmp_path / "no run").mkdir()
    (tmp_path / "file").touch()
    write_json(tmp_path / ".hidden" / "config.json", {})
    runs[0].request("stop")
    found = find_runs(tmp_path)
    assert [run.name for run in found] == ["a", "b"]
    assert [run.config().train.max_steps for run in found] == [2, 1]
    assert [run.progress()[0]["loss"] for run in found] == [1.0, 0.0]
    assert [len(list(run.requests)) for run in found] == [0, 1]
    assert find_runs(tmp_path / "nothing") == []


def test_only_settings_and_digests_that_both_have_are_compared(run):
    before = {
        "model": {"name": "a", "removed": 1},
        "adapter": {"r": 8},
        "marks": {"the data": "1", "the vocabulary": "2"},
    }
    after = {
        "model": {"name": "a", "added": 2},
        "adapter": {"r": 8},
        "data": {},
        "marks": {"the data": "1", "new": "3"},
    }
    run.refuse_differences(before, after)
    changed = {"model": {"name": "b"}, "adapter": {"r": 16}, "data": {}, "marks": {"the data": "9"}}
    with pytest.raises(RunError) as caught:
        run.refuse_differences(before, changed)
    for difference in ("model.name: 'a' -> 'b'", "adapter.r: 8 -> 16", "the data has changed"):
        assert difference in str(caught.value)


def test_a_path_that_goes_upwards_is_made_absolute_and_a_link_stays_one(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "here")
    assert Run("../mine").folder == tmp_path.resolve() / "mine"
    assert str(Run("mine").folder) == "mine"
