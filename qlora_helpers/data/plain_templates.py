"""How a row becomes text without a chat template: by the 2023 recipe's prompt, or as plain text with any roles and turns.

A template renders a whole row for training, and its prompt for generation; the one is a prefix of the other, character by
character. The row's own text is never changed; what can't be written is refused with a reason (`rendering.RowProblem`). Knows
nothing of token ids, files or models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from qlora_helpers.base.config import DataConfig
from qlora_helpers.data.encoding import Encoder, control_strings
from qlora_helpers.data.examples import Example, Message
from qlora_helpers.data.rendering import ControlTokens, PlainText, Rendering, RowProblem, Turn, written_calls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECIPE_SUFFIX = "\n---\nSummary:\n"
_LABELS = {
    "system": "### System:\n",
    "user": "### User:\n",
    "assistant": "### Assistant:\n",
    "tool": "### Tool result:\n",
}


def template_name(config: DataConfig) -> str:
    """Returns the name of a run's template; `auto` takes the recipe's prompt for the embedded dialogues."""
    return "recipe" if config.template == "auto" and config.source == "embedded" else config.template


class Template:
    """What the three templates share: documents, and the tokenizer's control tokens.

    Attributes:
        name: `recipe`, `plain` or `chat`.
        control: the tokenizer's control tokens.
        end: the string of the token that ends a turn.
        notes: what a person should know about this template.
    """

    name = ""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.control = ControlTokens(control_strings(tokenizer))
        self.end: str = tokenizer.eos_token
        self.notes: tuple[str, ...] = ()

    @cached_property
    def encoder(self) -> Encoder:
        """Turns this template's texts into tokens."""
        return Encoder(self.tokenizer, self.control)

    def render(self, example: Example) -> Rendering:
        """Returns the whole row as text, with the turns that can be trained.

        Raises:
            RowProblem: this template can't write the row.
        """
        if not example.is_document:
            return self._conversation(example)
        text = PlainText(self.control)
        text.add(example.text)
        text.add(self.tokenizer.eos_token, own=True)
        return Rendering(str(text), (Turn(0, 0, text.length),), typed=tuple(text.typed), begin=True)

    def prompt(self, example: Example) -> Rendering:
        """Returns what the model is asked with: all before the row's last turn, to where the assistant begins to write.

        Raises:
            RowProblem: this template can't write the row.
        """
        raise NotImplementedError

    def opening(self, example: Example) -> str:
        """Returns what a question begins with, by which an answer ends that goes on with a question of its own; may be empty."""
        return ""

    def _conversation(self, example: Example) -> Rendering:
        raise NotImplementedError


class RecipeTemplate(Template):
    """The prompt of the 2023 recipe: an instruction with its text, a line, `Summary:`, and the answer."""

    name = "recipe"

    def _conversation(self, example: Example) -> Rendering:
        if len(example.messages) != 2:
            raise _not_the_recipe()
        text = self._asked(example)
        start = text.length
        text.add(example.messages[-1].content)
        text.add(self.end, own=True)
        turns = (Turn(1, start, text.length),) if example.messages[-1].learned else ()
        return Rendering(str(text), turns, typed=tuple(text.typed), begin=True)

    def prompt(self, example: Example) -> Rendering:
        """Returns the prompt; earlier questions with their answers may come before it, as examples to follow.

        Raises:
            RowProblem: the row is not made of questions and answers alone.
        """
        text = self._asked(example)
        return Rendering(str(text), typed=tuple(text.typed), begin=True)

    def opening(self, example: Example) -> str:
        asked = next(message for message in example.messages if message.role == "user")
        return asked.content[: asked.body[0]] if asked.body else ""

    def _asked(self, example: Example) -> PlainText:
        roles = [message.role for message in example.messages]
        calls = any(message.tool_calls for message in example.messages)
        if roles != ["user", "assistant"] * (len(roles) // 2) or not roles or example.tools or calls:
            raise _not_the_recipe()
        text = PlainText(self.control)
        for message in example.messages[:-1]:
            if message.role == "user":
                text.add(message.content)
                text.add(RECIPE_SUFFIX, own=True)
            else:
                text.add(message.content)
                text.add("\n\n", own=True)
        return text


def _not_the_recipe() -> RowProblem:
    return RowProblem("the recipe's prompt takes one instruction and one answer alone (data.template=plain takes all)")


class PlainTemplate(Template):
    """Plain text for models without a chat template: any roles, any number of turns, each under a line that names its role."""

    name = "plain"

    def _conversation(self, example: Example) -> Rendering:
        text, turns = self._written(example, example.messages)
        return Rendering(str(text), tuple(turns), typed=tuple(text.typed), begin=True)

    def prompt(self, example: Example) -> Rendering:
        text, _ = self._written(example, example.messages[:-1])
        text.add(("\n\n" if text.length else "") + _LABELS["assistant"], own=True)
        return Rendering(str(text), typed=tuple(text.typed), begin=True)

    def opening(self, example: Example) -> str:
        return _LABELS["user"]

    def _written(self, example: Example, messages: Sequence[Message]) -> tuple[PlainText, list[Turn]]:
        text, turns = PlainText(self.control), []
        if example.tools:
            text.add("### Tools:\n", own=True)
            text.add("\n".join(json.dumps(dict(tool), ensure_ascii=False) for tool in example.tools))
        for number, message in enumerate(messages):
            text.add(("\n\n" if text.length else "") + _LABELS[message.role], own=True)
            start = text.length
            if message.role != "assistant":
                text.add(message.content)
                continue
            if message.thinking:
                text.add(f"<think>\n{message.thinking}\n</think>\n\n")
            text.add(message.content + written_calls(message))
            text.add(self.end, own=True)
            if message.learned:
                turns.append(Turn(number, start, text.length))
        return text, turns
