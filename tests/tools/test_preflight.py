"""The preflight on machines that are handed in, and once on this one; an old Python can read it far enough to be refused."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "workshop" / "setup" / "preflight.py"
SPEC = importlib.util.spec_from_file_location("preflight", FILE)
preflight = importlib.util.module_from_spec(SPEC)
sys.modules["preflight"] = preflight  # its dataclasses look their module up
SPEC.loader.exec_module(preflight)
machine_facts = sys.modules["machine_facts"]

STEP = {"tokens_per_s": 200.0, "device": "cpu", "layers": 210, "demo_minutes": 5.0}
GOOD = {"glibc": (2, 35), "ram_gib": 16.0, "free_ram_gib": 9.0, "free_disk_gib": 40.0, "torch": "2.13.0", "step": STEP}
MAC = {"system": "Darwin", "machine": "arm64", "macos": "15.1", "glibc": ()}


def judged(**changes):
    facts = machine_facts.Facts(**(GOOD | changes))
    findings = preflight.judge(facts)
    return findings, *preflight.decide(facts, findings)


def bad(**changes):
    """The findings that are not in order, as (level, what), and the verdict."""
    findings, verdict, _ = judged(**changes)
    assert all(each.fix for each in findings if each.level != "ok"), "whatever is not in order says how to fix it"
    return [(each.level, each.what) for each in findings if each.level != "ok"], verdict


def test_a_good_machine_is_one_for_the_demo_with_its_minutes():
    findings, verdict, why = judged()
    assert verdict == "demo" and "5 minutes" in why
    assert {each.level for each in findings} == {"ok"}
    assert bad(**MAC) == ([], "demo")


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("Python", {"python": (3, 10, 4)}),
        ("Python", {"python": (3, 9, 6), **MAC}),
        ("system", {"system": "Windows"}),
        ("system", MAC | {"machine": "x86_64"}),
        ("system", MAC | {"machine": "x86_64", "rosetta": True}),
        ("system", MAC | {"macos": "13.6"}),
        ("system", {"glibc": (2, 27)}),
        ("system", {"glibc": (), "musl": True}),
        ("system", {"machine": "i686"}),
        ("disk", {"free_disk_gib": 4.9}),
        ("venv", {"can_make_venv": False, "missing": ["torch"]}),
        ("GPU", {"gpus": [("T4", 14.0, "470.57.02")], "torch": "", "missing": ["torch"], "step": {}}),
        ("GPU", {"gpus": [("T4", 14.0, "550.54.14")], "torch_cuda": "13.0"}),
        ("step", {"step": {"error": "Illegal instruction"}}),
    ],
)
def test_what_cannot_work_is_refused_with_how_to_fix_it(what, changes):
    assert bad(**changes) == (
        [("refused", what)] + ([("warning", "packages")] if "missing" in changes else []),
        "pair up",
    )


@pytest.mark.parametrize(
    ("what", "changes", "verdict"),
    [
        ("folder", {"wsl": True, "on_windows_disk": True}, "demo"),
        ("memory", {"free_ram_gib": 3.0}, "tiny"),
        ("memory", {"free_ram_gib": 1.5}, "pair up"),
        ("make", {"can_make": False}, "demo"),
        ("GPU", {"gpus": [("L4", 20.0, "580.65.06")], "gpu_processes": 2}, "demo"),
        ("model", {"has_model": False}, "tiny"),
        ("network", {"proxy": "proxy.example", "proxy_reachable": False}, "demo"),
        ("packages", {"missing": ["torch"], "step": {}}, "install"),
        ("step", {"step": {"too_slow": True}}, "tiny"),
    ],
)
def test_what_can_be_lived_with_is_a_warning(what, changes, verdict):
    assert bad(**changes) == ([("warning", what)], verdict)


def test_who_holds_the_gpu_is_said():
    found = {
        each.what: each.found
        for each in judged(gpus=[("L4", 20.0, "580.65.06")], gpu_processes=1, gpu_users=["ann"])[0]
    }
    assert found["GPU"].endswith("1 process holds it (ann)")
    (mine,) = machine_facts.users_of([str(os.getpid())])
    assert mine == pwd.getpwuid(os.getuid()).pw_name
    assert machine_facts.users_of(["0", "not-a-process"]) == []


def test_the_verdict_follows_from_a_timed_step():
    assert judged(step=STEP | {"demo_minutes": 40.0})[1] == "tiny"
    assert judged(step={})[1] == "tiny"
    assert bad(gpus=[("L4", 22.0, "535.10")], torch_cuda="None") == ([], "demo"), "a CPU build asks nothing of a driver"


def test_wsl_names_its_own_limit_and_a_mac_s_make_its_download():
    fixes = {each.what: each.fix for each in judged(wsl=True, free_ram_gib=3.0)[0]}
    assert ".wslconfig" in fixes["memory"]
    fixes = {each.what: each.fix for each in judged(**MAC, can_make=False)[0]}
    assert "Xcode" in fixes["make"]


def test_free_memory_of_a_mac_is_read_from_vm_stat():
    text = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:       65536.\nPages active:  9.\n"
        "Pages inactive:  131072.\nPages purgeable:  0.\n"
    )
    assert machine_facts.free_on_a_mac(text) == 3.0
    assert machine_facts.free_on_a_mac("") is None


def test_python_3_8_can_read_it_and_only_the_standard_library_is_imported():
    for name in ("preflight.py", "machine_facts.py"):
        tree = ast.parse((FILE.parent / name).read_text(encoding="utf-8"), feature_version=(3, 8))
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {each.split(".")[0] for each in modules} <= {*sys.stdlib_module_names, "machine_facts"}


def test_the_code_to_read_out_names_what_is_wrong():
    facts = machine_facts.Facts(**(GOOD | {"free_disk_gib": 1.0}))
    assert preflight.code_of(facts, preflight.judge(facts)) == "lin-3.11-disk"


def run(*options):
    done = subprocess.run([sys.executable, str(FILE), *options], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done


def test_it_looks_at_this_machine_without_a_step():
    done = run("--no-step", "--json")
    found = json.loads(done.stdout)
    assert found["verdict"] in preflight.EXIT and done.returncode == preflight.EXIT[found["verdict"]]
    assert {"Python", "system", "memory", "disk"} <= {each["what"] for each in found["findings"]}


@pytest.mark.only_slow
def test_a_real_step_is_timed_here():
    done = run("--json")
    found = json.loads(done.stdout)
    assert found["step"].get("layers") == 210 or found["step"] == {"too_slow": True}, found


def test_a_step_that_fails_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "one_step.py").write_text("raise SystemExit('no \\x1b[31msuch instruction')")
    monkeypatch.setattr(machine_facts, "HERE", tmp_path)
    assert machine_facts.timed_step() == {"error": "no  [31msuch instruction"}
    (tmp_path / "one_step.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(machine_facts, "STEP_LIMIT_S", 0.2)
    assert machine_facts.timed_step() == {"too_slow": True}
