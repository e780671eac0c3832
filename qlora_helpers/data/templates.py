"""Chooses how rows are written: `data.template` of the settings, or what fits the tokenizer."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.data.chat_rows import ChatTemplate
from qlora_helpers.data.plain_templates import PlainTemplate, RecipeTemplate, Template, template_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES: dict[str, type[Template]] = {"recipe": RecipeTemplate, "plain": PlainTemplate, "chat": ChatTemplate}


def make_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Returns a template by name.

    Args:
        name: `recipe`, `plain`, `chat`, or `auto`: the model's chat template where it works, else plain text.
        tokenizer: the model's.

    Raises:
        ModelError: `chat` was asked of a tokenizer without a chat template, or with one that does not work.
    """
    if name != "auto":
        return TEMPLATES[name](tokenizer)
    if not tokenizer.chat_template:
        return PlainTemplate(tokenizer)
    try:
        return ChatTemplate(tokenizer)
    except ModelError as error:
        plain = PlainTemplate(tokenizer)
        plain.notes = (
            f"rows are written as plain text, for {error.problem}" + (f" ({error.got})" if error.got else ""),
        )
        return plain


def template_of(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Returns the template that a run's settings ask for.

    Raises:
        ModelError: as for `make_template`.
    """
    return make_template(template_name(config), tokenizer)


@dataclass(frozen=True)
class AnswerMarks:
    """The tokens around an answer.

    Attributes:
        ends: the tokens that end one.
        lead: what a model writes before its answer's own text, as gpt-oss names a channel; empty for most.
    """

    ends: tuple[int, ...]
    lead: tuple[int, ...] = ()


def answer_marks(tokenizer: PreTrainedTokenizerBase) -> AnswerMarks:
    """Returns what ends an answer (the tokenizer's end of text, and its chat template's end of turn) and what comes before it."""
    ends, lead = {tokenizer.eos_token_id}, ()
    if tokenizer.chat_template:
        with contextlib.suppress(ModelError):
            chat = ChatTemplate(tokenizer)
            ends.add(tokenizer.convert_tokens_to_ids(chat.end))
            lead = tuple(chat.encoder.plain([chat.lead])[0].ids.tolist()) if chat.lead else ()
    return AnswerMarks(tuple(sorted(end for end in ends if end is not None)), lead)
