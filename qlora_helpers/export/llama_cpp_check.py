"""Asks llama.cpp, where it is installed, whether it cuts a run's prompts into the tokens that were trained."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.data.examples import Example
from qlora_helpers.data.prompts import prompt_tokens
from qlora_helpers.data.rendering import RowProblem, row_texts
from qlora_helpers.data.templates import template_of
from qlora_helpers.export.gguf_vocabulary import INSTEAD
from qlora_helpers.export.serving_template import ServingTemplate, rendered_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_INSTALLED = "llama.cpp did not check the tokens: llama-cpp-python is not installed"


def checked_by_llama_cpp(
    path: Path,
    config: DataConfig,
    served: ServingTemplate,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
) -> str:
    """Compares llama.cpp's tokens of held-out prompts with those that were trained.

    Args:
        path: the GGUF file, of which only the tokenizer is loaded.
        config: the run's data settings.
        served: what a server renders with.
        tokenizer: the run's.
        rows: held-out rows.

    Returns:
        What was found, in words.

    Raises:
        ModelError: the tokens differ, or llama.cpp refuses the file.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return NOT_INSTALLED
    import llama_cpp

    template = template_of(config, tokenizer)
    asked: list[tuple[str, list[int]]] = []
    for row in rows:
        if row.is_document or template.control.any_in(row_texts(row)):
            continue  # a server takes a control token's string for the token, wherever it is
        with contextlib.suppress(RowProblem):
            asked.append((rendered_text(served, tokenizer, row), prompt_tokens(row, template).ids))
    model = _vocabulary_of(llama_cpp, path)
    begin = tokenizer.bos_token or ""
    equal = 0
    for text, ids in asked:
        adds = bool(begin) and text.startswith(begin)  # llama.cpp's server takes it from the text and adds the token
        found = model.tokenize(text.removeprefix(begin).encode(), add_bos=adds, special=True)
        equal += found == ids
    model.close()
    if equal < len(asked):
        raise ModelError(
            "llama.cpp cuts prompts into other tokens than those that were trained",
            got=f"{len(asked) - equal} of {len(asked)} prompts",
            next_step=INSTEAD,
        )
    return f"llama.cpp cuts {equal} of {len(asked)} held-out prompts into the tokens that were trained"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps llama.cpp's lines off the screen while the block runs."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    try:
        yield
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, None)  # its own, as it was


def _vocabulary_of(llama_cpp: Any, path: Path) -> Any:
    try:
        with quietly():
            return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    except ValueError as error:
        raise ModelError(f"llama.cpp does not load {path.name}", next_step=INSTEAD) from error
