"""Dialogues -> labelled blocks of tokens, packed with their rows kept apart, or padded.

Owns packing, the collator and the prepared data on disk. What a dialogue looks like as tokens is `prompts`' and `labels`'
business; where dialogues come from is `sources`'.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.config import DataConfig
from qlora_helpers.errors import DataError
from qlora_helpers.labels import IGNORED, LabelledRow, LabelReport, label_report, label_row
from qlora_helpers.run import read_json, replaced_folder, write_json
from qlora_helpers.sources import Corpus, Dialogue

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedData:
    """What the trainer and the evaluation take.

    Attributes:
        train, eval: blocks with `input_ids`, `labels`, `segment_ids` (`(tokens,)` each) and `row_ids`.
        test: dialogues held out for the final comparison.
        report, eval_report: label reports of the two sets.
        packed: whether a block holds several rows.
        seq_len_tokens: length of a packed block.
        notes: what was left out, trimmed or changed on the way, each with its place.
        source: name and licence of the data.
    """

    train: Dataset
    eval: Dataset
    test: tuple[Dialogue, ...]
    report: LabelReport
    eval_report: LabelReport
    packed: bool
    seq_len_tokens: int
    notes: tuple[str, ...]
    source: str

    def __repr__(self) -> str:
        sizes = f"{self.report.rows} training, {self.eval_report.rows} evaluation and {len(self.test)} test rows"
        fill = self.report.tokens / max(1, len(self.train) * self.seq_len_tokens)
        how = f"{len(self.train)} blocks of {self.seq_len_tokens} tokens, {fill:.0%} full" if self.packed else "padded"
        return f"{self.source}: {sizes}; {how}"


def prepare(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, can_pack: bool = True
) -> PreparedData:
    """Labels and packs a corpus.

    Args:
        corpus: dialogues in three splits.
        tokenizer: the model's, with a padding token of its own.
        config: template, labels, block length.
        can_pack: False for a model that can't keep packed rows apart; rows are then padded, with a note.

    Raises:
        DataError: a row is longer than the block and `long_rows` is `refuse`, or nothing is left to train on.
    """
    notes = list(corpus.notes)
    packed = config.packing and can_pack
    if config.packing and not can_pack:
        notes.append("this model can't keep packed rows apart, so rows are padded instead")
    train, report = _blocks(corpus.train, tokenizer, config, packed, notes)
    evaluation, eval_report = _blocks(corpus.eval, tokenizer, config, packed, notes)
    if not report.rows or not eval_report.rows:
        raise DataError(
            "no row fits into a block", got=f"data.seq_len_tokens={config.seq_len_tokens}", next_step="Raise it."
        )
    source = f"{corpus.name} ({corpus.licence})"
    return PreparedData(
        train, evaluation, corpus.test, report, eval_report, packed, config.seq_len_tokens, tuple(notes), source
    )


def _blocks(
    dialogues: Sequence[Dialogue],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    packed: bool,
    notes: list[str],
) -> tuple[Dataset, LabelReport]:
    from datasets import Dataset
    from datasets.utils.logging import is_progress_bar_enabled
    from tqdm.auto import tqdm

    rows, left_out = [], []
    for item in tqdm(dialogues, desc="labelling", leave=False, disable=not is_progress_bar_enabled()):
        row = label_row(
            item.id, item.dialogue, item.summary, tokenizer, template=config.template, loss_on=config.loss_on,
            max_tokens=config.seq_len_tokens,
        )  # fmt: skip
        too_long = row is None or row.trimmed_tokens
        if too_long and config.long_rows == "refuse":
            raise DataError(
                f"{item.where}: the row is longer than the block",
                expected=f"at most {config.seq_len_tokens} tokens",
                next_step="Raise data.seq_len_tokens, or set data.long_rows to trim or drop.",
            )
        if row is None or (too_long and config.long_rows == "drop"):
            left_out.append(item.id)
            why = "its summary alone fills the block" if row is None else f"{row.trimmed_tokens} tokens too long"
            notes.append(f"{item.where}: left out, {why}")
            continue
        if row.trimmed_tokens:
            notes.append(f"{item.where}: the last {row.trimmed_tokens} tokens of its dialogue were cut off")
        rows.append(row)
    groups = pack([len(row) for row in rows], config.seq_len_tokens, seed=config.seed) if packed else _singles(rows)
    blocks = [_block([rows[index] for index in group]) for group in groups]
    report = label_report(
        blocks, tokenizer, summaries={item.id: item.summary for item in dialogues}, loss_on=config.loss_on,
        trimmed=[row.id for row in rows if row.trimmed_tokens], left_out=left_out,
    )  # fmt: skip
    return Dataset.from_list(blocks), report


def _singles(rows: Sequence[LabelledRow]) -> list[list[int]]:
    return [[index] for index in range(len(rows))]


def pack(lengths: Sequence[int], capacity: int, *, seed: int) -> list[list[int]]:
    """Puts rows into as few blocks as first-fit decreasing finds (at most 11/9 of the best; Johnson 1973).

    Args:
        lengths: tokens of each row, none longer than `capacity`.
        capacity: tokens of a block.
        seed: of the order among equally long rows, and of the blocks.

    Returns:
        Indices of the rows in each block; every row once.
    """
    order = list(range(len(lengths)))
    shuffler = random.Random(seed)
    shuffler.shuffle(order)
    order.sort(key=lambda index: -lengths[index])
    blocks: list[list[int]] = []
    room: list[int] = []
    for index in order:
        place = next((i for i, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            blocks.append([])
            room.append(capacity)
            place = len(blocks) - 1
        blocks[place].append(index)
        room[place] -= lengths[index]
    shuffler.shuffle(blocks)
    return blocks


def _block(rows: Sequence[LabelledRow]) -> dict[str, Any]:
    return {
        "input_ids": [token for row in rows for token in row.input_ids],
        "labels": [label for row in rows for label in row.labels],
        "segment_ids": [number for number, row in enumerate(rows, start=1) for _ in row.input_ids],
        "row_ids": [row.id for row in rows],
    }


@dataclass
class BlockCollator:
    """Blocks -> one batch of tensors.

    Padded rows get a two-dimensional mask. Packed blocks get positions that restart with every row and a block-diagonal causal
    mask, so no row sees another. Where the model's `forward` takes `logits_to_keep`, logits are computed at the positions whose
    next token is trained, and nowhere else: same loss and gradients, a fraction of the output layer's work.

    Args:
        pad_token_id: fills up short blocks; never trained, never attended to by a row.
        packed: whether blocks hold several rows.
        mask_dtype: None for a boolean mask (sdpa); a float type for an additive one (eager).
        pad_to: length of a packed batch; None pads to the longest block in it.
        keep_trained_logits: whether to add `logits_to_keep` and `shift_labels`.
    """

    pad_token_id: int
    packed: bool
    mask_dtype: torch.dtype | None = None
    pad_to: int | None = None
    keep_trained_logits: bool = True

    def __call__(self, blocks: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `labels`, `attention_mask` and, for packed blocks, `position_ids`: `(batch, tokens)` each, the
        packed mask `(batch, 1, tokens, tokens)`."""
        import torch

        length = max(self.pad_to or 0, *(len(block["input_ids"]) for block in blocks))
        ids = _padded([block["input_ids"] for block in blocks], length, self.pad_token_id)
        labels = _padded([block["labels"] for block in blocks], length, IGNORED)
        segments = _padded([block["segment_ids"] for block in blocks], length, 0)
        batch = {"input_ids": ids, "labels": labels}
        if self.packed:
            batch["position_ids"] = positions_in_row(segments)
            batch["attention_mask"] = _as_mask(rows_apart_mask(segments), self.mask_dtype)
        else:
            batch["attention_mask"] = segments.clamp(max=1)
        if self.keep_trained_logits:
            shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
            batch["logits_to_keep"] = (shifted != IGNORED).any(dim=0).nonzero().squeeze(-1)
            batch["shift_labels"] = shifted[:, batch["logits_to_keep"]].contiguous()
        return batch


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    import torch

    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long)


def positions_in_row(segments: torch.Tensor) -> torch.Tensor:
    """Positions that restart at 0 with every row.

    Args:
        segments: `(batch, tokens)`, the row's number at each token; a row's tokens stand together.
    """
    import torch

    index = torch.arange(segments.shape[1]).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def rows_apart_mask(segments: torch.Tensor) -> torch.Tensor:
    """True where token i may look at token j: the same row, and not later. `(batch, tokens)` -> `(batch, 1, tokens, tokens)`.

    Padding looks at padding, so that no line of the softmax is empty.
    """
    import torch
    from einops import rearrange

    same_row = rearrange(segments, "batch i -> batch 1 i 1") == rearrange(segments, "batch j -> batch 1 1 j")
    return same_row & torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()


def _as_mask(allowed: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    import torch

    if dtype is None:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def fingerprint(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, can_pack: bool) -> str:
    """Changes whenever the prepared data would: the settings, the tokenizer's vocabulary, the source file's content."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())[:5000]).encode())
    digest.update(f"{len(tokenizer)} {tokenizer.eos_token_id} {tokenizer.pad_token_id} {can_pack}".encode())
    digest.update(str(tokenizer.chat_template).encode() if config.template == "chat" else b"")
    source = Path(config.source).expanduser()
    if source.is_file():
        with open(source, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def save_prepared(data: PreparedData, folder: Path, mark: str) -> None:
    """Writes prepared data into a run's `data/`, whole or not at all."""
    with replaced_folder(folder) as temporary:
        data.train.save_to_disk(temporary / "train")
        data.eval.save_to_disk(temporary / "eval")
        write_json(
            temporary / "prepared.json",
            {
                "fingerprint": mark, "packed": data.packed, "seq_len_tokens": data.seq_len_tokens, "source": data.source,
                "notes": list(data.notes), "report": vars(data.report), "eval_report": vars(data.eval_report),
                "test": [dataclasses.asdict(item) for item in data.test],
            },
        )  # fmt: skip


def load_prepared(folder: Path, mark: str) -> PreparedData | None:
    """Reads prepared data back, or gives None where there is none that was made with the same fingerprint."""
    from datasets import Dataset

    if not (folder / "prepared.json").exists():
        return None
    saved = read_json(folder / "prepared.json")
    if saved["fingerprint"] != mark:
        return None
    reports = [
        LabelReport(**saved[key] | {name: tuple(saved[key][name]) for name in ("trimmed", "left_out")})
        for key in ("report", "eval_report")
    ]
    return PreparedData(
        Dataset.load_from_disk(str(folder / "train")), Dataset.load_from_disk(str(folder / "eval")),
        tuple(Dialogue(**item) for item in saved["test"]), *reports, saved["packed"], saved["seq_len_tokens"],
        tuple(saved["notes"]), saved["source"],
    )  # fmt: skip


def prepared(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    read: Callable[[DataConfig], Corpus],
    can_pack: bool = True,
) -> PreparedData:
    """The run's prepared data: what is there if it still fits the settings, else made and saved.

    Args:
        config: the data settings.
        tokenizer: the model's.
        folder: the run's `data/`.
        read: reads the source (`sources.read_corpus`).
        can_pack: see `prepare`.
    """
    mark = fingerprint(config, tokenizer, can_pack=can_pack)
    data = load_prepared(folder, mark)
    if data is None:
        data = prepare(read(config), tokenizer, config, can_pack=can_pack)
        save_prepared(data, folder, mark)
    return data
