"""Expandable segments are turned on in a process that has imported torch, unless the user has chosen otherwise."""

import os

import pytest
import torch

from qlora_helpers.model import allocator


@pytest.fixture
def received(monkeypatch):
    """The settings that the allocator receives; the variables are empty."""
    for name in allocator.VARIABLES:
        monkeypatch.setenv(name, "")
    found = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append)
    return found


def test_the_running_allocator_and_later_processes_are_set(received):
    assert allocator.use_expandable_segments()
    assert received == ["expandable_segments:True"]
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert allocator.use_expandable_segments()  # a user who set the variable too late is helped as well
    assert received == 2 * ["expandable_segments:True"]


@pytest.mark.parametrize("name", allocator.VARIABLES)
def test_the_users_choice_is_kept(received, monkeypatch, name):
    monkeypatch.setenv(name, "expandable_segments:False")
    assert not allocator.use_expandable_segments()
    assert received == []
    assert os.environ[name] == "expandable_segments:False"


@pytest.mark.parametrize("name", allocator.VARIABLES)
def test_other_options_are_kept(received, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:200")
    assert allocator.use_expandable_segments()
    assert received == ["max_split_size_mb:200,expandable_segments:True"]


def test_this_version_of_torch_accepts_the_option(monkeypatch):
    before = torch._C._accelerator_getAllocatorSettings()
    for name in allocator.VARIABLES:
        monkeypatch.setenv(name, "")
    try:
        allocator.use_expandable_segments()
        assert torch._C._accelerator_getAllocatorSettings() == "expandable_segments:True"
    finally:
        torch._C._accelerator_setAllocatorSettings(before or "expandable_segments:False")


def test_the_older_function_is_called_where_the_new_one_is_missing(received, monkeypatch):
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings")
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", received.append)
    assert allocator.use_expandable_segments()
    assert received == ["expandable_segments:True"]
