"""The setup report: whether this machine is ready, and if not, how to fix it.

It checks Python, the pinned packages, GPUs and driver, the CUDA builds of torch and bitsandbytes, disk, RAM, CPU and the
notebook frontend. It reads files and sensors, imports neither torch nor bitsandbytes, and loads on a bare Python, so that
notebook 00 can call it before anything is installed. Because notebooks store the report, it names no path, host or user.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.units import gib
from qlora_helpers.machine.cuda_libraries import TorchBuild, package_folder, read_torch_build
from qlora_helpers.machine.gpu_kernels import built_for, cards_without_kernels
from qlora_helpers.machine.telemetry import (
    SILENT_GPU,
    DriverReading,
    GpuReading,
    cpu_cores,
    read_disk,
    read_driver,
    read_gpus,
)
from qlora_helpers.machine.workspace import model_cache_dir, sagemaker_app

LEVELS = ("ok", "warning", "failure")
OLDEST_PYTHON = (3, 11)
INSTALL = "pip install -r requirements.txt"
# Disk space for a download and its conversion: SmolLM2-135M, and Falcon-40B's 41.4 billion parameters of two bytes.
DEMO_DISK_GIB = 2
FALCON_40B_DISK_GIB = 85
SMALL_RAM_GIB = 4


@dataclass(frozen=True)
class Check:
    """One line of the report: what was checked, its level (`ok`, `warning`, `failure`), what was found, and how to fix it."""

    name: str
    level: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class MachineReport(Tabular):
    """The setup report; prints as text, shows as a table in a notebook."""

    checks: tuple[Check, ...]

    @property
    def level(self) -> str:
        """The worst level of all lines."""
        return max((check.level for check in self.checks), key=LEVELS.index, default="ok")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON: the worst level and every line."""
        return {"level": self.level, "checks": [dataclasses.asdict(check) for check in self.checks]}

    @property
    def _summary(self) -> str:
        counts = Counter(check.level for check in self.checks)
        return "Setup: " + ", ".join(f"{counts[level]} {level}" for level in LEVELS)

    def __repr__(self) -> str:
        """Returns the checks as lines; a fix is too long for a column of a terminal and follows on a line of its own."""
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [self._summary]
        for check in self.checks:
            lines.append(f"{check.level:<7}  {check.name:<{width}}  {check.found}")
            lines += [f"{'':7}  {'':{width}}  -> {check.fix}"] if check.fix else []
        return "\n".join(lines)

    def table(self) -> Table:
        """Returns a row for each check: its level, what was looked at, what was found and what to do."""
        rows = [[check.level, check.name, check.found, check.fix] for check in self.checks]
        return Table(["", "what", "found", "what to do"], rows, caption=self._summary)


def check_machine(cache_dir: str | os.PathLike[str] | None = None, *, nvml: Any = None) -> MachineReport:
    """Checks the machine, which takes well under a second, on one with a GPU as long as importing PyTorch, and changes nothing.

    Args:
        cache_dir: the folder into which models are downloaded; None takes huggingface_hub's (HF_HOME, HF_HUB_CACHE).
        nvml: is used in place of the module `pynvml`.
    """
    importlib.invalidate_caches()  # this very process may have installed packages a moment ago
    gpus, driver, torch = read_gpus(nvml), read_driver(nvml), read_torch_build()
    return MachineReport(
        (
            _python_check(sys.version_info[:3]),
            *_package_checks(_pins(_requirements())),
            _gpu_check(gpus, has_device=any(Path("/dev").glob("nvidia[0-9]*"))),
            *([_driver_check(driver, torch)] if driver else []),
            _torch_check(torch, has_gpu=bool(gpus)),
            *([_kernels_check(gpus, built_for())] if gpus and torch and torch.cuda else []),
            _bitsandbytes_check(package_folder("bitsandbytes"), torch, os.environ),
            _disk_check(model_cache_dir() if cache_dir is None else cache_dir, has_gpu=bool(gpus)),
            _ram_check(_ram_gib()),
            Check("CPU cores", "ok", str(cpu_cores())),
            _notebook_check(),
            Check("SageMaker", "ok", sagemaker_app() or "not on SageMaker"),
        )
    )


def missing_requirements() -> list[str]:
    """Lists, for pip, what `requirements.txt` asks for and this Python lacks or has in another version.

    This package is among them if it is not installed and only found in the folder of the checkout.
    """
    importlib.invalidate_caches()
    pins = _pins(_requirements())
    missing = [
        f"{name}=={pin}" if pin else name
        for name, pin in pins.items()
        if _package_check(name, pin, _version(name)).level != "ok"
    ]
    root = Path(__file__).resolve().parents[2]
    # A build leaves the package's metadata in the checkout, so metadata found there proves nothing.
    elsewhere = [path for path in sys.path if Path(path).resolve() != root]
    installed = any(importlib.metadata.distributions(name="qlora_helpers", path=elsewhere))
    if (root / "pyproject.toml").is_file() and not installed:
        missing.append("qlora_helpers")
    return missing


def _python_check(version: tuple[int, int, int]) -> Check:
    found = ".".join(map(str, version))
    if version[:2] >= OLDEST_PYTHON:
        return Check("Python", "ok", found)
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return Check("Python", "failure", found, f"Use Python {oldest} or newer, in an environment of its own.")


def _requirements() -> list[str]:
    """Reads the project's requirements: the file beside the package in a checkout, else the installed package's metadata."""
    file = Path(__file__).resolve().parents[2] / "requirements.txt"
    if file.is_file():
        return file.read_text(encoding="utf-8").splitlines()
    try:
        return importlib.metadata.requires("qlora_helpers") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _pins(requirements: Iterable[str]) -> dict[str, str | None]:
    """Returns name and pinned version (None: any) of each requirement that applies to this machine.

    It skips pip's options, extras, and lines with an environment marker whose package is missing (they may not apply).
    """
    pins = {}
    for line in requirements:
        text, _, marker = line.split(" #")[0].partition(";")
        match = re.match(r"\s*([A-Za-z0-9][\w.-]*)\s*(?:\[[^\]]*\])?\s*(?:==\s*([^\s,]+)\s*$)?", text)
        if match and "extra" not in marker and (not marker.strip() or _version(match[1])):
            pins[match[1]] = match[2]
    return pins


def _package_checks(pins: Mapping[str, str | None]) -> list[Check]:
    if not pins:
        return [Check("packages", "failure", "no list of requirements", "Work in a checkout of the repository.")]
    return [_package_check(name, pin, _version(name)) for name, pin in pins.items()]


def _package_check(name: str, pin: str | None, found: str | None) -> Check:
    if found is None:
        return Check(name, "failure", "not installed", INSTALL)
    # A local label such as +cpu or +cu130 is a build of the same version.
    if pin is None or found == pin or found.split("+")[0] == pin:
        return Check(name, "ok", found)
    return Check(name, "warning", f"{found}, tested with {pin}", INSTALL)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu_check(gpus: list[GpuReading], *, has_device: bool) -> Check:
    if gpus:
        kinds = Counter((gpu.name, gpu.memory_total_gib) for gpu in gpus)
        parts = [
            f"{count} x {name}" + (f", {memory_gib:.1f} GiB" if memory_gib else "")
            for (name, memory_gib), count in kinds.items()
        ]
        silent = any(gpu.name == SILENT_GPU for gpu in gpus)
        fix = "A GPU has stopped responding: stop the instance and start it again." if silent else ""
        return Check("GPU", "failure" if silent else "ok", "; ".join(parts), fix)
    if has_device:
        fix = f"{INSTALL}; if nvidia-smi fails too, restart the machine (its driver may have been updated)."
        return Check("GPU", "warning", "an NVIDIA GPU that does not answer", fix)
    return Check("GPU", "ok", "no GPU; the demo and tiny profiles run on a CPU")


def _driver_check(driver: DriverReading, torch: TorchBuild | None) -> Check:
    found = f"{driver.version}, supports CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"
    # Within a major version a newer CUDA runs on an older driver (NVIDIA's minor version compatibility).
    if torch is None or torch.cuda_major is None or torch.cuda_major <= driver.cuda[0]:
        return Check("NVIDIA driver", "ok", found)
    fix = f"Update the driver, or install PyTorch for CUDA {driver.cuda[0]} from its own package index."
    return Check("NVIDIA driver", "failure", f"{found}; PyTorch is built for {torch.cuda}", fix)


def _torch_check(torch: TorchBuild | None, *, has_gpu: bool) -> Check:
    if torch is None:
        return Check("PyTorch build", "failure", "not installed", INSTALL)
    if torch.cuda is None and has_gpu:
        fix = f"pip uninstall torch, then {INSTALL}: PyPI's build uses the GPU."
        return Check("PyTorch build", "failure", "CPU only, so the GPU would stay idle", fix)
    return Check("PyTorch build", "ok", f"CUDA {torch.cuda}" if torch.cuda else "CPU only")


def _kernels_check(gpus: list[GpuReading], architectures: tuple[str, ...] | None) -> Check:
    name = "PyTorch kernels"
    if architectures is None:
        return Check(name, "warning", "PyTorch does not say for which GPUs it was built", INSTALL)
    unusable = cards_without_kernels(gpus, architectures)
    if not unusable:
        return Check(name, "ok", "for this GPU" if len(gpus) == 1 else "for all GPUs")
    major, minor = unusable[0].compute_capability or (0, 0)
    found = f"none for {unusable[0].name} (compute capability {major}.{minor}), but for {' '.join(architectures)}"
    fix = "Install a build of PyTorch that has them: for an older card from the package index of an earlier CUDA"
    return Check(name, "failure", found, f"{fix} (pytorch.org/get-started), for a newer one a newer PyTorch.")


def _bitsandbytes_check(folder: Path | None, torch: TorchBuild | None, environ: Mapping[str, str]) -> Check:
    """Checks which of its binaries bitsandbytes would load, by the rules of `bitsandbytes/cextension.py`."""
    name = "bitsandbytes binary"
    if folder is None or torch is None:
        missing = "bitsandbytes" if folder is None else "PyTorch"
        return Check(name, "failure", f"{missing} is not installed", INSTALL)
    if torch.cuda is None:
        if any(folder.glob("libbitsandbytes_cpu.*")):
            return Check(name, "ok", "CPU")
        return Check(name, "failure", "no CPU binary", f"pip uninstall bitsandbytes, then {INSTALL}")
    names = [re.fullmatch(r"libbitsandbytes_cuda(\d\d)(\d+)\.(so|dll)", path.name) for path in folder.iterdir()]
    built = sorted((int(match[1]), int(match[2])) for match in names if match)
    choices = f"It has CUDA {', '.join(f'{major}.{minor}' for major, minor in built) or 'none'}"
    wanted = tuple(int(part) for part in torch.cuda.split(".")[:2])
    override = environ.get("BNB_CUDA_VERSION")
    if override is not None:
        return _override_check(name, override, built, wanted, choices)
    same_major = [version for version in built if version[0] == wanted[0]]
    if not same_major:
        fix = f"{choices}: install a PyTorch for one of these, or another bitsandbytes."
        return Check(name, "failure", f"none for PyTorch's CUDA {torch.cuda}", fix)
    older = [version for version in same_major if version <= wanted]
    chosen = max(older) if older else min(same_major)
    found = f"CUDA {chosen[0]}.{chosen[1]} for PyTorch's CUDA {torch.cuda}"
    if chosen == wanted:
        return Check(name, "ok", found)
    fix = f"This works within one major version; BNB_CUDA_VERSION={chosen[0]}{chosen[1]} selects it explicitly."
    return Check(name, "warning", found, fix)


def _override_check(
    name: str, override: str, built: list[tuple[int, int]], wanted: tuple[int, ...], choices: str
) -> Check:
    found = f"BNB_CUDA_VERSION={override}"
    if not re.fullmatch(r"\d{3,}", override):
        return Check(name, "failure", found, "Set it to digits, such as 130 for CUDA 13.0, or unset it.")
    chosen = (int(override[:2]), int(override[2:]))
    if chosen not in built:
        return Check(
            name, "failure", f"{found}, which is not installed", f"{choices}: choose one of these, or unset it."
        )
    if chosen[0] != wanted[0]:
        fix = f"PyTorch only contains the libraries of CUDA {wanted[0]}: unset BNB_CUDA_VERSION."
        return Check(name, "failure", f"{found}, PyTorch has {'.'.join(map(str, wanted))}", fix)
    return Check(name, "ok", f"CUDA {chosen[0]}.{chosen[1]}, chosen by BNB_CUDA_VERSION")


def _disk_check(cache_dir: str | os.PathLike[str], *, has_gpu: bool) -> Check:
    free_gib = read_disk(cache_dir).free_gib
    found = f"{free_gib:.1f} GiB free where the model cache is"
    if free_gib < DEMO_DISK_GIB:
        fix = f"The demo needs {DEMO_DISK_GIB} GiB: free some (notebook 08), or set HF_HOME on a larger disk."
        return Check("disk", "failure", found, fix)
    if has_gpu and free_gib < FALCON_40B_DISK_GIB:
        fix = f"Falcon-40B needs {FALCON_40B_DISK_GIB} GiB: enlarge the volume, or set HF_HOME on a larger one."
        return Check("disk", "warning", found, fix)
    return Check("disk", "ok", found)


def _ram_gib() -> float | None:
    """Returns the machine's memory, GiB; None if the system does not report it. psutil may not be installed yet."""
    try:
        return gib(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return None


def _ram_check(ram_gib: float | None) -> Check:
    if ram_gib is None:
        return Check("RAM", "ok", f"not reported by {platform.system()}")
    if ram_gib < SMALL_RAM_GIB:
        return Check(
            "RAM", "warning", f"{ram_gib:.1f} GiB", "Enough for the tiny profile; the demo may run out of memory."
        )
    return Check("RAM", "ok", f"{ram_gib:.1f} GiB")


def _notebook_check() -> Check:
    versions = {name: _version(name) for name in ("jupyterlab", "ipykernel", "ipywidgets")}
    in_kernel = "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")
    # In a kernel there is a server already, possibly in another environment.
    missing = [name for name, version in versions.items() if not version and not (in_kernel and name == "jupyterlab")]
    parts = [f"{name} {version}" for name, version in versions.items() if version]
    parts.append("running in a kernel" if in_kernel else "not running in a kernel")
    if missing:
        return Check("notebook", "warning", ", ".join(parts), f"Missing: {', '.join(missing)}. {INSTALL}")
    return Check("notebook", "ok", ", ".join(parts))


def versions() -> dict[str, str]:
    """Returns the versions of the packages that a result depends on."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
    return {name: importlib.metadata.version(name) for name in names}
