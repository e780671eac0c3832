"""The chat template that an export carries: what a server renders from `messages` with it is what was trained, token for token.

The model's own template is not enough. A run may be trained on plain text, which no server writes; and what was decided for the
rows (the date, whether the model thinks, where a system's text goes) is decided again by each server. So the choices are written
into the template itself. Knows nothing of runs, weights and files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import DataConfig
from qlora_helpers.data.chat_rows import ChatTemplate
from qlora_helpers.data.chat_template import TEMPLATE_DATE, asks_for_date, chat_message
from qlora_helpers.data.examples import Example, Message
from qlora_helpers.data.plain_templates import RECIPE_SUFFIX, RecipeTemplate, Template
from qlora_helpers.data.prompts import prompt_tokens
from qlora_helpers.data.rendering import RowProblem, row_texts
from qlora_helpers.data.templates import answer_marks, template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DATE_CALL = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")

_RECIPE = """\
{%- for message in messages -%}
{%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{- raise_exception('this model was trained on one instruction and one answer, without a system message') -}}
{%- endif -%}
{%- if message.role == 'user' -%}{{- message.content + SUFFIX -}}
{%- else -%}{{- message.content + (eos_token if loop.last else '\\n\\n') -}}
{%- endif -%}
{%- endfor -%}
"""
_PLAIN = """\
{%- set labels = {'system': '### System:\\n', 'user': '### User:\\n',
    'assistant': '### Assistant:\\n', 'tool': '### Tool result:\\n'} -%}
{%- if tools -%}
{{- '### Tools:\\n' -}}
{%- for tool in tools -%}{{- tool | tojson + ('' if loop.last else '\\n') -}}{%- endfor -%}
{%- endif -%}
{%- for message in messages -%}
{{- ('' if loop.first and not tools else '\\n\\n') + labels[message.role] -}}
{%- if message.role == 'assistant' -%}
{%- if message.reasoning_content -%}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}{%- endif -%}
{{- message.content or '' -}}
{%- for call in message.tool_calls or [] -%}
{{- ('' if loop.first and not message.content else '\\n') + 'Call: {"name": ' + call.function.name | tojson -}}
{{- ', "arguments": ' + call.function.arguments | tojson + '}' -}}
{%- endfor -%}
{{- eos_token -}}
{%- else -%}{{- message.content -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ('\\n\\n' if messages or tools else '') + '### Assistant:\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class ServingTemplate:
    """What a server needs to ask a model as it was trained.

    Attributes:
        text: the jinja template.
        kind: `recipe`, `plain` or `chat`.
        ends: token ids that end an answer.
        end: the string that ends a turn.
        system: a system's text that the template writes where a conversation brings none; may be empty.
        thinks: whether rows hold thoughts; None where the template knows no thinking.
        notes: what a person who serves the model should know.
    """

    text: str
    kind: str
    ends: tuple[int, ...]
    end: str
    system: str = ""
    thinks: bool | None = None
    notes: tuple[str, ...] = ()


def serving_template(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example] = ()
) -> ServingTemplate:
    """Writes the template of a run for servers, and compares on rows of the run what it renders with what was trained.

    Args:
        config: the run's data settings.
        tokenizer: the run's.
        rows: held-out rows; they say whether the model thinks and which system's text they share.

    Raises:
        ModelError: the model's chat template does not work.
    """
    template = template_of(config, tokenizer)
    rows = [row for row in rows if not row.is_document]
    system = shared_system(config, rows)
    thinks: bool | None = None
    notes: list[str] = []
    if isinstance(template, ChatTemplate):
        text, thinks, notes = _pinned(template, rows)
    else:
        body = _RECIPE.replace("SUFFIX", _quoted(RECIPE_SUFFIX)) if isinstance(template, RecipeTemplate) else _PLAIN
        text = _beginning(template, body) + body
    if system and not isinstance(template, RecipeTemplate):
        text = _with_system(system, bool(getattr(template, "knows_system", True))) + text
    else:
        system = ""
        text = _without_system_role() * (not getattr(template, "knows_system", True)) + text
    ends = answer_marks(tokenizer).ends  # those by which answers were cut when the run was evaluated
    return ServingTemplate(text, template.name, ends, template.end, system, thinks, tuple(notes))


def shared_system(config: DataConfig, rows: Sequence[Example]) -> str:
    """Returns the system's text that every conversation of a run begins with; empty where they differ or have none."""
    if config.system:
        return config.system
    found = {row.messages[0].content if row.messages[0].role == "system" else "" for row in rows}
    return found.pop() if len(found) == 1 else ""


def rendered_ids(
    template: ServingTemplate | str, tokenizer: PreTrainedTokenizerBase, example: Example, *, system: bool = True
) -> list[int]:
    """Returns a row's prompt as the tokens of a server of `messages`: by transformers' own rendering, with no argument of ours.

    Args:
        template: of the export.
        tokenizer: the run's.
        example: a conversation that ends with the assistant's turn, whose text does not count.
        system: False leaves the system's message to the template.
    """
    return _rendered(template, tokenizer, example, system, tokenize=True)


def rendered_text(template: ServingTemplate | str, tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """Returns a row's prompt as the text that a server of `messages` renders."""
    return _rendered(template, tokenizer, example, True, tokenize=False)


def _rendered(
    template: ServingTemplate | str,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    system: bool,
    *,
    tokenize: bool,
) -> Any:
    messages = [chat_message(message) for message in example.messages[:-1]]
    if not system and messages and messages[0]["role"] == "system":
        messages = messages[1:]
    return tokenizer.apply_chat_template(
        messages,
        tools=[dict(tool) for tool in example.tools] or None,
        chat_template=template if isinstance(template, str) else template.text,
        add_generation_prompt=True,
        tokenize=tokenize,
        return_dict=False,
    )


_PROBE = Example("probe", "", (Message("user", "Hello!"), Message("assistant", "")))


def _beginning(template: Template, body: str) -> str:
    """Returns what a plain prompt begins with: nothing, or the begin-of-text token that the tokenizer adds to plain texts.

    A SentencePiece tokenizer puts a space before a text, but not behind a token that the text itself holds: there it is written.
    """
    trained = prompt_tokens(_PROBE, template).ids
    for found in ("", "{{- bos_token -}}\n", "{{- bos_token + ' ' -}}\n"):
        if rendered_ids(found + body, template.tokenizer, _PROBE) == trained:
            return found
    return ""  # `compared` says so


def _pinned(template: ChatTemplate, rows: Sequence[Example]) -> tuple[str, bool | None, list[str]]:
    """Returns the model's template with what was decided for the rows written into it, whether rows think, and notes."""
    text, notes = template.text, []
    if template.text_with_tools != text:
        text = "{%- if tools -%}" + template.text_with_tools + "{%- else -%}" + text + "{%- endif -%}"
    if asks_for_date(text):
        text = "{%- set strftime_now = true -%}" + _DATE_CALL.sub(_date, text)
        notes.append(f"the template writes one date, {TEMPLATE_DATE:%d %B %Y}, as it did in training")
    thinks = None
    if "enable_thinking" in text:
        count = sum(any(m.thinking or "</think>" in m.content for m in row.messages) for row in rows)
        thinks = 2 * count > len(rows)
        value = "true" if thinks else "false"
        text = (
            "{%- if enable_thinking is not defined -%}{%- set enable_thinking = " + value + " -%}{%- endif -%}" + text
        )
        if 0 < count < len(rows):
            notes.append("some rows hold thoughts and some do not; a request says which with enable_thinking")
    return text, thinks, notes


def _date(match: re.Match[str]) -> str:
    return _quoted(TEMPLATE_DATE.strftime(match["format"]))


def _with_system(system: str, knows_system: bool) -> str:
    """Jinja that adds the system's message where a conversation brings none."""
    added = (
        "{%- if not messages or messages[0].role != 'system' -%}"
        "{%- set messages = [{'role': 'system', 'content': " + _quoted(system) + "}] + messages -%}{%- endif -%}"
    )
    return added + ("" if knows_system else _without_system_role())


def _without_system_role() -> str:
    """Jinja that writes the system's text before the user's first one, for a template that takes no system role."""
    return (
        "{%- if messages and messages[0].role == 'system' -%}{%- set messages = [{'role': 'user', "
        "'content': messages[0].content + '\\n\\n' + messages[1].content}] + messages[2:] -%}{%- endif -%}"
    )


def _quoted(text: str) -> str:
    """A text as a jinja string; JSON's escapes are among jinja's."""
    return json.dumps(text, ensure_ascii=False)


@dataclass(frozen=True)
class Comparison:
    """Held-out prompts as a server renders them beside those that were trained.

    Attributes:
        prompts: how many were compared.
        equal: how many are equal, token for token.
        reason: why the first other one differs.
    """

    prompts: int
    equal: int
    reason: str = ""

    def __str__(self) -> str:
        because = f" ({self.reason})" if self.reason else ""
        return f"a server renders {self.equal} of {self.prompts} held-out prompts token for token as they were trained{because}"


def compared(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    served: PreTrainedTokenizerBase,
    rows: Sequence[Example],
) -> Comparison:
    """Compares the prompts that were trained with those that a server renders.

    Args:
        config: the run's data settings.
        tokenizer: the one that the run was trained with.
        served: loaded from the exported folder, with its own chat template.
        rows: held-out rows.
    """
    template = template_of(config, tokenizer)
    prompts = equal = 0
    reason = ""
    for row in rows:
        try:
            trained = prompt_tokens(row, template).ids if not row.is_document else []
        except RowProblem:
            continue
        if not trained:
            continue
        prompts += 1
        problem = "other tokens"
        try:
            ids = rendered_ids(str(served.chat_template), served, row)
        except Exception as error:  # a template is a program: it may raise anything
            ids, problem = [], f"the template raises {type(error).__name__}"
        equal += ids == trained
        if ids != trained and template.control.any_in(row_texts(row)):
            problem = "it holds the string of a control token, which a server takes for one"
        reason = reason or (problem if ids != trained else "")
    return Comparison(prompts, equal, reason)
