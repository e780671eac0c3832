"""Reads what GPUs, processes, the machine and its disks are doing right now.

Readings come from NVML (nvidia-ml-py, imported as `pynvml`), psutil and the standard library. Both packages are imported at the
first reading, so that this module loads on a bare Python. It knows nothing of runs and models, and keeps no history.
"""

from __future__ import annotations

import importlib
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.units import gib

FIRST_CPU_READING_S = 0.1
SILENT_GPU = "does not answer"


@dataclass(frozen=True)
class GpuReading:
    """One GPU at one moment; None where the GPU or its driver does not report a value.

    Attributes:
        index: NVML's number of the GPU, which is also nvidia-smi's (CUDA_VISIBLE_DEVICES does not change it).
        name: the product's name.
        memory_used_gib, memory_total_gib: of all processes together, GiB.
        utilisation_percent: share of the last sampling period in which a kernel ran.
        temperature_c: degrees Celsius.
        power_w: watts.
        compute_capability: such as `(9, 0)`; decides which kernels run on it.
    """

    index: int
    name: str
    memory_used_gib: float | None = None
    memory_total_gib: float | None = None
    utilisation_percent: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    compute_capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class DriverReading:
    """The NVIDIA driver: its version, and the newest CUDA version that it supports, such as `(13, 0)`."""

    version: str
    cuda: tuple[int, int]


@dataclass(frozen=True)
class ProcessReading:
    """One process at one moment: resident memory in GiB, CPU in percent of one core, and number of threads."""

    rss_gib: float
    cpu_percent: float
    threads: int


@dataclass(frozen=True)
class MachineReading:
    """The machine at one moment: RAM in GiB, CPU in percent of all cores, and the cores that this process may use."""

    ram_total_gib: float
    ram_available_gib: float
    cpu_percent: float
    cores: int


@dataclass(frozen=True)
class DiskReading:
    """A file system at one moment, GiB."""

    total_gib: float
    free_gib: float


def read_gpus(nvml: Any = None) -> list[GpuReading]:
    """Reads all NVIDIA GPUs of the machine; an empty list if there is no GPU, no driver or no nvidia-ml-py.

    Args:
        nvml: is used in place of the module `pynvml`.
    """
    nvml = _started(nvml)
    if nvml is None:
        return []
    return [_read_gpu(nvml, index) for index in range(_ask(nvml, nvml.nvmlDeviceGetCount) or 0)]


def gpu_ids(nvml: Any = None) -> list[str]:
    """Returns the unique ids of all NVIDIA GPUs, in NVML's order; they stay the same when the machine restarts.

    Args:
        nvml: is used in place of the module `pynvml`.
    """
    nvml = _started(nvml)
    if nvml is None:
        return []
    ids = []
    for index in range(_ask(nvml, nvml.nvmlDeviceGetCount) or 0):
        handle = _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
        ids.append(handle is not None and _ask(nvml, nvml.nvmlDeviceGetUUID, handle) or f"GPU-{index}-of-this-machine")
    return ids


def used_shares(nvml: Any = None) -> dict[str, float]:
    """Returns the share of each GPU's memory that is in use by whichever process, by the GPU's unique id.

    Args:
        nvml: is used in place of the module `pynvml`.
    """
    found = zip(gpu_ids(nvml), read_gpus(nvml), strict=False)
    return {
        name: gpu.memory_used_gib / gpu.memory_total_gib
        for name, gpu in found
        if gpu.memory_used_gib is not None and gpu.memory_total_gib
    }


def pcie_generation(nvml: Any = None) -> int | None:
    """Returns the generation of PCI Express over which GPUs of this machine that have no NVLink reach each other.

    Args:
        nvml: is used in place of the module `pynvml`.

    Returns:
        3, 4 or 5; None where an NVLink is up, or the driver does not report it.
    """
    nvml = _started(nvml)
    handle = None if nvml is None else _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, 0)
    if handle is None:
        return None
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        if _ask(nvml, nvml.nvmlDeviceGetNvLinkState, handle, link) == nvml.NVML_FEATURE_ENABLED:
            return None
    generation: int | None = _ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle)
    return generation


def read_driver(nvml: Any = None) -> DriverReading | None:
    """Reads the NVIDIA driver's versions; None if there is no driver or no nvidia-ml-py.

    Args:
        nvml: is used in place of the module `pynvml`.
    """
    nvml = _started(nvml)
    if nvml is None:
        return None
    version, cuda = _ask(nvml, nvml.nvmlSystemGetDriverVersion), _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion)
    # NVML reports CUDA 13.0 as 13000 and CUDA 12.4 as 12040.
    return DriverReading(version or "unknown", divmod((cuda or 0) // 10, 100))


def read_process(pid: int | None = None) -> ProcessReading | None:
    """Reads memory and CPU of a process; None if it has ended.

    CPU is counted since the previous reading of the same process; the first reading watches it for a tenth of a second.

    Args:
        pid: the process's id; None takes this process.
    """
    import psutil

    pid = os.getpid() if pid is None else pid
    try:
        process = _processes.get(pid)
        first = process is None or not process.is_running()
        if process is None or first:
            process = _processes[pid] = psutil.Process(pid)
        cpu_percent = process.cpu_percent(FIRST_CPU_READING_S if first else None)
        return ProcessReading(gib(process.memory_info().rss), cpu_percent, process.num_threads())
    except psutil.Error:
        _processes.pop(pid, None)
        return None


def children_of(pid: int) -> list[int]:
    """Returns the ids of the processes that a process has started, in their order."""
    import psutil

    try:
        return sorted(each.pid for each in psutil.Process(pid).children())
    except psutil.Error:
        return []


def read_machine() -> MachineReading:
    """Reads RAM and CPU of the whole machine.

    CPU is counted since the previous reading in the same thread; the first reading watches it for a tenth of a second.
    """
    import psutil

    thread = threading.get_ident()
    cpu_percent = psutil.cpu_percent(None if thread in _threads_that_read else FIRST_CPU_READING_S)
    _threads_that_read.add(thread)
    memory = psutil.virtual_memory()
    return MachineReading(gib(memory.total), gib(memory.available), cpu_percent, cpu_cores())


def cpu_cores() -> int:
    """Counts the CPU cores that this process may use; a container or a scheduler may allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_disk(path: str | os.PathLike[str]) -> DiskReading:
    """Reads the space on the file system that holds a path, or would hold it if it existed."""
    folder = Path(path).expanduser().absolute()
    while not os.path.exists(folder):
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return DiskReading(gib(usage.total), gib(usage.free))


@dataclass(frozen=True)
class GpuTable(Tabular):
    """GPUs, one process and the machine, as in `nvidia-smi`; prints as text, shows as HTML in a notebook."""

    gpus: tuple[GpuReading, ...]
    process: ProcessReading | None
    machine: MachineReading

    def table(self) -> Table:
        """Returns a row for each GPU, one for the process and one for the machine."""
        rows = [
            [
                f"GPU {gpu.index} {gpu.name}",
                f"{_number(gpu.memory_used_gib, '.1f')} of {_number(gpu.memory_total_gib, '.1f')} GiB",
                *(
                    f"{_number(value)} {unit}"
                    for value, unit in ((gpu.utilisation_percent, "%"), (gpu.temperature_c, "°C"), (gpu.power_w, "W"))
                ),
            ]
            for gpu in self.gpus
        ]
        if self.process is None:
            rows.append(["process", "ended", "", "", ""])
        else:
            of_a_core = f"{self.process.cpu_percent:.0f} % of a core"
            rows.append(
                [f"process (threads: {self.process.threads})", f"{self.process.rss_gib:.2f} GiB", of_a_core, "", ""]
            )
        used_gib = self.machine.ram_total_gib - self.machine.ram_available_gib
        memory = f"{used_gib:.1f} of {self.machine.ram_total_gib:.1f} GiB"
        rows.append([f"machine (cores: {self.machine.cores})", memory, f"{self.machine.cpu_percent:.0f} %", "", ""])
        columns = 5 if self.gpus else 3
        header = ["device" if self.gpus else "no GPU", "memory", "busy", "temperature", "power"]
        return Table(header[:columns], [row[:columns] for row in rows], numbers=range(1, columns))


def gpu_table(pid: int | None = None, nvml: Any = None) -> GpuTable:
    """Reads GPUs, a process and the machine into one table; without a GPU, only the process and the machine.

    Args:
        pid: the process's id, such as the trainer's; None takes this process.
        nvml: is used in place of the module `pynvml`.
    """
    return GpuTable(tuple(read_gpus(nvml)), read_process(pid), read_machine())


# psutil counts CPU time from one reading to the next, and keeps the last reading in these objects and for these threads.
_processes: dict[int, Any] = {}
_threads_that_read: set[int] = set()


def _started(nvml: Any) -> Any:
    """Initialises NVML and returns it, or None. NVML counts initialisations and repeats cost nothing, so it is never shut down."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def _read_gpu(nvml: Any, index: int) -> GpuReading:
    handle = _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
    if handle is None:
        return GpuReading(index, SILENT_GPU)
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    utilisation = _ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    milliwatts = _ask(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
    return GpuReading(
        index,
        _ask(nvml, nvml.nvmlDeviceGetName, handle) or "unknown",
        memory_used_gib=None if memory is None else gib(memory.used),
        memory_total_gib=None if memory is None else gib(memory.total),
        utilisation_percent=None if utilisation is None else float(utilisation.gpu),
        temperature_c=_ask(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        power_w=None if milliwatts is None else milliwatts / 1000,
        compute_capability=_ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle),
    )


def _ask(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """Returns an answer of NVML, or None if the GPU has none: MIG slices have no utilisation, some GPUs no power reading."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None


def _number(value: float | None, form: str = ".0f") -> str:
    return "?" if value is None else format(value, form)
