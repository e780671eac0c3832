"""A run's prepared data: its source checked early, and what is saved in its folder or prepared now."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.files import content_digest
from qlora_helpers.base.phases import bar
from qlora_helpers.data.prepare import prepared
from qlora_helpers.data.prepared_file import prepared_path
from qlora_helpers.data.rows import Corpus
from qlora_helpers.data.sources import read_corpus
from qlora_helpers.runs.folder import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.data.packing import PreparedData

BAR_AFTER_S = 3.0  # a small file shows no bar


def check_source(run: Run) -> None:
    """Reads the data before gigabytes of model are loaded, so that a mistake in it is reported at once.

    Raises:
        DataError: the source can't be read or used.
    """
    if not prepared_path(run.data_dir).exists():
        config = run.config().data
        _READ.clear()
        _READ[config, content_digest(config.source)] = _with_bar(config)


_READ: dict[tuple[DataConfig, str | None], Corpus] = {}  # what was read early, so that a large file is read once


def _once(config: DataConfig) -> Corpus:
    """Returns what `check_source` read, if its files are still the same, else reads the source; it is held no longer."""
    found = _READ.pop((config, content_digest(config.source)), None) if _READ else None
    _READ.clear()
    return found or _with_bar(config)


def _with_bar(config: DataConfig) -> Corpus:
    return read_corpus(config, progress=partial(bar, delay=BAR_AFTER_S, disable=None))


def run_data(
    run: Run, tokenizer: PreTrainedTokenizerBase, *, no_packing: str | None, settled: bool = False
) -> PreparedData:
    """Returns the run's labelled and packed data: what is saved if it still fits the settings, else prepares and saves it.

    Args:
        run: the run.
        tokenizer: the model's.
        no_packing, settled: as for `prepare.prepared`.

    Raises:
        DataError: the source can't be read or used.
        UserError: the label report failed.
    """
    data = prepared(run.config().data, tokenizer, run.data_dir, read=_once, no_packing=no_packing, settled=settled)
    if not data.report.passed:
        raise UserError(
            "the label report failed: " + "; ".join(data.report.problems),
            next_step="Look at it in notebook 03 before training.",
        )
    return data
