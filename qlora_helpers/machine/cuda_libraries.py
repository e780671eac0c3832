"""Finds the CUDA libraries of the installed PyTorch and makes bitsandbytes find them too.

bitsandbytes' CUDA binary asks the dynamic loader for `libcudart.so` and `libcublas.so` by name, and PyTorch's own copies are in
folders where the loader does not look. Setting LD_LIBRARY_PATH, the usual advice, comes too late for a running kernel, because
the loader reads it only at the start. The fix therefore loads the libraries by path in this process, and extends the variable
for the processes that it starts. This module does not import torch and needs only the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.machinery
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from qlora_helpers.base.errors import UserError

SYSTEM_ROOT = Path("/usr/local")
# In the order of their dependencies: cublas needs cublasLt, and cusparse needs nvJitLink.
LIBRARIES = ("cudart", "nvJitLink", "cublasLt", "cublas", "cusparse")
_PIP_FOLDERS = ("cuda_runtime", "nvjitlink", "cublas", "cusparse")


@dataclass(frozen=True)
class TorchBuild:
    """The installed PyTorch as its files describe it: version, the CUDA version it was built for (None: CPU), folder."""

    version: str
    cuda: str | None
    folder: Path

    @property
    def cuda_major(self) -> int | None:
        """The major CUDA version that it was built for; None for a CPU build."""
        return int(self.cuda.split(".")[0]) if self.cuda else None


@dataclass(frozen=True)
class CudaRuntime:
    """The CUDA libraries that belong to the installed PyTorch.

    Attributes:
        layout: how they were installed: `pip`, `conda` or `system`.
        cuda: PyTorch's CUDA version, such as `13.0`.
        libraries: the files in the order in which they can be loaded; the first is libcudart.
    """

    layout: str
    cuda: str
    libraries: tuple[Path, ...]

    @property
    def directories(self) -> tuple[Path, ...]:
        """The folders that hold the libraries, each once."""
        return tuple(dict.fromkeys(path.parent for path in self.libraries))

    def __repr__(self) -> str:  # without paths, because a notebook may store it
        return f"CUDA {self.cuda} libraries ({self.layout} layout): {', '.join(path.name for path in self.libraries)}"


@dataclass(frozen=True, repr=False)
class CudaFix:
    """What `fix_cuda_library_path` did: the libraries that it loaded (None: no libraries), and a description."""

    runtime: CudaRuntime | None
    text: str

    def __repr__(self) -> str:
        return self.text


def package_folder(name: str, site_packages: str | os.PathLike[str] | None = None) -> Path | None:
    """Finds the folder of an installed package without importing it; None if it is not installed.

    Args:
        name: the package's import name.
        site_packages: the only folder to search; None searches where Python imports from.
    """
    importlib.invalidate_caches()  # this very process may have installed it a moment ago
    spec = importlib.machinery.PathFinder.find_spec(name, None if site_packages is None else [str(site_packages)])
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def read_torch_build(site_packages: str | os.PathLike[str] | None = None) -> TorchBuild | None:
    """Reads version and CUDA version of the installed PyTorch from the text of `torch/version.py`; None if there is none.

    Args:
        site_packages: the only folder to search; None searches where Python imports from.
    """
    folder = package_folder("torch", site_packages)
    if folder is None or not (folder / "version.py").is_file():
        return None
    text = (folder / "version.py").read_text(encoding="utf-8")
    values = dict(re.findall(r"""^(\w+)\s*(?::[^=\n]*)?=\s*['"]([^'"]+)['"]""", text, re.MULTILINE))
    return TorchBuild(values.get("__version__", "unknown"), values.get("cuda"), folder)


def find_cuda_runtime(
    site_packages: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None
) -> CudaRuntime | None:
    """Finds the CUDA libraries that match the installed PyTorch's CUDA version.

    It searches pip's `nvidia` packages (one folder for each in CUDA 12, one for all in CUDA 13), then the conda environment,
    then the system's CUDA.

    Args:
        site_packages: where torch and the nvidia packages are installed; None searches where Python imports from.
        environ: the environment variables; None takes this process's.

    Returns:
        The libraries, or None if PyTorch is missing or a CPU build, or there are no such libraries.
    """
    torch = read_torch_build(site_packages)
    if torch is None or torch.cuda is None or torch.cuda_major is None:
        return None
    roots = [torch.folder.parent] + ([Path(path) for path in sys.path if path] if site_packages is None else [])
    for layout, directories in _layouts(roots, torch.cuda_major, os.environ if environ is None else environ):
        libraries = [_library(directories, name, torch.cuda_major) for name in LIBRARIES]
        if libraries[0] is not None:
            return CudaRuntime(layout, torch.cuda, tuple(path for path in libraries if path is not None))
    return None


def extend_library_path(
    directories: Iterable[str | os.PathLike[str]], environ: MutableMapping[str, str] = os.environ
) -> str:
    """Prepends directories to LD_LIBRARY_PATH for the processes that this one starts, and keeps each entry once.

    Returns:
        The new value.
    """
    before = environ.get("LD_LIBRARY_PATH", "")
    entries = [*(os.fspath(each) for each in directories), *(before.split(os.pathsep) if before else [])]
    value = os.pathsep.join(dict.fromkeys(entries))
    if value:
        environ["LD_LIBRARY_PATH"] = value
    return value


def try_library_path() -> list[tuple[str, bool]]:
    """Shows with a temporary library why LD_LIBRARY_PATH alone does not help a running kernel.

    The library is a copy of the C math library, in a temporary folder and under a name that the loader does not know.

    Returns:
        What was tried, in order, and whether the library was found; empty if this is not Linux.
    """
    maps = Path("/proc/self/maps")
    loaded = re.search(r"/\S*/libm[-.]\S*", maps.read_text()) if maps.exists() else None
    if loaded is None:
        return []
    name = "libq.so.6"  # as long as libm.so.6, so that it can replace that name in the file
    before = os.environ.get("LD_LIBRARY_PATH")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        path = Path(folder, name)
        path.write_bytes(Path(loaded[0]).read_bytes().replace(b"libm.so.6", name.encode()))
        undo.callback(_restore, "LD_LIBRARY_PATH", before)
        extend_library_path([folder])
        child = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({name!r})"]
        return [
            ("by name in this process, after setting LD_LIBRARY_PATH", _found(name, undo)),
            ("by name in a new process, started from here", subprocess.run(child, capture_output=True).returncode == 0),
            ("by its path in this process", _found(str(path), undo)),
            ("by name in this process, now that it is loaded", _found(name, undo)),
        ]


def fix_cuda_library_path(site_packages: str | os.PathLike[str] | None = None) -> CudaFix:
    """Makes bitsandbytes find the CUDA libraries of the installed PyTorch, in this process and in those it starts.

    It has to run before torch is imported, and does nothing if PyTorch is missing or a CPU build.

    Args:
        site_packages: where torch and the nvidia packages are installed; None searches where Python imports from.

    Raises:
        UserError: torch is already imported, or a library is damaged.
    """
    if "torch" in sys.modules:
        raise UserError(
            "torch is already imported, so it is too late to choose its CUDA libraries",
            next_step="Restart the kernel and run this cell first.",
        )
    torch = read_torch_build(site_packages)
    if torch is None:
        return CudaFix(None, "PyTorch is not installed yet, so there is no CUDA library path to fix.")
    if torch.cuda is None:
        return CudaFix(None, "PyTorch is a CPU build, so there is no CUDA library path to fix.")
    runtime = find_cuda_runtime(site_packages)
    if runtime is None:
        return CudaFix(
            None,
            f"No CUDA {torch.cuda} libraries were found (pip, conda, system), so nothing was changed. If bitsandbytes "
            "finds none either, install PyTorch again: its nvidia packages contain them.",
        )
    for path in runtime.libraries:
        _load(path)
    extend_library_path(runtime.directories)
    names = ", ".join(path.name for path in runtime.libraries)
    return CudaFix(
        runtime,
        f"CUDA {runtime.cuda} ({runtime.layout} layout): loaded {names} for this kernel, and extended LD_LIBRARY_PATH "
        "for the processes that it starts.",
    )


def _found(name: str, undo: contextlib.ExitStack) -> bool:
    """Whether the loader finds a library; closing `undo` unloads it."""
    try:
        library = ctypes.CDLL(name)
    except OSError:
        return False
    import _ctypes

    undo.callback(_ctypes.dlclose, library._handle)
    return True


def _restore(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value


def _layouts(roots: list[Path], major: int, environ: Mapping[str, str]) -> Iterator[tuple[str, list[Path]]]:
    """Yields where to search, the likeliest first: a layout and the folders that together hold one set of libraries."""
    for root in roots:
        yield "pip", [root / "nvidia" / f"cu{major}" / "lib"]
        yield "pip", [root / "nvidia" / folder / "lib" for folder in _PIP_FOLDERS]
    # A kernel that a server of another conda environment started inherits its CONDA_PREFIX, so this environment comes first.
    prefixes = [sys.prefix] if (Path(sys.prefix) / "conda-meta").is_dir() else []
    for prefix in [*prefixes, environ.get("CONDA_PREFIX")]:
        if prefix:
            yield "conda", [Path(prefix) / "lib"]
    homes = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    for home in [*homes, SYSTEM_ROOT / "cuda", *sorted(SYSTEM_ROOT.glob(f"cuda-{major}*"), reverse=True)]:
        yield "system", [home / "lib64"]


def _library(directories: list[Path], name: str, major: int) -> Path | None:
    """Finds the file by which programs ask for a library, such as `libcudart.so.13`: the shortest of its names."""
    # cusparse has its own version numbers: CUDA 13 still contains libcusparse.so.12.
    version = r"\d+" if name == "cusparse" else str(major)
    pattern = re.compile(rf"lib{name}\.so\.{version}(\.\d+)*")
    found = [path for folder in directories for path in folder.glob(f"lib{name}.so.*") if pattern.fullmatch(path.name)]
    return min(found, key=lambda path: (len(path.name), path.name), default=None)


def _load(path: Path) -> None:
    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        # The loader's message contains the path, which does not belong in a stored notebook.
        reason = str(error).replace(str(path), path.name)
        raise UserError(
            f"the CUDA library {path.name} can't be loaded ({reason})",
            next_step="Install PyTorch again, then restart the kernel.",
        ) from error
