"""GPU, process, machine and disk readings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import psutil
import pytest
from fake_nvml import FakeNvml, LostCard, NoDriver

from qlora_helpers.base.units import BYTES_IN_GIB, gib
from qlora_helpers.machine import telemetry
from qlora_helpers.machine.telemetry import (
    FIRST_CPU_READING_S,
    GpuReading,
    gpu_table,
    read_disk,
    read_driver,
    read_gpus,
    read_machine,
    read_process,
)


def test_the_stand_in_has_only_what_the_real_module_has():
    import pynvml

    names = [name for name in vars(FakeNvml) if name.startswith(("nvml", "NVML"))]
    assert len(names) == 17
    assert [name for name in names if not hasattr(pynvml, name)] == []


def test_gib_is_1024_cubed():
    assert BYTES_IN_GIB == 1_073_741_824
    assert gib(3 * 2**29) == 1.5


def test_gpus_in_their_units():
    first, second = read_gpus(FakeNvml())
    assert first == GpuReading(0, "NVIDIA A10G", 3.0, 24.0, 97.0, 61, 212.5, (8, 6))
    assert second == GpuReading(1, "NVIDIA <slice>", 3.0, 24.0, None, None, None, (8, 6))


def test_a_gpu_that_does_not_answer_is_shown_beside_the_others():
    first, second = read_gpus(LostCard())
    assert first.memory_total_gib == 24
    assert second == GpuReading(1, "does not answer")


def test_without_a_driver_there_is_no_gpu():
    assert read_gpus(NoDriver()) == []
    assert read_driver(NoDriver()) is None


def test_driver_and_the_newest_cuda_it_supports():
    driver = read_driver(FakeNvml())
    assert (driver.version, driver.cuda) == ("580.65.06", (12, 4))


def test_without_nvidia_ml_py_there_is_no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it now raises ImportError
    assert read_gpus() == []


def test_real_nvml_agrees_with_nvidia_smi():
    if shutil.which("nvidia-smi") is None:
        assert read_gpus() == []
        assert read_driver() is None
        return
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    lines = [line.split(", ") for line in subprocess.check_output(query, text=True).splitlines()]
    gpus = read_gpus()
    assert [gpu.name for gpu in gpus] == [line[0] for line in lines]
    for gpu, line in zip(gpus, lines, strict=True):
        assert gpu.memory_total_gib == pytest.approx(float(line[1]) / 1024, abs=0.01)
        assert 0 <= gpu.memory_used_gib < gpu.memory_total_gib
        assert 0 < gpu.temperature_c < 120
    assert read_driver().version == lines[0][2]


def test_own_process_memory_grows_by_what_it_takes():
    """In a process of its own: here memory that earlier tests gave back would be taken again."""
    program = (
        "from qlora_helpers.machine.telemetry import read_process\n"
        "before = read_process(); ballast = b'x' * (64 * 2**20); after = read_process()\n"
        "print(after.rss_gib - before.rss_gib, after.threads)"
    )
    grown, threads = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(grown) == pytest.approx(1 / 16, rel=0.1)
    assert int(threads) >= 1


def test_cpu_is_counted_from_one_reading_to_the_next(monkeypatch):
    """The first reading of a process waits for a moment, so that it says something; later ones count since the one before."""
    waited = []
    monkeypatch.setattr(psutil.Process, "cpu_percent", lambda process, interval: waited.append(interval) or 42.0)
    monkeypatch.setattr(telemetry, "_processes", {})
    running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with running:
        assert [read_process(running.pid).cpu_percent for _ in range(3)] == [42.0] * 3
        assert read_process().cpu_percent == 42.0
        running.communicate(b"\n")
    assert waited == [FIRST_CPU_READING_S, None, None, FIRST_CPU_READING_S]
    assert read_process(running.pid) is None
    assert list(telemetry._processes) == [os.getpid()], "a process that has ended is forgotten"


def test_machine():
    machine = read_machine()
    assert 0 < machine.ram_available_gib < machine.ram_total_gib
    assert 0 <= machine.cpu_percent <= 100
    if hasattr(os, "sched_getaffinity"):
        one_core = [sys.executable, "-c", "import os\nfrom qlora_helpers.machine.telemetry import cpu_cores\n"]
        one_core[-1] += "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nprint(cpu_cores())"
        assert subprocess.check_output(one_core, text=True).strip() == "1"


def test_disk_of_a_folder_that_does_not_exist_yet(tmp_path):
    disk = read_disk(tmp_path / "not" / "yet")
    assert disk.total_gib == pytest.approx(gib(shutil.disk_usage(tmp_path).total))
    assert 0 < disk.free_gib <= disk.total_gib


def test_table_with_gpus():
    table = gpu_table(nvml=FakeNvml())
    lines = repr(table).splitlines()
    assert len({len(lines[0]), len(lines[1]), len(lines[2])}) == 1
    assert lines[0].split() == ["device", "memory", "busy", "temperature", "power"]
    assert lines[2].split("  ")[0] == "GPU 0 NVIDIA A10G"
    assert all(text in lines[2] for text in ("3.0 of 24.0 GiB", "97 %", "61 °C", "212 W"))
    assert "? °C" in lines[3]
    html = table._repr_html_()
    assert "NVIDIA &lt;slice&gt;" in html
    assert "<slice>" not in html


def test_table_without_gpu_shows_the_process_and_the_machine():
    text = repr(gpu_table(nvml=NoDriver()))
    assert text.startswith("no GPU")
    assert "temperature" not in text
    rss_gib = float(text.splitlines()[2].split(")")[1].split()[0])
    assert rss_gib == pytest.approx(read_process().rss_gib, abs=0.02)
    assert "% of a core" in text
    assert text.splitlines()[3].startswith("machine (cores: ")


def test_table_of_a_process_that_has_ended():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    row = repr(gpu_table(ended.pid, nvml=NoDriver())).splitlines()[2]
    assert row.split() == ["process", "ended"]


def test_loads_on_a_bare_python():
    code = "import sys, qlora_helpers.machine.telemetry; print([n for n in ('psutil', 'pynvml', 'torch') if n in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_cards_without_an_nvlink_reach_each_other_over_pci_express():
    joined = FakeNvml()
    joined.nvlinks = 12
    assert [telemetry.pcie_generation(nvml) for nvml in (FakeNvml(), joined, NoDriver())] == [5, None, None]
