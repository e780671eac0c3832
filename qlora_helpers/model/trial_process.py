"""What a trial's process runs: a tokenizer and chat templates for the first time, within limits that it sets for itself.

A script of its own, started by `model.trial`, which knows what the answer means. It imports transformers' way to render a
template and no torch, reads one JSON object from its input and prints one. Nothing else of this package is imported.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

MOST_GROWTH = (
    100  # times that a normalizer may lengthen a text; the widest of a published model makes three bytes of one
)
MOST_INSERTED = 1000  # characters or tokens that may be put before or after a text
TEXTS = (
    "".join(map(chr, range(32, 127))) * 4,
    *(character * 2000 for character in "a0 .\n\t-_=#é漢🎂\u0301\u200d"),
    "Ana: are you coming tonight?\nBo: can't, I'm on shift until 10:30 pm :(\nAna: what a pity!! 🎂\n" * 20,
    "The cat sat on the mat. ÄÖÜ ñandú ça va? 你好,世界。 こんにちは Привет مرحبا नमस्ते " * 20,
    "0123456789" * 200 + "a b  c   d" * 200 + "aA" * 1000 + "a!" * 1000,
)
_USER, _ANSWER = (
    {"role": "user", "content": TEXTS[-3]},
    {"role": "assistant", "content": "Bo works until half past ten."},
)
_SYSTEM = {"role": "system", "content": "Summarize the chat dialogue."}
CHATS = ([_USER], [_SYSTEM, _USER], [_USER, _ANSWER], [_SYSTEM, *[_USER, _ANSWER] * 8, _USER])


def limit(cpu_s: int, memory_bytes: int) -> None:
    """Limits this process to so many more seconds of computing and bytes of memory than it has used for its imports."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + cpu_s
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
    except OSError:  # macOS, which does not keep to this limit either
        return
    most = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def fault_of_definition(definition: str) -> str:
    """Says what is wrong with a tokenizer.json that makes far more of a text than it is; empty where nothing is."""
    try:
        values = json.loads(definition)
        growth, inserted = _growth(values.get("normalizer"))
        tokens = _inserted_tokens(values.get("post_processor"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ""  # not a tokenizer; loading it says so
    if growth > MOST_GROWTH or inserted > MOST_INSERTED:
        return "its normalizer makes far more of a text than it is"
    return "it puts thousands of tokens around a text" if tokens > MOST_INSERTED else ""


def _growth(normalizer: Any) -> tuple[float, int]:
    """How many times longer a text can become, and how many characters may be put before it."""
    if not normalizer:
        return 1, 0
    kind = normalizer["type"]
    if kind == "Sequence":
        growth, inserted = 1.0, 0
        for each in normalizer["normalizers"]:
            more, before = _growth(each)
            growth, inserted = growth * more, int(inserted * more) + before
        return growth, inserted
    if kind == "Prepend":
        return 1, len(normalizer["prepend"])
    if kind == "Replace":
        found = normalizer["pattern"].get("String")
        return max(1.0, len(normalizer["content"]) / max(1, len(found or ""))) + (found == ""), 0
    return 1, 0


def _inserted_tokens(processor: Any) -> int:
    if not processor:
        return 0
    if processor["type"] == "Sequence":
        return sum(map(_inserted_tokens, processor["processors"]))
    if processor["type"] != "TemplateProcessing":
        return 0
    ids = {name: len(token["ids"]) for name, token in processor["special_tokens"].items()}
    return sum(ids.get(piece["SpecialToken"]["id"], 1) for piece in processor["single"] if "SpecialToken" in piece)


def use_tokenizer(definition: str) -> None:
    """Tokenises the trial's texts and decodes the tokens."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(definition)
    except Exception:  # it can't be read; loading it says so
        return
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for text in TEXTS:
        try:
            tokenizer.decode(tokenizer.encode(text).ids)
        except Exception:  # a character that it does not know, for one
            continue


def render(template: str, special: dict[str, str]) -> None:
    """Renders the trial's conversations, with and without the beginning of an answer; a template may refuse any of them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    for chat in CHATS:
        for is_asked in (True, False):
            try:
                rendered = render_jinja_template(
                    conversations=[chat], chat_template=template, add_generation_prompt=is_asked, **special
                )
                texts = rendered[0] if isinstance(rendered, tuple) else rendered
            except MemoryError:
                raise
            except Exception:  # whether a template can be used is seen where it is used
                continue
            if sum(map(len, texts)) > MOST_GROWTH * sum(len(message["content"]) for message in chat) + 1_000_000:
                raise MemoryError


def main() -> None:
    """Tries what the input describes and prints `{"fault": ...}`; is killed by the system where it goes on too long."""
    asked = json.load(sys.stdin)
    from tokenizers import Tokenizer  # noqa: F401  (imports come before the limits)

    if asked["templates"]:
        from transformers.utils.chat_template_utils import render_jinja_template  # noqa: F401

    limit(asked["cpu_s"], asked["memory_bytes"])
    part, fault = "tokenizer", fault_of_definition(asked["tokenizer"])
    try:
        if not fault:
            use_tokenizer(asked["tokenizer"])
            part = "chat template"
            print(part, flush=True)
            for template in asked["templates"]:
                render(template, asked["special"])
    except MemoryError:
        fault = "it takes too much memory"
    print(json.dumps({"part": part, "fault": fault}), flush=True)


if __name__ == "__main__":
    main()
