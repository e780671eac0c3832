"""The stick: planned for several platforms, made of two tiny wheels, checked, and installed with the network cut."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("stick", ROOT / "tools" / "stick.py")
stick = importlib.util.module_from_spec(SPEC)
sys.modules["stick"] = stick  # its dataclasses look their module up
SPEC.loader.exec_module(stick)
WHEEL = "for_all-1.0-py3-none-any.whl"
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
needs_pip = pytest.mark.skipif(
    not stick.this_platform() or not importlib.util.find_spec("pip"), reason="a platform without sticks, or no pip"
)


def wheel(folder: Path, name: str, tag: str = "py3-none-any") -> Path:
    """Writes a wheel that holds one module with its own name."""
    path = folder / f"{name}-1.0-{tag}.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": f"NAME = {name!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = ""
    for inner, text in files.items():
        found = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{inner},sha256={found},{len(text.encode())}\n"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, text in (files | {f"{info}/RECORD": record + f"{info}/RECORD,,\n"}).items():
            archive.writestr(inner, text)
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project that needs one wheel for all systems and one for macOS alone; pip finds both in a folder and asks no index."""
    shop, root = tmp_path / "shop", tmp_path / "root"
    shop.mkdir()
    root.mkdir()
    both, mac = wheel(shop, "for_all"), wheel(shop, "for_mac", "py3-none-macosx_14_0_arm64")
    (root / "requirements.lock").write_text(
        f"for-all==1.0 \\\n    --hash=sha256:{stick.digest(both)}\n"
        f"for-mac==1.0 ; sys_platform == 'darwin' \\\n    --hash=sha256:{stick.digest(mac)}\n"
    )
    (root / "README.md").write_text("A project.\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return root


def targets():
    return stick.parse_targets(f"{stick.this_platform()}:{PYTHON},macos-arm64:3.12")


def test_the_real_lock_is_read_whole_and_markers_choose_by_platform():
    pins = stick.read_lock(ROOT / "requirements.lock")
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert len(pins) == sum("==" in line and not line.startswith("#") for line in text.splitlines())
    assert all(pin.hashes for pin in pins) and len(pins) > 100
    named = {
        name: {pin.name for pin in stick.needed(stick.parse_targets(name)[0], pins)}
        for name in ("linux-x86_64:3.12", "macos-arm64:3.12")
    }
    assert "appnope" in named["macos-arm64:3.12"] and "appnope" not in named["linux-x86_64:3.12"]
    assert "rouge-score" not in named["linux-x86_64:3.12"], "its wheel is built, since the index has none"
    versions = [
        pin.version
        for pin in stick.needed(stick.parse_targets("linux-x86_64:3.11")[0], pins)
        if pin.name == "contourpy"
    ]
    assert len(versions) == 1


def test_unknown_targets_and_folders_with_something_else_are_refused(tmp_path, capsys):
    (tmp_path / "holiday.jpg").write_text("")
    for arguments in (["--targets", "windows:3.12"], ["--targets", "macos-arm64:3.9"], ["--download", "none"]):
        assert stick.main([str(tmp_path), *arguments]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


@needs_pip
def test_a_stick_is_made_checked_and_installed_without_a_network(project, tmp_path, monkeypatch):
    out, into = tmp_path / "stick", tmp_path / "into"
    here, mac = stick.make_stick(out, targets(), "this", root=project)
    assert list(here.wheels) == ["for_all-1.0-py3-none-any.whl"] and here.downloaded
    assert len(mac.wheels) == 2 and not mac.downloaded and "not run" in mac.label
    assert [path.name for path in (out / "wheels").iterdir()] == ["for_all-1.0-py3-none-any.whl"]
    page = (out / "MISSING.md").read_text()
    assert "make shipped" in page and not (out / "project" / "workshop").exists()
    assert "Python 3.11" in page and "macos-arm64-cp312" in page and "not run" in page
    assert str(tmp_path) not in json.dumps(json.loads((out / "manifest.json").read_text())), "no path of this machine"

    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    done = installed(out, into)
    assert done.returncode == 0, done.stderr
    said = subprocess.run(
        [into / ".venv/bin/python", "-c", "import for_all; print(for_all.NAME)"], capture_output=True, text=True
    )
    assert said.stdout == "for_all\n"
    assert (into / "README.md").read_text() == "A project.\n"
    assert "exists already" in installed(out, into).stderr

    (project / "workshop" / "shipped" / "finished").mkdir(parents=True)
    (project / "workshop" / "shipped" / "finished" / "config.json").write_text("{}")
    stick.make_stick(out, targets(), "none", root=project)
    assert "project/workshop/shipped/finished/config.json" in (out / "SHA256SUMS").read_text()
    assert "make shipped" not in (out / "MISSING.md").read_text()


def installed(out, into, **environment):
    command = [sys.executable, out / "install_offline.py", into]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@needs_pip
@pytest.mark.parametrize("works", [True, False])
def test_the_stick_s_uv_installs_and_pip_where_it_does_not_run(project, tmp_path, works):
    name = stick.UV.replace("==", "-")
    wheel(tmp_path / "shop", "uv")
    whole = tmp_path / "shop" / f"{name}-py3-none-any.whl"
    with (
        zipfile.ZipFile(tmp_path / "shop" / "uv-1.0-py3-none-any.whl") as found,
        zipfile.ZipFile(whole, "w") as archive,
    ):
        for inner in found.namelist():
            text = found.read(inner).decode().replace("Version: 1.0", f"Version: {stick.UV[4:]}")
            archive.writestr(inner.replace("uv-1.0", name), text)
        archive.writestr(f"{name}.data/scripts/uv", f'#!/bin/sh\necho "$@" > "$HOME/calls"\nexit {int(not works)}\n')
    out, into = tmp_path / "stick", tmp_path / "into"
    (target,) = stick.make_stick(out, targets()[:1], "this", root=project)
    assert set(target.wheels) == {WHEEL, whole.name} and (out / "wheels" / whole.name).is_file()
    done = installed(out, into, HOME=str(tmp_path), PIP_NO_INDEX="0", PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert done.returncode == 0, done.stderr
    assert all(
        each in (tmp_path / "calls").read_text().split() for each in ("--offline", "--require-hashes", "--no-deps")
    )
    assert ("uv does not work here" in done.stdout) == (not works)
    assert bool(list(into.glob(".venv/lib/*/site-packages/for_all.py"))) == (not works), (
        "pip installed, or left it to uv"
    )


@needs_pip
@pytest.mark.parametrize(
    "name", ["wheels/for_all-1.0-py3-none-any.whl", "project/README.md", "project/more.py", "targets", "PyTorch"]
)
def test_a_stick_that_was_changed_or_lacks_something_installs_nothing(project, tmp_path, monkeypatch, name):
    out, into = tmp_path / "stick", tmp_path / "into"
    monkeypatch.setattr(stick, "resolve", lambda target, *rest: setattr(target, "wheels", {WHEEL: "0" * 64}))
    monkeypatch.setattr(stick, "fetch", lambda target, pins, wheels, *rest: wheel(wheels, "for_all"))
    stick.make_stick(out, targets()[:1], "this", root=project)
    listed = out / "targets" / f"{targets()[0].name}.txt"
    listed.write_text(listed.read_text().replace("0" * 64, stick.digest(out / "wheels" / WHEEL)))
    if name == "PyTorch":
        manifest = json.loads((out / "manifest.json").read_text())
        manifest[0]["missing"] = ["PyTorch's CPU build"]
        (out / "manifest.json").write_text(json.dumps(manifest))
    stick.write_sums(out)
    if name == "targets":
        shutil.rmtree(out / name)
    elif name != "PyTorch":
        with open(out / name, "ab") as file:
            file.write(b"x")
    done = installed(out, into)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert name != "PyTorch" or "the stick lacks PyTorch" in done.stderr
    assert not into.exists()


@needs_pip
def test_a_file_that_the_lock_does_not_know_is_refused(project, tmp_path):
    lock = project / "requirements.lock"
    lock.write_text(lock.read_text().replace("--hash=sha256:", "--hash=sha256:0", 1)[:-1])
    with pytest.raises(stick.Refused):
        stick.make_stick(tmp_path / "stick", targets()[:1], "this", root=project)


def test_a_cuda_build_is_no_cpu_build(monkeypatch):
    """What PyTorch's own index can't give is named and not replaced by gigabytes of another build."""

    def found(target, lines, options):
        if options:
            raise stick.Refused("no index")
        place = {"url": "https://x/torch-2.13.0-cp312-cp312-any.whl", "archive_info": {"hashes": {"sha256": "0" * 64}}}
        needs = ["numpy", "nvidia-cudnn-cu13==9; platform_system == 'Linux' and platform_machine == 'x86_64'"]
        return [{"download_info": place, "metadata": {"requires_dist": needs}}]

    monkeypatch.setattr(stick, "asked", found)
    linux, mac = stick.parse_targets("linux-x86_64:3.12,macos-arm64:3.12")
    assert stick.resolve_torch(linux, "torch==2.13.0") == {} and "CPU build" in linux.missing[0]
    assert (
        stick.resolve_torch(mac, "torch==2.13.0") == {"torch-2.13.0-cp312-cp312-any.whl": "0" * 64} and not mac.missing
    )


@pytest.mark.only_slow
@needs_pip
@pytest.mark.skipif(not shutil.which("unshare") or os.geteuid() != 0, reason="the network is cut with unshare, as root")
def test_this_platform_s_stick_works_with_the_network_cut(tmp_path):
    out, into = tmp_path / "stick", tmp_path / "into"
    target = stick.make_stick(out, stick.parse_targets(f"{stick.this_platform()}:{PYTHON}"), "this")[0]
    if target.missing:
        pytest.skip(target.missing[0])
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PIP_") and key != "PYTHONPATH"}
    cut = ["unshare", "-n"]
    done = subprocess.run([*cut, "sh", out / "install.sh", into], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    clean["QLORA_CACHE"] = str(tmp_path / "cache")
    command = [*cut, into / ".venv/bin/python", into / "workshop/setup/preflight.py", "--json"]
    found = json.loads(subprocess.run(command, env=clean, capture_output=True, text=True, cwd=into).stdout)
    assert found["step"].get("layers") == 210 or found["step"] == {"too_slow": True}, found
    assert not [each for each in found["findings"] if each["what"] in ("packages", "model") and each["level"] != "ok"]
