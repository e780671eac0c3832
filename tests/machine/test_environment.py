"""The setup report: each line's levels on stand-ins, the whole on this machine, and that it gives nothing away."""

from __future__ import annotations

import getpass
import importlib.metadata
import inspect
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fake_nvml import FakeNvml, NoDriver

from qlora_helpers.machine import environment, telemetry
from qlora_helpers.machine.cuda_libraries import TorchBuild
from qlora_helpers.machine.environment import (
    Check,
    MachineReport,
    _bitsandbytes_check,
    _disk_check,
    _driver_check,
    _gpu_check,
    _kernels_check,
    _package_check,
    _pins,
    _python_check,
    _ram_check,
    _torch_check,
    check_machine,
    missing_requirements,
)
from qlora_helpers.machine.gpu_kernels import built_for
from qlora_helpers.machine.telemetry import SILENT_GPU, DiskReading, DriverReading, GpuReading

ROOT = Path(environment.__file__).resolve().parents[2]
CPU_TORCH = TorchBuild("2.13.0+cpu", None, Path("torch"))


def cuda_torch(version):
    return TorchBuild("2.13.0", version, Path("torch"))


def lines(report):
    return {check.name: check for check in report.checks}


# the report as a whole


def test_this_machine():
    report = check_machine(nvml=NoDriver())
    checks = lines(report)
    assert len(checks) == len(report.checks), "two lines of one name"
    assert checks["Python"].found == ".".join(map(str, sys.version_info[:3]))
    for package in ("torch", "transformers", "bitsandbytes", "psutil"):
        assert checks[package].level != "failure"
        assert checks[package].found.startswith(importlib.metadata.version(package))
    assert checks["bitsandbytes binary"].level != "failure"
    assert {"disk", "RAM", "CPU cores", "notebook", "SageMaker"} <= set(checks)
    assert checks["RAM"].found == f"{telemetry.read_machine().ram_total_gib:.1f} GiB"
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        assert checks["GPU"] == Check("GPU", "ok", "no GPU; the demo and tiny profiles run on a CPU")


def test_gpus_and_driver_are_shown():
    checks = lines(check_machine(nvml=FakeNvml()))
    assert checks["GPU"].found == "1 x NVIDIA A10G, 24.0 GiB; 1 x NVIDIA <slice>, 24.0 GiB"
    assert checks["NVIDIA driver"].found.startswith("580.65.06, supports CUDA up to 12.4")


def test_the_report_names_no_path_host_or_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "jane-doe" / "hf"))
    monkeypatch.setattr(environment, "read_disk", lambda path: DiskReading(1.0, 0.5))  # a failure, with its mend
    report = check_machine(nvml=FakeNvml())
    assert report.level == "failure"
    for text in (repr(report), json.dumps(report.to_dict()), report._repr_html_()):
        words = set(re.findall(r"[\w.-]+", text))
        assert words.isdisjoint({"jane-doe", "hf", socket.gethostname(), getpass.getuser()})
        assert not re.search(r"(?<![\w<])/\w+", text), "a path"


def test_disk_is_that_of_the_model_cache(tmp_path, monkeypatch):
    asked = []

    def reading(path):
        asked.append(Path(path))
        return DiskReading(100.0, 50.0)

    monkeypatch.setattr(environment, "read_disk", reading)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    check_machine(nvml=NoDriver())
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    check_machine(nvml=NoDriver())
    check_machine(tmp_path / "given", nvml=NoDriver())
    assert asked == [tmp_path / "hub", tmp_path / "elsewhere", tmp_path / "given"]


REPORT = MachineReport(
    (Check("Python", "ok", "3.11.7"), Check("a longer name", "warning", "<old> & odd", "Do <this>."))
)


def test_report_as_text():
    assert repr(REPORT).splitlines() == [
        "Setup: 1 ok, 1 warning, 0 failure",
        "ok       Python         3.11.7",
        "warning  a longer name  <old> & odd",
        "                        -> Do <this>.",
    ]


def test_report_as_html_is_escaped_and_marks_levels():
    html = REPORT._repr_html_()
    assert "&lt;old&gt; &amp; odd" in html
    assert "Do &lt;this&gt;." in html
    assert "<old>" not in html
    assert "<this>" not in html
    assert html.count("background:#") == 2
    # No colours of its own for text and ground: they have to be the theme's.
    assert "color:inherit;background:transparent" in html


def test_report_as_json():
    plain = json.loads(json.dumps(REPORT.to_dict()))
    assert plain["level"] == "warning"
    assert plain["checks"][1] == {
        "name": "a longer name",
        "level": "warning",
        "found": "<old> & odd",
        "fix": "Do <this>.",
    }


def test_level_is_the_worst():
    levels = [("ok", "failure", "warning"), ("ok", "warning"), ("ok",), ()]
    reports = [MachineReport(tuple(Check("x", level, "") for level in these)) for these in levels]
    assert [report.level for report in reports] == ["failure", "warning", "ok", "ok"]


def test_works_on_a_bare_python_and_says_what_to_install():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "import qlora_helpers.machine.cuda_libraries, qlora_helpers.machine.workspace\n"
    code += "from qlora_helpers.machine.environment import check_machine\nimport json\n"
    code += "print(json.dumps(check_machine().to_dict()))"
    # -S leaves site-packages out, so nothing but the standard library is there
    plain = json.loads(subprocess.check_output([sys.executable, "-S", "-E", "-c", code], text=True))
    checks = {check["name"]: check for check in plain["checks"]}
    assert plain["level"] == "failure"
    assert checks["torch"] == {
        "name": "torch",
        "level": "failure",
        "found": "not installed",
        "fix": "pip install -r requirements.txt",
    }
    assert checks["bitsandbytes binary"]["found"] == "bitsandbytes is not installed"
    assert checks["notebook"]["level"] == "warning"
    assert checks["RAM"]["level"] in ("ok", "warning")


def test_imports_neither_torch_nor_bitsandbytes():
    code = "import sys\nfrom qlora_helpers.machine.environment import check_machine\nrepr(check_machine())\n"
    code += "print([name for name in ('torch', 'bitsandbytes', 'transformers', 'numpy') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


def test_the_report_says_that_it_runs_in_a_kernel():
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", startup_timeout=60, cwd=str(ROOT))
    try:
        told = []
        code = "from qlora_helpers.machine.environment import check_machine\ncheck_machine()"
        client.execute_interactive(code, timeout=60, output_hook=lambda message: told.append(message["content"]))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    (data,) = [content["data"] for content in told if "data" in content]
    assert ", running in a kernel" in data["text/plain"]
    assert "<table" in data["text/html"]
    assert "not running in a kernel" in lines(check_machine(nvml=NoDriver()))["notebook"].found


# the lines one by one


@pytest.mark.parametrize(
    ("version", "level"), [((3, 11, 0), "ok"), ((3, 14, 1), "ok"), ((3, 10, 14), "failure"), ((2, 12, 0), "failure")]
)
def test_python(version, level):
    assert _python_check(version).level == level


def test_pins_of_a_requirements_file():
    text = """
    # a comment
    --extra-index-url https://example.org/simple
    torch==2.13.0
    ruamel.yaml[jinja2] == 0.18  # why
    rouge-score
    tqdm>=4.60,<5
    pytest==9.2.0; extra == "test"
    pywin32==311; sys_platform == "win32"
    psutil==7.2.2 ; python_version >= "3.11"
    """
    assert _pins(text.splitlines()) == {
        "torch": "2.13.0",
        "ruamel.yaml": "0.18",
        "rouge-score": None,
        "tqdm": None,
        "psutil": "7.2.2",
    }


def test_every_line_of_our_requirements_is_checked():
    text = (ROOT / "requirements.txt").read_text()
    pinned = {line.split("==")[0] for line in text.splitlines() if "==" in line}
    assert len(pinned) >= 15
    assert pinned <= set(lines(check_machine(nvml=NoDriver())))


def test_no_list_of_requirements_is_a_failure(monkeypatch):
    monkeypatch.setattr(environment, "_requirements", lambda: [])
    assert lines(check_machine(nvml=NoDriver()))["packages"].level == "failure"


@pytest.mark.parametrize(
    ("pin", "found", "level", "text"),
    [
        ("2.13.0", "2.13.0", "ok", "2.13.0"),
        ("2.13.0", "2.13.0+cu130", "ok", "2.13.0+cu130"),
        (None, "1.0", "ok", "1.0"),
        ("2.13.0", "2.11.0", "warning", "2.11.0, tested with 2.13.0"),
        ("2.13.0", None, "failure", "not installed"),
    ],
)
def test_package(pin, found, level, text):
    check = _package_check("torch", pin, found)
    assert (check.level, check.found) == (level, text)
    assert bool(check.fix) == (level != "ok")


def test_gpus():
    cards = [GpuReading(index, "NVIDIA L4", 0.1, 22.5) for index in range(4)]
    assert _gpu_check(cards, has_device=True) == Check("GPU", "ok", "4 x NVIDIA L4, 22.5 GiB")
    lost = _gpu_check([*cards, GpuReading(4, SILENT_GPU)], has_device=True)
    assert (lost.level, lost.found) == ("failure", "4 x NVIDIA L4, 22.5 GiB; 1 x does not answer")
    assert _gpu_check([], has_device=True).level == "warning"
    assert _gpu_check([], has_device=False).level == "ok"


@pytest.mark.parametrize(
    ("driver", "torch", "level"),
    [
        ((13, 0), "13.0", "ok"),
        ((13, 0), "12.8", "ok"),
        ((12, 4), "12.8", "ok"),
        ((12, 4), "13.0", "failure"),
        ((12, 4), None, "ok"),
    ],
)
def test_the_driver_must_support_torchs_cuda(driver, torch, level):
    check = _driver_check(DriverReading("550.1", driver), cuda_torch(torch))
    assert check.level == level
    assert ("PyTorch is built for 13.0" in check.found) == (level == "failure")


CUDA_126 = "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90"
CUDA_128 = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"
CUDA_130 = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120"


@pytest.mark.parametrize(
    ("card", "capability", "built", "level"),
    [
        ("Tesla V100-SXM2-16GB", (7, 0), CUDA_130, "failure"),
        ("Tesla V100-SXM2-16GB", (7, 0), CUDA_126, "ok"),
        ("Tesla P100-PCIE-16GB", (6, 0), CUDA_128, "failure"),
        ("NVIDIA GeForce GTX 1080", (6, 1), CUDA_130, "failure"),
        ("NVIDIA GeForce GTX 1080", (6, 1), CUDA_126, "ok"),
        ("Tesla K80", (3, 7), CUDA_130, "failure"),
        ("NVIDIA GeForce RTX 5090", (12, 0), CUDA_126, "failure"),
        ("NVIDIA GeForce RTX 5090", (12, 0), CUDA_128, "ok"),
        ("NVIDIA L4", (8, 9), CUDA_130, "ok"),  # by the kernels for 8.6
        ("NVIDIA H200", (9, 0), CUDA_130, "ok"),
        ("a later card", (13, 0), CUDA_128, "failure"),
        ("a later card", (13, 0), CUDA_130, "ok"),  # the driver compiles for it
        ("a later card", (10, 3), "sm_100a", "failure"),
        ("a card that does not say", None, CUDA_130, "ok"),
    ],
)
def test_pytorch_must_have_kernels_for_the_gpus(card, capability, built, level):
    """Everything else is well on such a machine, and the first operation on the GPU fails."""
    check = _kernels_check([GpuReading(0, card, compute_capability=capability)], tuple(built.split()))
    assert check.level == level
    assert level == "ok" or f"none for {card} (compute capability {capability[0]}.{capability[1]})" in check.found


def test_pytorch_is_asked_for_its_kernels(monkeypatch):
    """In another process, with what `torch.cuda.get_arch_list` reads; a CPU build has none."""
    import torch

    assert built_for() is None
    assert "_cuda_getArchFlags" in inspect.getsource(torch.cuda.get_arch_list)
    assert _kernels_check([GpuReading(0, "NVIDIA L4", compute_capability=(8, 9))], None).level == "warning"


def test_torch_build():
    assert _torch_check(CPU_TORCH, has_gpu=False) == Check("PyTorch build", "ok", "CPU only")
    assert _torch_check(CPU_TORCH, has_gpu=True).level == "failure"
    assert _torch_check(cuda_torch("13.0"), has_gpu=True) == Check("PyTorch build", "ok", "CUDA 13.0")
    assert _torch_check(None, has_gpu=False).level == "failure"


@pytest.fixture
def bitsandbytes_folder(tmp_path):
    for name in ("cpu", "cuda118", "cuda121", "cuda128", "cuda130", "rocm72"):
        (tmp_path / f"libbitsandbytes_{name}.so").touch()
    (tmp_path / "__init__.py").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("torch", "override", "level", "found"),
    [
        (None, None, "ok", "CPU"),
        (None, "128", "ok", "CPU"),
        ("13.0", None, "ok", "CUDA 13.0 for PyTorch's CUDA 13.0"),
        ("12.9", None, "warning", "CUDA 12.8 for PyTorch's CUDA 12.9"),
        ("12.6", None, "warning", "CUDA 12.1 for PyTorch's CUDA 12.6"),
        ("12.0", None, "warning", "CUDA 12.1 for PyTorch's CUDA 12.0"),
        ("14.1", None, "failure", "none for PyTorch's CUDA 14.1"),
        ("12.8", "121", "ok", "CUDA 12.1, chosen by BNB_CUDA_VERSION"),
        ("12.8", "126", "failure", "BNB_CUDA_VERSION=126, which is not installed"),
        ("12.8", "130", "failure", "BNB_CUDA_VERSION=130, PyTorch has 12.8"),
        ("12.8", "12.1", "failure", "BNB_CUDA_VERSION=12.1"),
    ],
)
def test_bitsandbytes_binary(bitsandbytes_folder, torch, override, level, found):
    environ = {} if override is None else {"BNB_CUDA_VERSION": override}
    check = _bitsandbytes_check(bitsandbytes_folder, cuda_torch(torch), environ)
    assert (check.level, check.found) == (level, found)
    assert bool(check.fix) == (level != "ok")


def test_bitsandbytes_itself_would_take_the_same_binary():
    code = """
from qlora_helpers.machine.environment import _bitsandbytes_check
from qlora_helpers.machine.cuda_libraries import TorchBuild, package_folder
from bitsandbytes.cextension import get_cuda_bnb_library_path
from bitsandbytes.cuda_specs import CUDASpecs
for version in ((11, 8), (12, 0), (12, 6), (12, 9), (13, 0), (13, 9)):
    torch = TorchBuild("2.13.0", "{}.{}".format(*version), None)
    ours = _bitsandbytes_check(package_folder("bitsandbytes"), torch, {}).found.split()[1].replace(".", "")
    theirs = get_cuda_bnb_library_path(CUDASpecs((8, 0), "{}{}".format(*version), version)).stem
    print(version, theirs.removeprefix("libbitsandbytes_cuda") == ours, theirs, ours)
"""
    environ = {key: value for key, value in os.environ.items() if key != "BNB_CUDA_VERSION"}
    told = subprocess.check_output(
        [sys.executable, "-c", code], text=True, cwd=ROOT, env=environ, stderr=subprocess.DEVNULL
    )
    assert told.count("True") == 6, told


def test_bitsandbytes_missing_or_without_its_cpu_binary(tmp_path):
    assert _bitsandbytes_check(None, CPU_TORCH, {}).found == "bitsandbytes is not installed"
    assert _bitsandbytes_check(tmp_path, None, {}).found == "PyTorch is not installed"
    assert _bitsandbytes_check(tmp_path, CPU_TORCH, {}).level == "failure"


@pytest.mark.parametrize(
    ("free_gib", "has_gpu", "level"),
    [(1.9, False, "failure"), (2.5, False, "ok"), (1.9, True, "failure"), (50.0, True, "warning"), (90.0, True, "ok")],
)
def test_disk(monkeypatch, free_gib, has_gpu, level):
    monkeypatch.setattr(environment, "read_disk", lambda path: DiskReading(100.0, free_gib))
    check = _disk_check("anywhere", has_gpu=has_gpu)
    assert (check.level, check.found) == (level, f"{free_gib:.1f} GiB free where the model cache is")
    assert bool(check.fix) == (level != "ok")


@pytest.mark.parametrize(("ram_gib", "level"), [(3.8, "warning"), (7.7, "ok"), (None, "ok")])
def test_ram(ram_gib, level):
    assert _ram_check(ram_gib).level == level


# what the first notebook installs


def test_missing_requirements_are_named_as_pip_takes_them(monkeypatch):
    found = {"here": "1.0+cpu", "old": "1.0"}
    monkeypatch.setattr(environment, "_requirements", lambda: ["here==1.0", "old==2.0", "absent==3.0", "any-version"])
    monkeypatch.setattr(environment, "_version", found.get)
    assert [name for name in missing_requirements() if name != "qlora_helpers"] == [
        "old==2.0",
        "absent==3.0",
        "any-version",
    ]


def test_a_checkout_that_is_only_on_the_path_is_not_installed(tmp_path):
    code = "from qlora_helpers.machine.environment import missing_requirements; print(missing_requirements())"
    bare = [sys.executable, "-S", "-c", code]  # a Python without site-packages
    told = subprocess.check_output(bare, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "'torch==" in told
    assert told.strip().endswith("'qlora_helpers']")
