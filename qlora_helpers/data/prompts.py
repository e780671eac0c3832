"""Turns a dialogue into a prompt, and a prompt into tokens.

Training and generation call the same function, so the model is asked exactly as it was trained. The dialogue's own text is
tokenised as plain text: a `<|im_end|>` that somebody typed into a chat never becomes a control token. Knows nothing of labels,
packing or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.text import brief
from qlora_helpers.data.examples import SUMMARIZE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = SUMMARIZE
RECIPE_SUFFIX = "\n---\nSummary:\n"
_SLOT = "[[the dialogue goes here]]"


@dataclass(frozen=True)
class PromptTokens:
    """A prompt in three pieces, so that a dialogue can be trimmed without touching what surrounds it."""

    prefix: tuple[int, ...]
    dialogue: tuple[int, ...]
    suffix: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        return [*self.prefix, *self.dialogue, *self.suffix]

    def __len__(self) -> int:
        return len(self.prefix) + len(self.dialogue) + len(self.suffix)

    def trimmed(self, tokens: int) -> PromptTokens:
        """The prompt with so many tokens cut from the dialogue's end."""
        return PromptTokens(self.prefix, self.dialogue[: max(0, len(self.dialogue) - tokens)], self.suffix)

    def fitted(self, max_tokens: int) -> PromptTokens:
        """The prompt with its dialogue trimmed as far as it takes for at most so many tokens."""
        return self.trimmed(max(0, len(self) - max_tokens))


def prompt_text(dialogue: str, template: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """Returns the prompt as text, up to and including the line after which the summary begins.

    Args:
        dialogue: turns, one a line.
        template: `recipe` (the 2023 recipe's plain text) or `chat` (the model's own template; needs the tokenizer).
        tokenizer: the model's.

    Raises:
        ModelError: `chat` was asked of a tokenizer without a chat template, or with one that does not work.
    """
    before, after = _frame(template, tokenizer)
    return before + dialogue + after


def prompt_tokens(dialogue: str, template: str, tokenizer: PreTrainedTokenizerBase) -> PromptTokens:
    """Returns the prompt as tokens.

    Args:
        dialogue: turns, one a line.
        template: `recipe` or `chat`.
        tokenizer: the model's.

    Raises:
        ModelError: `chat` was asked of a tokenizer without a chat template, or with one that does not work.
    """
    before, after = _frame(template, tokenizer)
    # A chat template writes its own begin-of-text token; plain text gets the tokenizer's, where it has one.
    prefix = tokenizer(before, add_special_tokens=template == "recipe")["input_ids"]
    if template == "recipe" and prefix and prefix[-1] == tokenizer.eos_token_id:
        prefix = prefix[:-1]
    return PromptTokens(tuple(prefix), tuple(plain_ids(dialogue, tokenizer)), tuple(_ids(after, tokenizer)))


def answer_tokens(summary: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the summary's tokens and the end-of-text token, which the model has to learn so that it stops."""
    return [*plain_ids(summary, tokenizer), tokenizer.eos_token_id]


def plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenises a text in which nothing is a control token."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _frame(template: str, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, str]:
    if template == "recipe":
        return INSTRUCTION, RECIPE_SUFFIX
    if tokenizer is None or not tokenizer.chat_template:
        raise ModelError("this model has no chat template", next_step="Set data.template=recipe.")
    message = [{"role": "user", "content": INSTRUCTION + _SLOT}]
    try:
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program that came with the model: it may raise anything
        raise _broken_template(got=brief(error)) from error
    pieces = text.split(_SLOT)
    if len(pieces) != 2:
        raise _broken_template(
            expected="a text with the message in it once", got=f"one with it {len(pieces) - 1} times"
        )
    return pieces[0], pieces[1]


def _broken_template(**found: str) -> ModelError:
    return ModelError(
        "this model's chat template does not work",
        **found,
        next_step="Set data.template=recipe and evaluation.chat_baseline=false.",
    )
