"""Loads a tokenizer and gives it a padding token that is not its end-of-text token. Owns the names of a tokenizer's files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers.base.config import ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.text import Say
from qlora_helpers.model import trial
from qlora_helpers.model.checkpoints import Checkpoint, find_checkpoint
from qlora_helpers.model.load_errors import load_errors_explained

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<|pad|>", "<pad>", "[PAD]", "<unk>", "[UNK]", ">>SUFFIX<<")
RESERVED = re.compile(r"[<\[|]*(reserved|unused|dummy|extra|placeholder)[ _-]?[a-z_]*[ _-]?\d+", re.IGNORECASE)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def tokenizer_files(folder: Path) -> list[Path]:
    """Returns the tokenizer's files that a folder holds."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def load_tokenizer(config: ModelConfig, *, say: Say = print) -> PreTrainedTokenizerBase:
    """Loads the model's tokenizer, with a padding token that is not its end-of-text token."""
    return tokenizer_of(find_checkpoint(config, say=say))


def tokenizer_of(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Loads the tokenizer from a checkpoint's folder, with a padding token that is not its end-of-text token.

    Raises:
        ModelError: it can't be loaded, does not end or asks for too much memory when tried (`model.trial`), or has no token to
            pad with.
    """
    from transformers import AutoTokenizer

    strange = checkpoint.origin != "random"  # that one we have written ourselves
    tried = trial.programs_in(checkpoint.folder, checkpoint.name) if strange else None
    if tried is not None:
        trial.try_out(tried, checkpoint.name)
    with load_errors_explained(f"the tokenizer of {checkpoint.name}"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    if tried is not None:
        trial.try_out(trial.programs_of(tokenizer, besides=tried), checkpoint.name)
    with load_errors_explained(f"the tokenizer of {checkpoint.name}"):
        tokenizer.decode(tokenizer("a b")["input_ids"])  # a setting of the wrong kind shows at the first use
    tokenizer.clean_up_tokenization_spaces = False  # it would strip spaces from a byte-level tokenizer's text
    set_pad_token(tokenizer)
    return tokenizer


def set_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the tokenizer a padding token that is not its end-of-text token, without adding a row to the embedding.

    With `pad_token = eos_token`, as in the 2023 recipe, transformers' collator masks the label of every end-of-text token, and
    the model never learns to stop.

    Where the vocabulary has no token for padding, a reserved one is taken, else any: what is padded is masked, so it is never read.

    Raises:
        ModelError: the tokenizer has no end-of-text token, or nothing else.
    """
    if tokenizer.eos_token is None:
        raise ModelError("the tokenizer has no end-of-text token", next_step="Choose another model.")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    spare = [token for token in PAD_TOKENS if token in vocabulary and token not in taken]
    spare += sorted(token for token in tokenizer.all_special_tokens if token not in taken)
    by_number = sorted((number, token) for token, number in vocabulary.items() if token not in taken)
    spare += [token for _, token in by_number if RESERVED.match(token)] if not spare else []
    spare += [token for _, token in by_number[-1:]]
    if not spare:
        raise ModelError("the tokenizer has no token to pad with", next_step="Choose another model.")
    tokenizer.pad_token = spare[0]


def refuse_tokens_without_row(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Sequence[int]], what: str
) -> None:
    """Refuses token ids that the model's embedding has no row for, as happens where tokens were added to the tokenizer alone.

    On a CPU they would end in an IndexError, on a GPU in an assertion that ends the process.

    Args:
        model: the model that would be given the ids.
        tokenizer: names the token.
        rows: token ids, `(tokens,)` each.
        what: what the rows are, such as `the training data`.

    Raises:
        ModelError: an id is too large; names the first such token and its row.
    """
    limit = model.get_input_embeddings().weight.shape[0]
    for number, row in enumerate(rows, start=1):
        largest = max(row, default=0)
        if largest >= limit:
            first = next(token for token in row if token >= limit)
            raise ModelError(
                f"{what} holds a token that the model's embedding has no row for",
                expected=f"numbers below {limit:,}",
                got=f"{tokenizer.convert_ids_to_tokens(int(first))!r}, which is {int(first):,}, in row {number:,}",
                next_step="Get the tokenizer and the chat template that belong to the model, or keep such tokens out of the data.",
            )
