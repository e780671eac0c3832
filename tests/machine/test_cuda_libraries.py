"""The CUDA library path fix, on stand-in folders of every layout and with real shared libraries."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types

import pytest

from qlora_helpers.base.errors import UserError
from qlora_helpers.machine import cuda_libraries
from qlora_helpers.machine.cuda_libraries import (
    extend_library_path,
    find_cuda_runtime,
    fix_cuda_library_path,
    package_folder,
    read_torch_build,
)

CUDA_12 = {
    "nvidia/cuda_runtime/lib": ["libcudart.so.12"],
    "nvidia/nvjitlink/lib": ["libnvJitLink.so.12"],
    "nvidia/cublas/lib": ["libcublas.so.12", "libcublasLt.so.12", "libnvblas.so.12"],
    "nvidia/cusparse/lib": ["libcusparse.so.12"],
}
CUDA_13 = {
    "nvidia/cu13/lib": [
        *("libcudart.so.13", "libnvJitLink.so.13", "libcublas.so.13", "libcublasLt.so.13"),
        *("libcusparse.so.12", "libnvblas.so.13"),
    ]
}


def make_files(root, folders):
    for folder, names in folders.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (root / folder / name).touch()


def make_torch(root, cuda):
    (root / "torch").mkdir(parents=True)
    (root / "torch" / "__init__.py").write_text("raise RuntimeError('torch must not be imported')")
    (root / "torch" / "version.py").write_text(
        "from typing import Optional\n\n__all__ = ['__version__', 'cuda']\n__version__ = '2.13.0+x'\ndebug = False\n"
        f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
    )
    return root


@pytest.fixture(autouse=True)
def no_system_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_libraries, "SYSTEM_ROOT", tmp_path / "usr-local")


def names(runtime):
    return [path.name for path in runtime.libraries]


def test_torch_build_is_read_without_importing_it(tmp_path):
    build = read_torch_build(make_torch(tmp_path, "13.0"))
    assert (build.version, build.cuda, build.cuda_major) == ("2.13.0+x", "13.0", 13)
    assert read_torch_build(make_torch(tmp_path / "cpu", None)).cuda is None
    (tmp_path / "empty").mkdir()
    assert read_torch_build(tmp_path / "empty") is None


def test_a_package_installed_a_moment_ago_is_found(tmp_path):
    assert package_folder("qlora_newcomer", tmp_path) is None
    seen = tmp_path.stat()
    make_files(tmp_path, {"qlora_newcomer": ["__init__.py"]})
    os.utime(tmp_path, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # within the clock's grain, as on coarse file systems
    assert package_folder("qlora_newcomer", tmp_path) == tmp_path / "qlora_newcomer"
    assert "qlora_newcomer" not in sys.modules


def test_the_installed_torch_is_described_as_it_describes_itself():
    code = "import sys\nfrom qlora_helpers.machine.cuda_libraries import read_torch_build\nbuild = read_torch_build()\n"
    code += "assert 'torch' not in sys.modules\nimport torch\n"
    code += "assert (build.version, build.cuda) == (torch.__version__, torch.version.cuda), build\nprint('same')"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "same"


@pytest.mark.parametrize(
    ("cuda", "folders", "expected"),
    [
        ("12.8", CUDA_12, ["libcudart.so.12", "libnvJitLink.so.12", "libcublasLt.so.12", "libcublas.so.12"]),
        ("13.0", CUDA_13, ["libcudart.so.13", "libnvJitLink.so.13", "libcublasLt.so.13", "libcublas.so.13"]),
    ],
)
def test_pip_layouts(tmp_path, cuda, folders, expected):
    make_files(make_torch(tmp_path, cuda), folders)
    runtime = find_cuda_runtime(tmp_path, {})
    assert (runtime.layout, runtime.cuda) == ("pip", cuda)
    assert names(runtime) == [*expected, "libcusparse.so.12"]
    assert set(runtime.directories) == {tmp_path / folder for folder in folders}
    assert str(tmp_path) not in repr(runtime)


@pytest.mark.parametrize(("cuda", "major"), [("12.8", "12"), ("13.0", "13")])
def test_both_cuda_versions_installed_the_one_of_torch_is_taken(tmp_path, cuda, major):
    make_files(make_torch(tmp_path, cuda), CUDA_12 | CUDA_13)
    assert {name.rpartition(".")[2] for name in names(find_cuda_runtime(tmp_path, {}))[:-1]} == {major}


def test_conda_layout(tmp_path):
    make_files(make_torch(tmp_path / "site", "12.4"), {})
    files = ["libcudart.so", "libcudart.so.12", "libcudart.so.12.4.127", "libcublas.so.12", "libcudart.so.11.0"]
    make_files(tmp_path / "conda", {"lib": files})
    runtime = find_cuda_runtime(tmp_path / "site", {"CONDA_PREFIX": str(tmp_path / "conda")})
    assert runtime.layout == "conda"
    assert names(runtime) == ["libcudart.so.12", "libcublas.so.12"]


def test_own_conda_environment_comes_before_the_servers(tmp_path, monkeypatch):
    make_torch(tmp_path / "site", "12.4")
    for prefix in ("ours", "servers"):
        make_files(tmp_path / prefix, {"lib": ["libcudart.so.12"], "conda-meta": []})
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "ours"))
    runtime = find_cuda_runtime(tmp_path / "site", {"CONDA_PREFIX": str(tmp_path / "servers")})
    assert runtime.directories == (tmp_path / "ours" / "lib",)


def test_system_cuda(tmp_path):
    make_torch(tmp_path / "site", "13.0")
    make_files(tmp_path / "home", {"lib64": ["libcudart.so.12"]})
    make_files(tmp_path / "usr-local", {"cuda/lib64": ["libcudart.so.12"], "cuda-13.0/lib64": ["libcudart.so.13"]})
    environ = {"CUDA_HOME": str(tmp_path / "home")}
    runtime = find_cuda_runtime(tmp_path / "site", environ)
    assert runtime.layout == "system"
    assert runtime.directories == (tmp_path / "usr-local" / "cuda-13.0" / "lib64",)
    (tmp_path / "home" / "lib64" / "libcudart.so.13").touch()
    assert find_cuda_runtime(tmp_path / "site", environ).directories == (tmp_path / "home" / "lib64",)


def test_pip_comes_before_conda_and_system(tmp_path):
    make_files(make_torch(tmp_path, "12.8"), CUDA_12 | {"lib": ["libcudart.so.12"]})
    make_files(tmp_path / "usr-local", {"cuda/lib64": ["libcudart.so.12"]})
    assert find_cuda_runtime(tmp_path, {"CONDA_PREFIX": str(tmp_path)}).layout == "pip"


def test_nothing_to_find(tmp_path):
    for name, cuda in (("cpu", None), ("wrong", "13.0")):
        make_files(make_torch(tmp_path / name, cuda), CUDA_12)
        assert find_cuda_runtime(tmp_path / name, {}) is None


def test_library_path_is_extended_and_keeps_what_was_there():
    environ = {"LD_LIBRARY_PATH": "/old/a:/new/b:/old/c"}
    assert extend_library_path(["/new/a", "/new/b"], environ) == "/new/a:/new/b:/old/a:/old/c"
    assert environ["LD_LIBRARY_PATH"] == "/new/a:/new/b:/old/a:/old/c"
    again = extend_library_path(["/new/a", "/new/b"], environ)
    assert again == environ["LD_LIBRARY_PATH"] == "/new/a:/new/b:/old/a:/old/c"


def test_library_path_that_was_not_set():
    environ = {}
    assert extend_library_path([], environ) == ""
    assert environ == {}  # an empty entry would mean the current folder
    assert extend_library_path(["/new"], environ) == "/new"
    assert environ == {"LD_LIBRARY_PATH": "/new"}


def test_refused_once_torch_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    before = os.environ.get("LD_LIBRARY_PATH")
    with pytest.raises(UserError, match="torch is already imported.*Restart the kernel and run this cell first"):
        fix_cuda_library_path()
    assert os.environ.get("LD_LIBRARY_PATH") == before


@pytest.mark.parametrize(
    ("cuda", "text"), [(None, "PyTorch is a CPU build"), ("13.0", "No CUDA 13.0 libraries were found")]
)
def test_nothing_is_changed_if_there_is_nothing_to_fix(tmp_path, monkeypatch, cuda, text):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/old")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    fix = fix_cuda_library_path(make_torch(tmp_path, cuda))
    assert fix.runtime is None
    assert repr(fix).startswith(text)
    assert os.environ["LD_LIBRARY_PATH"] == "/old"


def test_torch_not_installed_yet(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert repr(fix_cuda_library_path(tmp_path)).startswith("PyTorch is not installed yet")


def test_damaged_library_is_one_clear_error_without_a_path(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/old")
    make_files(make_torch(tmp_path, "13.0"), CUDA_13)  # empty files
    with pytest.raises(UserError, match=r"libcudart\.so\.13 can't be loaded.*Install PyTorch again") as caught:
        fix_cuda_library_path(tmp_path)
    assert str(tmp_path) not in str(caught.value)
    assert os.environ["LD_LIBRARY_PATH"] == "/old"


CHECK_THE_FIX = """
import ctypes, json, subprocess, sys
from qlora_helpers.machine.cuda_libraries import fix_cuda_library_path

def answer(name, path):
    try:
        return getattr(ctypes.CDLL(path), name)()
    except OSError as error:
        return str(error)

before = answer("binary_answer", sys.argv[2])
fix = fix_cuda_library_path(sys.argv[1])
child = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).binary_answer())"
told = subprocess.run([sys.executable, "-c", child, sys.argv[2]], capture_output=True, text=True).stdout.strip()
after = answer("binary_answer", sys.argv[2]), answer("plugin_answer", sys.argv[3])
print(json.dumps({"before": before, "after": after, "child": told, "said": repr(fix)}))
"""


@pytest.mark.parametrize(
    ("cuda", "folders"),
    [("12.8", {"cudart": "nvidia/cuda_runtime/lib", "cublas": "nvidia/cublas/lib"}), ("13.0", {})],
)
def test_a_binary_finds_real_libraries_here_and_in_a_child(tmp_path, cuda, folders):
    """A stand-in of bitsandbytes' binary, linked to cublas and cudart by name; and a plugin that names no library."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux")
    site, major = make_torch(tmp_path / "site", cuda), cuda.split(".")[0]

    def build(name, code, *needs):
        target = site / folders.get(name, f"nvidia/cu{major}/lib") / f"lib{name}.so.{major}"
        target.parent.mkdir(parents=True, exist_ok=True)
        source = tmp_path / f"{name}.c"
        source.write_text(code)
        command = [compiler, "-shared", "-fPIC", "-Wl,--no-as-needed", f"-Wl,-soname,{target.name}", str(source)]
        subprocess.run([*command, "-o", str(target), *map(str, needs)], check=True)
        return target

    cudart = build("cudart", "int cudart_answer(void) { return 40; }")
    cublas = build("cublas", "int cudart_answer(void); int cublas_answer(void) { return cudart_answer() + 1; }", cudart)
    code = "int cublas_answer(void); int binary_answer(void) { return cublas_answer() + 1; }"
    binary = build("binary", code, cublas, cudart)
    plugin = build("plugin", "int cublas_answer(void); int plugin_answer(void) { return cublas_answer() + 2; }")

    environ = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    command = [sys.executable, "-c", CHECK_THE_FIX, str(site), str(binary), str(plugin)]
    result = json.loads(subprocess.check_output(command, text=True, env=environ))
    assert "libbinary" in result["before"] or "cannot open shared object file" in result["before"]
    assert result["after"] == [42, 43]
    assert result["child"] == "42"
    assert f"loaded libcudart.so.{major}, libcublas.so.{major} for this kernel" in result["said"]
    assert str(tmp_path) not in result["said"]


@pytest.mark.skipif(sys.platform != "linux", reason="the loader of Linux")
def test_library_path_is_too_late_for_a_running_process_and_loading_by_path_is_not(monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/other/lib")
    for _ in range(2):  # leaves nothing behind that a second time would find
        assert [found for _, found in cuda_libraries.try_library_path()] == [False, True, True, True]
    assert os.environ["LD_LIBRARY_PATH"] == "/other/lib"
    monkeypatch.delenv("LD_LIBRARY_PATH")
    cuda_libraries.try_library_path()
    assert "LD_LIBRARY_PATH" not in os.environ
