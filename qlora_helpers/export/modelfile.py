"""Writes Ollama's Modelfile: the weights, the template, what ends an answer, and the settings that were evaluated.

Sources: Ollama's documentation of the Modelfile and of templates (https://docs.ollama.com/modelfile). No Ollama has loaded what is
written here; its template is proved with Go's own `text/template` (tests/export/test_go_template.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.export.serving_template import ServingTemplate
from qlora_helpers.export.turn_format import INSTEAD, Messages, TurnFormat, go_template, turn_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def turns_of(template: ServingTemplate, tokenizer: PreTrainedTokenizerBase) -> TurnFormat:
    """Takes the template of an export apart.

    Raises:
        ModelError: Ollama's template language can't write it.
    """

    def render(messages: Messages) -> str:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template.text,
            add_generation_prompt=True,
            tokenize=False,
        )

    return turn_format(render, template.end)


def modelfile(
    gguf: str, template: ServingTemplate, tokenizer: PreTrainedTokenizerBase, config: RunConfig, licence: str
) -> tuple[str, list[str]]:
    """Writes the Modelfile of a GGUF file.

    Args:
        gguf: the file's name.
        template: of the export.
        tokenizer: the run's.
        config: the run's settings.
        licence: of the base model and the data, in a few lines.

    Returns:
        The text, and notes on what Ollama does differently.

    Raises:
        ModelError: Ollama's template language can't write the chat template.
    """
    turns = turns_of(template, tokenizer)
    begin = tokenizer.bos_token or ""
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{go_template(turns, begin=begin)}"""']
    if template.system:
        lines.append(f'SYSTEM """{_plain(template.system)}"""')
    lines += [f"PARAMETER {name} {value}" for name, value in parameters(config).items()]
    lines += [f'PARAMETER stop "{_stop(text)}"' for text in stop_strings(template, tokenizer)]
    lines.append(f'LICENSE """{_plain(licence)}"""')
    notes = []
    if turns.trims:
        notes.append("the template drops white space at a text's ends, which Ollama's can't: send texts without it")
    if not turns.takes_system:
        notes.append("the model was trained without a system's message; Ollama drops one")
    return "\n".join(lines) + "\n", notes


def parameters(config: RunConfig) -> Mapping[str, Any]:
    """Returns how answers were evaluated, by Ollama's names; what Ollama would add by itself is switched off."""
    evaluation = config.evaluation
    found: dict[str, Any] = {"temperature": evaluation.temperature if evaluation.do_sample else 0}
    if evaluation.do_sample:
        found |= {"top_p": evaluation.top_p, "top_k": 0, "min_p": 0}
    found |= {"repeat_penalty": 1.0, "num_predict": evaluation.max_new_tokens, "num_ctx": config.data.seq_len_tokens}
    return found


def stop_strings(template: ServingTemplate, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
    """Returns the strings of the tokens that end an answer."""
    return [str(text) for text in tokenizer.convert_ids_to_tokens(list(template.ends))]


def _stop(text: str) -> str:
    if '"' in text:
        raise ModelError("a Modelfile can't name this stop token", got=repr(text), next_step=INSTEAD)
    return text


def _plain(text: str) -> str:
    if '"""' in text:
        raise ModelError('a Modelfile can\'t hold a text with """', next_step=INSTEAD)
    return text
