"""Tiny tokenizers with the control tokens and chat templates of ten public families, written for these tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Family:
    """A family's control tokens.

    Attributes:
        control: strings of its special tokens.
        eos, bos: of the tokenizer.
        end: what ends a turn.
        plain: further tokens that are added, but not special.
        strip_behind: control tokens that swallow the white space behind them (as Phi-3's do).
    """

    control: tuple[str, ...]
    eos: str
    end: str
    bos: str | None = None
    plain: tuple[str, ...] = ()
    strip_behind: bool = False


IM = ("<|im_start|>", "<|im_end|>")
FAMILIES: dict[str, Family] = {
    "chatml": Family(IM, "<|im_end|>", "<|im_end|>", plain=("<tool_call>", "</tool_call>")),
    "llama3": Family(
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        "<|end_of_text|>",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "gemma": Family(("<start_of_turn>", "<end_of_turn>"), "<eos>", "<end_of_turn>", bos="<bos>"),
    "mistral": Family(
        (
            *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        "</s>",
        "</s>",
        bos="<s>",
    ),
    "phi": Family(
        ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"),
        "<|endoftext|>",
        "<|end|>",
        strip_behind=True,
    ),
    "qwen3": Family(IM, "<|im_end|>", "<|im_end|>", plain=("<think>", "</think>", "<tool_call>", "</tool_call>")),
    "deepseek": Family(
        (
            *(
                "<｜User｜>",
                "<｜Assistant｜>",
                "<｜tool▁calls▁begin｜>",
                "<｜tool▁calls▁end｜>",
                "<｜tool▁call▁begin｜>",
            ),
            *("<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
        ),
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        plain=("<think>", "</think>"),
    ),
    "harmony": Family(
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"),
        "<|return|>",
        "<|return|>",
        bos="<|startoftext|>",
    ),
    "zephyr": Family((), "</s>", "</s>", bos="<s>"),
    "falcon3": Family(
        ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"),
        "<|endoftext|>",
        "<|endoftext|>",
        plain=("<tool_call>",),
    ),
    "marked": Family(IM, "<|im_end|>", "<|im_end|>"),
}
TEN = [name for name in FAMILIES if name != "marked"]
SENTENCES = (
    "You are brief and kind. Where is my parcel? It left the depot in Leeds this morning. And when will it come?",
    'Tomorrow between nine and noon. Thanks a lot! You\'re welcome. weather rain 12 degrees {"city": "Oslo"}',
    "system user assistant model tool name arguments functions analysis final commentary json \n\n\n",
)


@cache
def _backend(kind: str) -> str:
    """A tokenizer of 700 tokens, as the JSON text of the tokenizers library: `bytes` (GPT-2's form) or `pieces` (Llama 2's)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer.to_str()


def family_tokenizer(name: str, kind: str = "bytes") -> Any:
    """A tokenizer with a family's control tokens and its chat template."""
    import json

    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    content = json.loads(_backend(kind))
    for token in content["added_tokens"]:
        token["special"] = token["content"] == "<unk>"
    content["added_tokens"] = [token for token in content["added_tokens"] if token["special"]]
    backend = Tokenizer.from_str(json.dumps(content))
    strings = dict.fromkeys([*([family.bos] if family.bos else []), family.eos, "<|pad|>", *family.control])
    backend.add_special_tokens(
        [
            AddedToken(each, special=True, normalized=False, rstrip=family.strip_behind and each in family.control)
            for each in strings
        ]
    )
    backend.add_tokens([AddedToken(each, special=False, normalized=False) for each in family.plain])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=family.eos, bos_token=family.bos, pad_token="<|pad|>"
    )
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer
