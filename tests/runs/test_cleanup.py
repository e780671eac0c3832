"""Space is found and freed in small real folders; what must survive is checked after every deletion."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.runs.cleanup import SpaceItem, SpaceReport, find_space, free, free_gpu_memory
from qlora_helpers.runs.folder import Run


def write(path: Path, n_bytes: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * n_bytes)
    return path


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Two hub repositories (one download unfinished), one cached model, one run; sizes all different."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("QLORA_CACHE", str(cache))
    commit = "0" * 40
    whole = hub / "models--org--small"
    write(whole / "blobs" / "abc", 1000)
    write(whole / "refs" / "main", 0).write_text(commit)
    (whole / "snapshots" / commit).mkdir(parents=True)
    (whole / "snapshots" / commit / "weights").symlink_to("../../blobs/abc")
    write(hub / "models--org--large" / "blobs" / "def.incomplete", 5000)
    write(cache / "random" / "falcon-tiny" / "model.safetensors", 300)
    run = Run(tmp_path / "runs" / "demo")
    run.save_config(profile_config("tiny"))
    write(run.checkpoints_dir / "checkpoint-2" / "state", 700)
    write(run.data_dir / "train" / "data.arrow", 90)
    write(run.adapter_dir / "adapter_model.safetensors", 50)
    write(run.log_path, 8)
    return tmp_path


def sizes(report: SpaceReport) -> dict[str, int]:
    return {item.id: item.n_bytes for item in report}


def test_everything_that_takes_space_is_found_and_measured(machine):
    report = find_space(machine / "runs")
    found = sizes(report)
    link = os.lstat(machine / "hub/models--org--small/snapshots" / ("0" * 40) / "weights").st_size
    assert found == {
        "hub:models/org/large": 5000,
        "hub:models/org/small": 1000 + 40 + link,
        "cache:random/falcon-tiny": 300,
        "run:demo/checkpoints": 700,
        "run:demo/data": 90,
        "run:demo/adapter": 50,
        "run:demo/rest": 8,
    }
    assert list(found) == [item.id for item in report.items]  # by kind, largest first
    assert report.n_bytes == sum(found.values())
    notes = {item.id: item.note for item in report}
    assert notes["hub:models/org/large"] == "no complete revision, an unfinished download"
    assert notes["hub:models/org/small"] == "1 revision(s)"


def test_an_empty_machine_has_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "none"))
    assert find_space(tmp_path / "runs").items == ()
    assert "0.000 GiB" in repr(find_space(tmp_path / "runs"))


def test_tables_show_no_path(machine):
    report = find_space(machine / "runs")
    for text in (repr(report), report._repr_html_(), repr(report.items[0])):
        assert str(machine) not in text
        assert "hub:models/org/large" in text
    assert repr(report).splitlines()[2].split()[1:3] == ["0.000", "GiB"]
    assert "&lt;b&gt;" in SpaceReport((SpaceItem("cache:<b>/x", "project cache", 1),))._repr_html_()


def test_select_takes_patterns_and_refuses_one_without_a_match(machine):
    report = find_space(machine / "runs")
    assert set(sizes(report.select("run:demo/data", "hub:*"))) == {
        "run:demo/data",
        "hub:models/org/large",
        "hub:models/org/small",
    }
    with pytest.raises(UserError, match="expected hub:models/org/large, .*; got run:nothing"):
        report.select("run:demo/data", "run:nothing")


def test_without_confirm_nothing_is_deleted(machine, capsys):
    before = sizes(find_space(machine / "runs"))
    assert free(find_space(machine / "runs")) == 0
    assert sizes(find_space(machine / "runs")) == before
    printed = capsys.readouterr().out
    assert "run:demo/checkpoints" in printed
    assert "Nothing was freed" in printed


def test_confirm_deletes_only_what_was_chosen(machine, capsys):
    report = find_space(machine / "runs")
    assert free(report.select("run:demo/checkpoints", "hub:models/org/large", "cache:*"), confirm=True) == 6000
    assert set(sizes(find_space(machine / "runs"))) == {
        "hub:models/org/small",
        "run:demo/data",
        "run:demo/adapter",
        "run:demo/rest",
    }
    assert (machine / "runs/demo/config.json").exists()
    assert "freed" in capsys.readouterr().out


def test_a_single_item_can_be_freed(machine):
    (item,) = find_space(machine / "runs").select("run:demo/data")
    assert free(item, confirm=True) == 90


def test_the_rest_of_a_run_goes_before_its_last_part_but_the_run_stays_findable(machine):
    free(find_space(machine / "runs").select("run:demo/rest", "run:demo/data"), confirm=True)
    assert sorted(path.name for path in (machine / "runs/demo").iterdir()) == ["adapter", "checkpoints", "config.json"]
    assert "run:demo/adapter" in sizes(find_space(machine / "runs"))
    config = (machine / "runs/demo/config.json").stat().st_size
    assert free(find_space(machine / "runs").select("run:demo/*"), confirm=True) == 700 + 50 + config
    assert not (machine / "runs/demo").exists()


def test_a_running_run_is_refused_and_nothing_at_all_is_freed(machine):
    run = Run(machine / "runs" / "demo")
    run.start_session(max_steps=10, resumed_from=0)
    before = sizes(find_space(machine / "runs"))
    with pytest.raises(RunError, match="'demo' is running; nothing was freed"):
        free(find_space(machine / "runs").select("cache:*", "run:demo/checkpoints"), confirm=True)
    assert sizes(find_space(machine / "runs")) == before
    run.set_status(state="stopped")
    assert free(find_space(machine / "runs").select("run:demo/checkpoints"), confirm=True) == 700


def test_a_run_on_another_machine_is_running_while_its_heartbeat_is_recent(machine):
    run = Run(machine / "runs" / "demo")
    status = {"state": "running", "pid": 1, "host": socket.gethostname() + "-other", "heartbeat": time.time()}
    run.status_path.write_text(json.dumps(status))
    (item,) = find_space(machine / "runs").select("run:demo/checkpoints")
    with pytest.raises(RunError, match="running"):
        free(item, confirm=True)
    run.status_path.write_text(json.dumps(status | {"heartbeat": time.time() - 3600}))
    assert free(item, confirm=True) == 700


@pytest.mark.parametrize("kind", ["hub cache", "project cache", "run", "GPU memory"])
@pytest.mark.parametrize(
    "where", ["elsewhere/precious", "hub", "cache", "runs", "runs/demo", "cache/random/..", "cache/../hub"]
)
def test_nothing_outside_the_roots_is_deleted(machine, kind, where):
    write(machine / "elsewhere" / "precious", 10)
    before = sorted(machine.rglob("*"))
    item = SpaceItem("cache:x", kind, 10, paths=(machine / where,), run=Run(machine / "runs" / "demo"))
    with pytest.raises(UserError, match="cache:x is outside the caches and run folders; nothing was freed"):
        free(item, confirm=True)
    assert sorted(machine.rglob("*")) == before


def test_links_are_deleted_never_followed(machine):
    precious = write(machine / "elsewhere" / "precious", 4000)
    run = Run(machine / "runs" / "demo")
    (run.folder / "link").symlink_to(precious.parent)
    (run.checkpoints_dir / "link").symlink_to(precious.parent)
    (machine / "cache" / "random" / "link").symlink_to(precious.parent)
    report = find_space(machine / "runs")
    assert "cache:random/link" not in sizes(report)
    assert report.n_bytes < 4000 + 5000  # what the links point to is not counted
    freed = free(report.select("run:demo/*", "cache:*"), confirm=True)
    assert freed < 4000
    assert precious.stat().st_size == 4000
    assert not run.folder.exists()


def test_a_run_or_cache_that_is_a_link_is_not_touched(machine):
    other = Run(machine / "elsewhere" / "other")
    other.save_config(profile_config("tiny"))
    write(other.checkpoints_dir / "state", 10)
    (machine / "runs" / "linked").symlink_to(other.folder)
    (machine / "cache" / "linked").symlink_to(other.folder)
    assert not [name for name in sizes(find_space(machine / "runs")) if "linked" in name]
    linked = Run(machine / "runs" / "linked")
    by_hand = [
        SpaceItem("run:linked/checkpoints", "run", 10, paths=(linked.checkpoints_dir,), run=linked),
        SpaceItem("cache:linked/checkpoints", "project cache", 10, paths=(machine / "cache/linked/checkpoints",)),
    ]
    for item in by_hand:
        with pytest.raises(UserError, match="is outside"):
            free(item, confirm=True)
    assert (other.checkpoints_dir / "state").exists()


def test_items_that_no_longer_exist_free_nothing(machine):
    report = find_space(machine / "runs").select("run:demo/rest")
    (machine / "runs/demo/log.txt").unlink()
    assert free(report, confirm=True) == 0


def test_finding_space_imports_no_torch(machine):
    code = "import sys; from qlora_helpers.runs.cleanup import *; find_space()\n"
    code += "print(free_gpu_memory(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=machine, check=True)
    assert done.stdout.strip() == "GpuMemory(before_gib=0.0, after_gib=0.0) False"


def test_freeing_gpu_memory_collects_garbage_even_without_a_gpu():
    import weakref

    class Node:
        pass

    node = Node()
    node.itself = node
    alive = weakref.ref(node)
    del node
    memory = free_gpu_memory()
    assert alive() is None
    assert memory.after_gib <= memory.before_gib


def test_a_run_is_freed_by_exactly_its_name(machine, monkeypatch, capsys):
    """`clean "*" --yes` would else empty every run, and a run called `a` all that begin like it."""
    from qlora_helpers.__main__ import main

    monkeypatch.setenv("QLORA_RUNS", str(machine / "runs"))
    other = Run(machine / "runs" / "demo2")
    other.save_config(profile_config("tiny"))
    for name in ("*", "demo*", "?emo", "[d]emo", "dem", "demo/checkpoints", "../runs/demo", ""):
        assert main(["clean", name, "--yes"]) == 2
        assert "no run has that name" in capsys.readouterr().err
    assert other.exists() and Run(machine / "runs" / "demo").exists()
    assert main(["clean", "demo", "--yes"]) == 0
    assert other.exists() and not (machine / "runs" / "demo").exists()


def test_what_lies_behind_a_link_that_appeared_meanwhile_is_not_deleted(machine, monkeypatch):
    from qlora_helpers.runs import cleanup

    precious = write(machine / "precious" / "checkpoint-2" / "weights", 10)
    run = Run(machine / "runs" / "demo")
    item = SpaceItem("run:demo/checkpoints", "run", 1, "", (run.checkpoints_dir / "checkpoint-2",), run)
    cleanup._check_may_free(item)
    run.checkpoints_dir.rename(machine / "aside")
    run.checkpoints_dir.symlink_to(machine / "precious")
    monkeypatch.setattr(cleanup, "_check_may_free", lambda item: None)
    with pytest.raises((UserError, ValueError)):
        free(item, confirm=True)
    assert precious.exists()
