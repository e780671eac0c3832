"""A new run is new, or the one that was asked for before."""

from __future__ import annotations

import pytest

from qlora_helpers.base.errors import ConfigError, RunError
from qlora_helpers.runs.opening import new_run, open_run


def test_a_new_run_is_made_and_made_again_unchanged(tmp_path):
    first = new_run("mine", profile="tiny", settings=iter(["train.max_steps=3"]), root=tmp_path)
    assert first.exists() and first.config().train.max_steps == 3
    again = new_run("mine", profile="tiny", settings=iter(["train.max_steps=3"]), root=tmp_path)
    assert again.folder == first.folder and again.config() == first.config()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"settings": ["train.max_steps=4"]}, "train.max_steps=3, not 4"),
        ({"profile": "demo", "settings": ["train.max_steps=3"]}, "profile='tiny', not 'demo'"),
    ],
)
def test_an_existing_run_with_other_settings_is_refused_and_left_alone(tmp_path, changes, named):
    asked = {"profile": "tiny", "settings": ["train.max_steps=3"], "root": tmp_path}
    before = new_run("mine", **asked).config()
    with pytest.raises(RunError, match="there is a run 'mine' already") as refused:
        new_run("mine", **asked | changes)
    assert named in str(refused.value) and "open_run" in str(refused.value)
    assert open_run("mine", root=tmp_path).config() == before


def test_wrong_settings_make_no_run(tmp_path):
    with pytest.raises(ConfigError):
        new_run("mine", profile="tiny", settings=["train.max_stepps=3"], root=tmp_path)
    assert not (tmp_path / "mine").exists()
