"""`prepared.json`: what a run's `data/` holds besides the sequences themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qlora_helpers.base.records import read_record
from qlora_helpers.data.examples import Example
from qlora_helpers.data.label_report import LabelReport


@dataclass(frozen=True)
class PreparedFile:
    """What `prepared.json` holds.

    Attributes:
        fingerprint: of everything that the prepared data depends on.
        packed: whether a sequence holds several rows.
        seq_len_tokens: length of a packed sequence.
        source: name and licence of the data.
        notes: what was skipped, trimmed or changed, each with its place.
        report, eval_report: label reports of the training and the evaluation set.
        test: rows held out for the final comparison.
        train_keys: `duplicates.prompt_key` of every training row.
        train_answers, shots, template, scripts: as in `packing.PreparedData`; files of earlier versions have none.
        named: the source as the settings named it, a path included.
        content: digest of the source's files, empty where it is none: the same rows are known by it under another path.
    """

    fingerprint: str
    packed: bool
    seq_len_tokens: int
    source: str
    notes: tuple[str, ...]
    report: LabelReport
    eval_report: LabelReport
    test: tuple[Example, ...]
    train_keys: tuple[str, ...] = ()
    train_answers: tuple[str, ...] = ()
    shots: tuple[Example, ...] = ()
    named: str = ""
    content: str = ""
    template: str = ""
    scripts: dict[str, int] = field(default_factory=dict)


def prepared_path(data_dir: Path) -> Path:
    """Returns the path of `prepared.json` in a run's `data/`."""
    return data_dir / "prepared.json"


def read_prepared_file(data_dir: Path) -> PreparedFile | None:
    """Reads `prepared.json` in a run's `data/`; None if no data is prepared.

    Raises:
        RunError: the file is damaged.
    """
    path = prepared_path(data_dir)
    if not path.exists():
        return None
    return read_record(path, PreparedFile, next_step=f"Delete the folder {data_dir.name}/; it is prepared again.")
