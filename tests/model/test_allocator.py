"""Expandable segments: turned on in a process that has imported torch, unless the user has chosen."""

import os

import pytest
import torch

from qlora_helpers.model import loading


@pytest.fixture
def told(monkeypatch):
    """Settings that the allocator was told; the variables are as if nobody had set them."""
    for name in loading.VARIABLES:
        monkeypatch.setenv(name, "")
    found = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append)
    return found


def test_the_running_allocator_and_later_processes_are_told(told):
    assert loading.use_expandable_segments()
    assert told == ["expandable_segments:True"]
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert loading.use_expandable_segments()  # a user who set the variable too late is helped as well
    assert told == 2 * ["expandable_segments:True"]


@pytest.mark.parametrize("name", loading.VARIABLES)
def test_what_the_user_chose_stays(told, monkeypatch, name):
    monkeypatch.setenv(name, "expandable_segments:False")
    assert not loading.use_expandable_segments()
    assert told == []
    assert os.environ[name] == "expandable_segments:False"


@pytest.mark.parametrize("name", loading.VARIABLES)
def test_other_settings_stay(told, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:200")
    assert loading.use_expandable_segments()
    assert told == ["max_split_size_mb:200,expandable_segments:True"]


def test_this_version_of_torch_takes_it(monkeypatch):
    before = torch._C._accelerator_getAllocatorSettings()
    for name in loading.VARIABLES:
        monkeypatch.setenv(name, "")
    try:
        loading.use_expandable_segments()
        assert torch._C._accelerator_getAllocatorSettings() == "expandable_segments:True"
    finally:
        torch._C._accelerator_setAllocatorSettings(before or "expandable_segments:False")


def test_an_older_name_is_called_where_the_new_one_is_not_there(told, monkeypatch):
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings")
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", told.append)
    assert loading.use_expandable_segments()
    assert told == ["expandable_segments:True"]
