"""Turns examples into labelled sequences of tokens, packed or padded, and keeps them on disk.

Owns the preparation and the prepared data on disk. How an example becomes text is in `templates`, and tokens in `labels`; what a
sequence is is in `packing`, and where examples come from in `sources`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.base.files import content_digest, replaced_folder, write_json
from qlora_helpers.base.phases import current, passing
from qlora_helpers.data.duplicates import prompt_key
from qlora_helpers.data.examples import Example
from qlora_helpers.data.label_report import LabelReport, label_report
from qlora_helpers.data.labels import LabelSettings, label_rows
from qlora_helpers.data.outcome import Outcome, outcome_notes, shown_cut
from qlora_helpers.data.packing import PreparedData, pack
from qlora_helpers.data.plain_templates import Template
from qlora_helpers.data.prepared_file import prepared_path, read_prepared_file
from qlora_helpers.data.prepared_tables import read_sequences
from qlora_helpers.data.rows import Corpus
from qlora_helpers.data.scripts import ScriptSample
from qlora_helpers.data.sequences import MOVED, WaitingRows, numpy_sequences, save_sequences, sequence_dataset
from qlora_helpers.data.shots import RowSize, kept_rows, row_size
from qlora_helpers.data.spool import Spool, SpooledByName
from qlora_helpers.data.templates import template_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Settings that came later don't count while they have their default: data of earlier versions are still those of their run
FIRST_SETTINGS = (
    *("source", "dialogue_column", "summary_column", "template", "loss_on", "packing", "seq_len_tokens", "long_rows"),
    *("train_rows", "eval_rows", "test_rows", "seed"),
)


def prepare(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    no_packing: str | None = None,
    scratch: Path | None = None,
) -> PreparedData:
    """Labels and packs a corpus.

    Args:
        corpus: examples in three splits.
        tokenizer: the model's, with a padding token of its own.
        config: template, labels, `seq_len_tokens`.
        no_packing: why the model's rows can't be packed, a sentence; rows are then padded, and a note says why.
        scratch: a folder for the sequences, which are read from there afterwards; None keeps them in memory.

    Raises:
        DataError: a row is longer than `seq_len_tokens` and `long_rows` is `refuse`, or nothing is left to train on.
        ModelError: `template` is `chat`, and the tokenizer's chat template is missing or does not work.
    """
    template = template_of(config, tokenizer)
    notes = [*corpus.notes, *template.notes]
    packed = config.packing and no_packing is None
    if config.packing and no_packing is not None:
        notes.append(f"rows of this model are padded instead of packed: {no_packing}")
    seen = _Seen()
    files = [scratch and scratch / name for name in MOVED]
    scripts = ScriptSample(corpus.train)
    train, report = _sequences(corpus.train, template, config, packed, notes, files[0], seen, scripts)
    evaluation, eval_report = _sequences(corpus.eval, template, config, packed, notes, files[1])
    if not report.rows or not eval_report.rows:
        raise _nothing_left(report if not report.rows else eval_report, notes[len(corpus.notes) :], config, template)
    source = f"{corpus.name} ({corpus.licence})"
    answers, shots = kept_rows(corpus.train, seen.sizes, config.seed)
    return PreparedData(
        train,
        evaluation,
        tuple(corpus.test),
        report,
        eval_report,
        packed,
        config.seq_len_tokens,
        tuple(dict.fromkeys(notes)),
        source,
        frozenset(seen.keys),
        answers,
        shots,
        template.name,
        config,
        dict(scripts.counts.most_common()),
    )


@dataclass
class _Seen:
    """What is kept of training rows as they go by, so that a large source is gone through once."""

    keys: set[str] = field(default_factory=set)
    sizes: list[RowSize] = field(default_factory=list)

    def passing(self, rows: Iterable[Example]) -> Iterator[Example]:
        """Yields the rows."""
        for row in rows:
            self.keys.add(prompt_key(row))
            self.sizes.append(row_size(row))
            yield row


def _nothing_left(report: LabelReport, notes: Sequence[str], config: DataConfig, template: Template) -> DataError:
    reasons = [note.partition("skipped, ")[2] for note in notes if ": skipped, " in note]
    too_long = [reason for reason in reasons if "sequence" in reason]
    if too_long or not reasons:
        return DataError(
            "no row fits into a sequence", got=f"data.seq_len_tokens={config.seq_len_tokens}", next_step="Raise it."
        )
    return DataError(
        f"no row can be trained with data.template={template.name}",
        got=f"{len(report.skipped)} rows that are skipped, the first since {reasons[0]}",
        next_step="Set data.template=plain." if template.name != "plain" else "Look at the rows.",
    )


def _sequences(
    examples: Sequence[Example],
    template: Template,
    config: DataConfig,
    packed: bool,
    notes: list[str],
    file: Path | None,
    seen: _Seen | None = None,
    scripts: ScriptSample | None = None,
) -> tuple[Dataset, LabelReport]:
    from datasets.utils.logging import is_progress_bar_enabled

    outcome, answers = Outcome(), SpooledByName[tuple[str, ...]](Spool())
    settings = LabelSettings(config.loss_on, config.train_on, config.long_rows, config.seq_len_tokens)
    waiting = WaitingRows()
    try:
        shown = passing(
            examples, "labelling", unit=" rows", disable=not (is_progress_bar_enabled() or current().is_own)
        )
        rows = scripts.passing(shown) if scripts else shown
        for row in label_rows(seen.passing(rows) if seen else rows, template, settings, outcome):
            waiting.add(row)
            answers.add(row.id, row.answers, sum(map(len, row.answers)))
        waiting.close()
        lengths = waiting.lengths
        groups = (
            pack(lengths, config.seq_len_tokens, seed=config.seed) if packed else [[i] for i in range(len(lengths))]
        )
        sequences = sequence_dataset(waiting, groups, file)
    finally:
        waiting.release()
    notes += outcome_notes(outcome)
    report = label_report(
        numpy_sequences(sequences),
        template.tokenizer,
        answers=answers,
        loss_on=config.loss_on,
        unended=outcome.unended,
        trimmed=tuple(outcome.trimmed),
        skipped=tuple(row_id for row_id, *_ in outcome.skipped),
        turns=outcome.turns,
        masked_turns=sum(outcome.masked.values()),
        trimmed_tokens=sum(tokens for _, tokens, _, _ in outcome.cuts),
        shown_cut=shown_cut(outcome.cuts),
    )
    return sequences, report


def fingerprint(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, can_pack: bool, content: str | None = None
) -> str:
    """A digest that changes whenever the prepared data would: of settings, tokenizer and the content of the source's files.

    Args:
        config: the data settings. The path of files counts for nothing: the same rows are the same under another name.
        tokenizer: the model's.
        can_pack: whether rows may be packed.
        content: digest of the source's files; None takes it of the files that are there.
    """
    content = content_digest(config.source) if content is None else content
    if content is not None:
        config = dataclasses.replace(config, source="the files with this content")
    return _mark(config, tokenizer, can_pack, content)


def _earlier_fingerprint(config: DataConfig, tokenizer: PreTrainedTokenizerBase, can_pack: bool) -> str:
    """The digest of version 0.1, in which the path counts too."""
    return _mark(config, tokenizer, can_pack, content_digest(config.source))


def _mark(config: DataConfig, tokenizer: PreTrainedTokenizerBase, can_pack: bool, content: str | None) -> str:
    settings = dataclasses.asdict(config)
    later = {item.name: item.default for item in dataclasses.fields(config) if item.name not in FIRST_SETTINGS}
    settings = {name: value for name, value in settings.items() if name not in later or value != later[name]}
    # Values that had other names: data of earlier versions are still those of their run
    settings["loss_on"] = {"answer": "summary"}.get(settings["loss_on"], settings["loss_on"])
    settings["long_rows"] = {"trim_end": "trim"}.get(settings["long_rows"], settings["long_rows"])
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())[:5000]).encode())
    digest.update(f"{len(tokenizer)} {tokenizer.eos_token_id} {tokenizer.pad_token_id} {can_pack}".encode())
    digest.update(str(tokenizer.chat_template).encode() if config.template in ("auto", "chat") else b"")
    digest.update(bytes.fromhex(content or ""))
    return digest.hexdigest()


def content_marks(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Digests of what settings don't say about the data: the vocabulary, and the source where it is files that are there."""
    marks = {"the tokenizer": hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()}
    content = content_digest(config.source)
    if content is not None:
        marks[f"the content of {Path(config.source).name}"] = content
    return marks


def save_prepared(data: PreparedData, folder: Path, mark: str, *, named: str = "", content: str = "") -> None:
    """Writes prepared data into a run's `data/`, whole or not at all.

    Args:
        data, folder: the data, and the run's `data/`.
        mark: their `fingerprint`.
        named: the source as the settings name it.
        content: digest of the source's files; empty where it is none.
    """
    with replaced_folder(folder) as temporary:
        save_sequences(data.train, temporary / "train")
        save_sequences(data.eval, temporary / "eval")
        write_json(
            prepared_path(temporary),
            {
                "fingerprint": mark,
                "named": named,
                "content": content,
                "packed": data.packed,
                "seq_len_tokens": data.seq_len_tokens,
                "source": data.source,
                "notes": list(data.notes),
                "report": vars(data.report),
                "eval_report": vars(data.eval_report),
                "test": [dataclasses.asdict(item) for item in data.test],
                "train_keys": sorted(data.train_keys),
                "train_answers": list(data.train_answers),
                "shots": [dataclasses.asdict(item) for item in data.shots],
                "template": data.template,
                "scripts": data.scripts,
            },
        )


def load_prepared(folder: Path, *marks: str) -> PreparedData | None:
    """Reads prepared data back, or returns None where there are none that were made with one of these fingerprints."""
    saved = read_prepared_file(folder)
    if saved is None or saved.fingerprint not in marks:
        return None
    return PreparedData(
        read_sequences(folder / "train"),
        read_sequences(folder / "eval"),
        saved.test,
        saved.report,
        saved.eval_report,
        saved.packed,
        saved.seq_len_tokens,
        saved.notes,
        saved.source,
        frozenset(saved.train_keys),
        saved.train_answers,
        saved.shots,
        saved.template,
        scripts=saved.scripts,
    )


def prepared(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    read: Callable[[DataConfig], Corpus],
    no_packing: str | None = None,
    settled: bool = False,
) -> PreparedData:
    """Returns the run's prepared data: those on disk if they still fit the settings, else newly made and saved.

    Where the source's files are gone or elsewhere, what was prepared from them is used.

    Args:
        config: the data settings.
        tokenizer: the model's.
        folder: the run's `data/`.
        read: reads the source (`sources.read_corpus`).
        no_packing: see `prepare`.
        settled: whether data on disk may be packed or padded as they are, since a proof on the loaded model chose that.
    """
    content, saved = content_digest(config.source), read_prepared_file(folder)
    if content is None and saved is not None and saved.named == config.source:
        content = saved.content or None
    can_pack = no_packing is None
    for choice in (can_pack, not can_pack) if settled else (can_pack,):
        mark = fingerprint(config, tokenizer, can_pack=choice, content=content)
        data = load_prepared(folder, mark, _earlier_fingerprint(config, tokenizer, choice))
        if data is not None:
            return dataclasses.replace(data, config=config)
    mark = fingerprint(config, tokenizer, can_pack=can_pack, content=content)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.scratch-") as scratch:
        data = prepare(read(config), tokenizer, config, no_packing=no_packing, scratch=Path(scratch))
        save_prepared(data, folder, mark, named=config.source, content=content or "")
        data = load_prepared(folder, mark)
    assert data is not None
    return dataclasses.replace(data, config=config)
