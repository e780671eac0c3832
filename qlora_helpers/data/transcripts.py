"""Reads conversations that were written out as one text, with marks that say who speaks, into messages.

Such files (`{"text": "### Human: ...### Assistant: ..."}`) are what older recipes trained on as plain text, the questions too.
A text is read only if marks and turns make up all of it. Knows nothing of files and columns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("user", "human", "prompter", "instruction", "[INST]"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "response", "[/INST]"), "assistant"),
}


@dataclass(frozen=True)
class Style:
    """How a transcript is written.

    Attributes:
        name: for messages.
        opening: what begins a turn; its group `role` says whose.
        closing: what may end a turn, and is no part of its text.
    """

    name: str
    opening: re.Pattern[str]
    closing: re.Pattern[str]


# The marks as the model families' own chat templates write them, and as Alpaca's, Vicuna's, Guanaco's and Anthropic's data do.
STYLES = (
    Style(
        "ChatML",
        re.compile(r"<\|im_start\|>(?P<role>system|user|assistant)\n"),
        re.compile(r"<\|im_end\|>|<\|endoftext\|>"),
    ),
    Style(
        "Llama 3",
        re.compile(r"<\|start_header_id\|>(?P<role>system|user|assistant)<\|end_header_id\|>"),
        re.compile(r"<\|eot_id\|>|<\|end_of_text\|>"),
    ),
    Style("Gemma", re.compile(r"<start_of_turn>(?P<role>user|model)\n"), re.compile(r"<end_of_turn>|<eos>")),
    Style(
        "Zephyr and Phi-3",
        re.compile(r"<\|(?P<role>system|user|assistant)\|>"),
        re.compile(r"</s>|<\|end\|>|<\|endoftext\|>"),
    ),
    Style("Llama 2 and Mistral", re.compile(r"(?P<role>\[/?INST\])"), re.compile(r"</s>")),
    Style(
        "### Human, ### Assistant",
        re.compile(r"### ?(?P<role>System|Human|User|Assistant):"),
        re.compile(r"</s>|<\|endoftext\|>"),
    ),
    Style(
        "Alpaca's",
        re.compile(r"(?:^|\n)### (?P<role>Instruction|Response):"),
        re.compile(r"</s>|<\|endoftext\|>"),
    ),
    Style("USER: and ASSISTANT:", re.compile(r"(?<![^\s>])(?P<role>USER|ASSISTANT):"), re.compile(r"</s>")),
    Style("Human: and Assistant:", re.compile(r"(?:^|\n\n)(?P<role>Human|Assistant):"), re.compile(r"</s>|<EOT>")),
)
_BEGINNING = re.compile(r"\s*(<s>|<\|begin_of_text\|>|<bos>|<\|endoftext\|>)?\s*")
_SYSTEM_IN_LLAMA_2 = re.compile(r"\s*<<SYS>>\n?(?P<system>.*?)\n?<</SYS>>\s*", re.DOTALL)
MARKUP = re.compile(
    r"<\|[A-Za-z][A-Za-z0-9_ ]{0,30}\|>|\[/?INST\]|<(?:start|end)_of_turn>|(?:^|\n)### ?[A-Z][a-z]{2,14}:"
)
"""What looks like a mark of some transcript."""


def style_of(texts: Sequence[str]) -> Style | None:
    """Returns the style in which all of some texts are written; None without one, or without a text."""
    return next((style for style in STYLES if texts and all(turns(text, style) for text in texts)), None)


def turns(text: str, style: Style) -> list[dict[str, str]]:
    """Returns a transcript's turns as `{"role": ..., "content": ...}`; empty where it is not written in this style throughout."""
    marks = list(style.opening.finditer(text))
    if len(marks) < 2:
        return []
    before = _BEGINNING.sub("", text[: marks[0].start()], count=1).strip()
    found: list[dict[str, str]] = []
    for mark, ending in zip(marks, [*(mark.start() for mark in marks[1:]), len(text)], strict=True):
        role = mark["role"] if mark["role"] in _ROLES else mark["role"].lower()
        content = text[mark.end() : ending].strip()
        closed = list(style.closing.finditer(content))
        if closed and content[closed[0].end() :].strip() not in ("", "<s>"):  # something is between two turns
            return []
        content = content[: closed[0].start()].strip() if closed else content
        system = _SYSTEM_IN_LLAMA_2.match(content) if role == "[INST]" and not found else None
        if system:
            found.append({"role": "system", "content": system["system"].strip()})
            content = content[system.end() :]
        found.append({"role": _ROLES[role], "content": content})
    if before:  # as Vicuna's and Alpaca's data begin
        found.insert(0, {"role": "system", "content": before})
    asked = next((turn["role"] for turn in found if turn["role"] != "system"), "") == "user"
    return found if asked and any(turn["role"] == "assistant" and turn["content"] for turn in found) else []
