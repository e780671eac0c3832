"""Writes into an exported folder what makes a server ask and answer as the run was trained and evaluated, and checks it there.

The chat template, the tokens that end an answer, and the settings that the answers were evaluated with. Knows nothing of weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import DataConfig, EvaluationConfig
from qlora_helpers.base.files import read_json, write_json, write_text
from qlora_helpers.base.text import brief
from qlora_helpers.data.examples import Example
from qlora_helpers.export.serving_template import Comparison, ServingTemplate, compared

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_serving_files(
    folder: Path, template: ServingTemplate, evaluation: EvaluationConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes `chat_template.jinja` and `generation_config.json` into the folder of an adapter or a merged model.

    Args:
        folder: holds the tokenizer's files.
        template: of the run.
        evaluation: how the answers were evaluated.
        tokenizer: the run's.
    """
    write_text(folder / "chat_template.jinja", template.text)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        values = read_json(settings)
        values.pop("chat_template", None)  # older tokenizers keep theirs here
        write_json(settings, values)
    write_json(folder / "generation_config.json", generation_settings(template, evaluation, tokenizer))


def generation_settings(
    template: ServingTemplate, evaluation: EvaluationConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Returns the evaluated settings by transformers' names; those of the base model, such as a penalty, are not among them."""
    found: dict[str, Any] = {
        "eos_token_id": list(template.ends),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "do_sample": evaluation.do_sample,
        "max_new_tokens": evaluation.max_new_tokens,
        "repetition_penalty": 1.0,
    }
    if evaluation.do_sample:
        found |= {"temperature": evaluation.temperature, "top_p": evaluation.top_p, "top_k": 0}
    return {key: value for key, value in found.items() if value is not None}


def sampling(evaluation: EvaluationConfig) -> dict[str, float]:
    """Returns the evaluated settings by GGUF's names; a temperature of 0 takes the likeliest token each time."""
    if not evaluation.do_sample:
        return {"temp": 0.0, "penalty_repeat": 1.0}
    return {"temp": evaluation.temperature, "top_p": evaluation.top_p, "top_k": 0, "min_p": 0.0, "penalty_repeat": 1.0}


def check_serving_files(
    folder: Path, config: DataConfig, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]
) -> Comparison:
    """Loads the tokenizer from an exported folder as a server does, and compares its prompts with those that were trained.

    Args:
        folder: of the adapter or the merged model.
        config: the run's data settings.
        tokenizer: the one that the run was trained with.
        rows: held-out rows.
    """
    from transformers import AutoTokenizer

    try:
        served = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the merged model may have taken hours and is kept
        return Comparison(len(rows), 0, f"its tokenizer does not load there: {brief(error)}")
    return compared(config, tokenizer, served, rows)


def server_options(evaluation: EvaluationConfig) -> str:
    """Returns the option by which vLLM samples as the answers were evaluated: it does not read `do_sample`."""
    values = {"temperature": evaluation.temperature if evaluation.do_sample else 0.0}
    return f"--override-generation-config '{json.dumps(values)}'"
