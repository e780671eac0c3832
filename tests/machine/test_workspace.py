"""The large volume, the model cache on it, and a kernel of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from qlora_helpers.base.errors import UserError
from qlora_helpers.machine import workspace
from qlora_helpers.machine.workspace import (
    large_volume,
    model_cache_dir,
    register_kernel,
    sagemaker_app,
    set_model_cache,
)

CACHE_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No SageMaker, no cache variables, a home of its own, and huggingface_hub not imported."""
    monkeypatch.setattr(workspace, "STUDIO_VOLUME", tmp_path / "sagemaker-user")
    monkeypatch.setattr(workspace, "NOTEBOOK_INSTANCE_VOLUME", tmp_path / "ec2-user")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in CACHE_VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch also undoes what set_model_cache sets
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)


def test_large_volumes_of_sagemaker(tmp_path):
    assert large_volume() is None
    (tmp_path / "ec2-user").mkdir()
    assert large_volume() == tmp_path / "ec2-user"
    (tmp_path / "sagemaker-user").mkdir()
    assert large_volume() == tmp_path / "sagemaker-user"


def test_parts_of_sagemaker_are_distinguished(tmp_path):
    assert sagemaker_app({}) is None
    assert sagemaker_app({"SAGEMAKER_APP_TYPE": "JupyterLab"}) == "SageMaker Studio, JupyterLab app"
    (tmp_path / "ec2-user").mkdir()
    assert sagemaker_app({}) == "a SageMaker notebook instance"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"XDG_CACHE_HOME": "/x/cache"},
        {"HF_HOME": "~/hf"},
        {"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/legacy"},
        {"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/legacy", "HF_HUB_CACHE": "$HOME/hub"},
    ],
)
def test_cache_folder_is_where_huggingface_hub_puts_it(variables):
    environ = os.environ | variables
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    theirs = subprocess.check_output([sys.executable, "-c", code], text=True, env=environ).strip()
    code = "from qlora_helpers.machine.workspace import model_cache_dir; print(model_cache_dir())"
    ours = subprocess.check_output([sys.executable, "-c", code], text=True, env=environ).strip()
    assert ours == theirs


def test_cache_goes_to_the_large_volume_and_children_see_it(tmp_path):
    (tmp_path / "sagemaker-user").mkdir()
    cache = set_model_cache()
    home = tmp_path / "sagemaker-user" / ".cache" / "huggingface"
    assert home.is_dir()
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == str(home / "hub")
    assert cache.folder == home / "hub"
    assert repr(cache).startswith("Model cache: on the large volume, ")
    assert str(tmp_path) not in repr(cache)


def test_cache_stays_where_the_user_put_it(tmp_path, monkeypatch):
    (tmp_path / "sagemaker-user").mkdir()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "mine"))
    assert set_model_cache().folder == tmp_path / "mine" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    cache = set_model_cache(tmp_path / "other")
    assert os.environ["HF_HOME"] == str(tmp_path / "other")
    assert cache.folder == tmp_path / "hub"
    assert "where HF_HUB_CACHE says" in repr(cache)


def test_cache_stays_in_its_default_place_elsewhere(tmp_path):
    cache = set_model_cache()
    assert "HF_HOME" not in os.environ
    assert cache.folder == Path.home() / ".cache" / "huggingface" / "hub" == model_cache_dir()
    assert "in its default place" in repr(cache)


def test_cache_refuses_once_huggingface_hub_is_imported(tmp_path, monkeypatch):
    set_model_cache(tmp_path / "first")
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.ModuleType("huggingface_hub"))
    set_model_cache(tmp_path / "first")  # the same again changes nothing, so it may be run again
    with pytest.raises(UserError, match="huggingface_hub is already imported.*Restart the kernel"):
        set_model_cache(tmp_path / "second")
    assert os.environ["HF_HOME"] == str(tmp_path / "first")
    assert not (tmp_path / "second").exists()


def test_cache_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be created .*Name a folder"):
        set_model_cache(tmp_path / "file" / "below")
    assert "HF_HOME" not in os.environ


def test_registered_kernel_starts_with_our_python_and_variables(tmp_path, monkeypatch):
    from jupyter_client.manager import start_new_kernel

    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/cuda/lib:/other/lib")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    kernel = register_kernel("qlora-test", "Python <test>")
    assert repr(kernel).startswith("Kernel registered: choose 'Python <test>'")
    assert str(tmp_path) not in repr(kernel)
    spec = json.loads((tmp_path / "jupyter" / "kernels" / "qlora-test" / "kernel.json").read_text())
    assert spec["display_name"] == "Python <test>"
    assert spec["env"]["OMP_WAIT_POLICY"] == "PASSIVE", "threads of a shared machine sleep while they wait"

    monkeypatch.delenv("HF_HOME")  # a server that was started without our settings
    monkeypatch.delenv("LD_LIBRARY_PATH")
    manager, client = start_new_kernel(kernel_name="qlora-test", startup_timeout=60)
    try:
        told = []
        code = "import os, sys; print(sys.prefix, os.environ['HF_HOME'], os.environ['LD_LIBRARY_PATH'])"
        client.execute_interactive(code, timeout=60, output_hook=lambda message: told.append(message["content"]))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    text = "".join(content.get("text", "") for content in told)
    assert text.split() == [sys.prefix, str(tmp_path / "hf"), "/cuda/lib:/other/lib"]


def test_kernel_name_that_jupyter_refuses(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    with pytest.raises(UserError, match="could not be registered; got .*[Nn]ame"):
        register_kernel("no name at all!")


# a Python and a kernel of our own


def test_packages_go_into_this_python_outside_of_sagemaker():
    assert workspace.own_python() == Path(sys.executable)


def test_packages_go_onto_the_large_volume_and_not_into_sagemakers_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "PACKAGES_GIB", 0)
    (tmp_path / "sagemaker-user").mkdir()
    python = workspace.own_python()
    told = subprocess.check_output(
        [python, "-c", "import pip, sys; print(sys.prefix, sys.version_info[:2])"], text=True
    )
    assert told.strip() == f"{tmp_path / 'sagemaker-user' / '.qlora-environment'} {sys.version_info[:2]}"

    made = (python.parent.parent / "pyvenv.cfg").stat().st_mtime_ns
    assert workspace.own_python() == python
    assert (python.parent.parent / "pyvenv.cfg").stat().st_mtime_ns == made, "it was made again"
    monkeypatch.setattr(sys, "prefix", str(python.parent.parent))  # the kernel that runs it stays in it
    assert workspace.own_python() == Path(sys.executable)


def test_packages_that_do_not_fit_are_refused_before_anything_is_made(tmp_path, monkeypatch):
    (tmp_path / "sagemaker-user").mkdir()
    monkeypatch.setattr(workspace, "read_disk", lambda path: types.SimpleNamespace(free_gib=4.5))
    with pytest.raises(UserError, match="expected 10 GiB free; got 4.5 GiB. Stop the space"):
        workspace.own_python()
    assert not any((tmp_path / "sagemaker-user").iterdir())


def test_a_kernel_with_another_python_is_asked_to_switch(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    workspace.require_kernel(sys.executable)
    assert not (tmp_path / "jupyter").exists()

    python = sys.executable
    monkeypatch.setattr(sys, "executable", "/elsewhere/bin/python")
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    with pytest.raises(UserError, match=r"Choose the kernel 'Python \(QLoRA\)' at the top right"):
        workspace.require_kernel(python)
    spec = json.loads((tmp_path / "jupyter" / "kernels" / "qlora" / "kernel.json").read_text())
    assert spec["argv"][0] == python
