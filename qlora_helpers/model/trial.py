"""Tries a model's tokenizer and chat templates in a process with limits, before they run in this one.

Both are programs that came with the model: a template may loop or compute `9**9**9`, a `tokenizer.json` may double a text forty
times or hold a regular expression that never ends, and none of it can be interrupted from Python. Each content is tried once in
a process. That a trial ends shows that these programs end on ordinary conversations, not that they do on every one.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU_S = 20
MEMORY_BYTES, BYTES_OF_A_CHARACTER = 512 * 1024**2, 16  # in all, and for each character of a tokenizer.json
WALL_S = 300.0  # the limit that counts is that on computing; this one is for a process that waits
MOST_BYTES = 256 * 1024**2
_SCRIPT = Path(__file__).with_name("trial_process.py")
TOKENIZER, CHAT_TEMPLATE = "tokenizer", "chat template"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Programs:
    """What of a model runs without being its weights.

    Attributes:
        tokenizer: a `tokenizer.json`, or empty.
        templates: chat templates.
        special: the special tokens that templates are given, by name.
    """

    tokenizer: str
    templates: tuple[str, ...]
    special: dict[str, str] = field(default_factory=dict)


def programs_in(folder: Path, name: str) -> Programs:
    """Reads the tokenizer and all chat templates that transformers may take from a folder.

    Raises:
        ModelError: a file is larger than any tokenizer, can't be read, or says that another one is taken instead of
            `tokenizer.json`.
    """
    tokenizer = _text(folder / "tokenizer.json", name)
    files = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    templates = [_text(path, name) for path in files]
    special: dict[str, str] = {}
    for file in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        try:
            values = json.loads(_text(folder / file, name) or "{}")
            templates += _templates(values.get("chat_template"))
            others = values.get("fast_tokenizer_files")
        except (ValueError, AttributeError, RecursionError):
            continue  # loading the tokenizer says that it is damaged
        # transformers would load tokenizer.4.0.0.json instead, which nobody has tried and no fingerprint covers.
        if others and others != ["tokenizer.json"]:
            raise ModelError(
                f"{file} of {name} names other files than tokenizer.json for its tokenizer",
                got=repr(others)[:100],
                next_step="Delete fast_tokenizer_files from it, or choose another model.",
            )
        special |= {key: _token(values[key]) for key in _SPECIAL if values.get(key)}
    return Programs(tokenizer, tuple(dict.fromkeys(filter(None, templates))), special)


def programs_of(tokenizer: PreTrainedTokenizerBase, *, besides: Programs) -> Programs:
    """Returns what of a loaded tokenizer runs and is not among the programs that its folder was seen to hold."""
    backend = None if besides.tokenizer else getattr(tokenizer, "backend_tokenizer", None)
    templates = [each for each in _templates(tokenizer.chat_template) if each not in besides.templates]
    special = {key: str(value) for key in _SPECIAL if (value := getattr(tokenizer, key, None)) is not None}
    return Programs("" if backend is None else backend.to_str(), tuple(templates), special)


def try_out(programs: Programs, name: str) -> None:
    """Runs a tokenizer and its templates on ordinary texts in a process with limits; the same content only once.

    Args:
        programs: what is tried.
        name: the model's, for messages.

    Raises:
        ModelError: they take too long or too much memory, or crash.
    """
    if not programs.tokenizer and not programs.templates:
        return
    limits = {"cpu_s": CPU_S, "memory_bytes": MEMORY_BYTES + BYTES_OF_A_CHARACTER * len(programs.tokenizer)}
    asked = json.dumps(asdict(programs) | limits, sort_keys=True)
    digest = hashlib.sha256(asked.encode()).hexdigest()
    if digest not in _FAULTS:
        _FAULTS[digest] = _fault(asked)
    fault = _FAULTS[digest]
    if fault is None:
        return
    part, why = fault
    raise ModelError(
        f"the {part} of {name} is not used: {why}",
        next_step="Choose another model, or get the tokenizer's files from where the model was published."
        if part == TOKENIZER
        else "Choose another model, or delete the chat template from its folder and set data.template=recipe.",
    )


_FAULTS: dict[str, tuple[str, str] | None] = {}  # by the digest of what was tried; None where it is good


def _fault(asked: str) -> tuple[str, str] | None:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(_SCRIPT)],
            input=asked.encode(),
            env=os.environ | threads | {"TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            timeout=WALL_S,
        )
    except subprocess.TimeoutExpired as error:
        return _last_part(error.stdout or b""), f"it did not end within {WALL_S:.0f} s"
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return _last_part(done.stdout), f"it did not end within {CPU_S} s of computing"
    if done.returncode != 0:
        return _last_part(done.stdout), "it takes too much memory, or crashes"
    found = json.loads(done.stdout.splitlines()[-1])
    return (found["part"], found["fault"]) if found["fault"] else None


def _last_part(output: bytes) -> str:
    """The part that was begun last: the process prints each before it begins it."""
    return CHAT_TEMPLATE if CHAT_TEMPLATE.encode() in output else TOKENIZER


def _text(path: Path, name: str) -> str:
    if not path.is_file():
        return ""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ModelError(
            f"{path.name} of {name} can't be read ({error.strerror})", next_step="Check the file."
        ) from error
    if len(content) > MOST_BYTES:
        raise ModelError(
            f"{path.name} of {name} is over the limit of {MOST_BYTES // 1024**2} MiB", next_step="Choose another model."
        )
    return content.decode("utf-8", errors="replace")


def _templates(value: Any) -> list[str]:
    """The templates in one of the forms that files have: one text, a text by name, or a list of objects with name and text."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        value = [each.get("template") if isinstance(each, dict) else each for each in value]
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]


def _token(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")
