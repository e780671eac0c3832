"""Starts a run in one line: reads a person's data and a model's tokenizer, decides the settings and writes the run.

Owns `ql.new_run` and what `qlora new` prints. Loads no weights; the settings are decided in `planning.decisions`. A run folder is
written once everything is decided, whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import RENAMED, RunConfig
from qlora_helpers.base.errors import DataError, ModelError, UserError
from qlora_helpers.base.phases import bar
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.text import Say, short_name
from qlora_helpers.data.lengths import RowLengths, row_lengths
from qlora_helpers.data.rows import SPLITS, Corpus
from qlora_helpers.data.shots import kept_answers
from qlora_helpers.data.sources import read_corpus
from qlora_helpers.data.templates import template_of
from qlora_helpers.evaluation.metrics.choose import choose
from qlora_helpers.machine.hardware import Hardware
from qlora_helpers.machine.price import machine_price
from qlora_helpers.model.checkpoints import Checkpoint, find_checkpoint
from qlora_helpers.model.shapes.config_file import read_config_file
from qlora_helpers.model.tokenizers import tokenizer_of
from qlora_helpers.planning.cost import TrainingCost, training_cost
from qlora_helpers.planning.cpu_speed import cpu_threads
from qlora_helpers.planning.decide_batch import sequences_an_epoch
from qlora_helpers.planning.decided import Decided
from qlora_helpers.planning.decisions import decide_training
from qlora_helpers.planning.planned_start import PlannedStart, plan_start
from qlora_helpers.planning.run_plan import planned_tokens, this_machine
from qlora_helpers.planning.workload import TrainingTokens, Workload
from qlora_helpers.runs import opening
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.plan_file import DecidedSetting, add_to_plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROFILE = "own"  # what a run's config.json names instead of a profile
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Stand for what is decided last, so that a value set by hand is only held against what is really taken
_UNDECIDED = {"evaluation.max_new_tokens": 1, "data.seq_len_tokens": 1 << 24}
BAR_AFTER_S = 3.0
MOST_NOTES = 12
FEW_ROWS = 300  # of which a tenth is held out, and a tenth is for the evaluation loss


@dataclass(frozen=True, repr=False)
class NewSettings(Tabular):
    """A new run's settings, with what they were decided from.

    Attributes:
        config: all settings.
        decisions: those that were decided, with their values and reasons.
        rows: rows for training, for the evaluation loss and held out.
        source: the data's name.
        notes: what a person should know of the data and the settings.
        cost: what the training takes on this machine, as a start uses its GPUs.
        start: how a start shares the work of several GPUs; empty without these.
    """

    config: RunConfig
    decisions: tuple[DecidedSetting, ...]
    rows: tuple[int, int, int]
    source: str
    notes: tuple[str, ...]
    cost: TrainingCost
    start: str = ""

    def table(self) -> Table:
        """Returns the decisions, the notes and the line on time and price."""
        model = short_name(self.config.model.name, keep_owner=True)
        train, evaluation, test = (f"{count:,}" for count in self.rows)
        caption = (
            f"{self.source}: {train} rows to train {model} on, {evaluation} for the evaluation loss, {test} held out"
        )
        rows = [(each.setting, _shown(each.value), each.reason) for each in self.decisions]
        last = [self.start, str(self.cost)] if self.start else [str(self.cost)]
        return Table(["setting", "value", "reason"], rows, caption=caption, notes=[*self.notes, *last])


def new_run(
    name: str | os.PathLike[str] = "demo",
    *,
    profile: str | None = None,
    model: str | None = None,
    data: str | None = None,
    settings: Iterable[str] | Mapping[str, Any] = (),
    root: str | os.PathLike[str] | None = None,
    say: Say = print,
) -> Run:
    """Creates a run, or opens the run of that name if it has the same settings.

    With `model` or `data`, the settings are decided from the data, the model's tokenizer and the hardware that is there, and shown
    with their reasons; `settings` stay as they are. Without them the run starts from a profile.

    Args:
        name: the run's name below `root`, or a path.
        profile: the profile that a run without `model` and `data` starts from; None takes `$QLORA_PROFILE`, else `demo`.
        model: as `model.name` in the settings; None takes SmolLM2-135M-Instruct.
        data: as `data.source` in the settings; None takes the embedded dialogues.
        settings: changes to the settings, such as `["train.max_steps=20"]`.
        root: the folder that holds the runs; None takes `$QLORA_RUNS`, else `runs`.
        say: called with what was decided.

    Raises:
        UserError: settings are wrong, the data or the tokenizer can't be used, or there is a run of that name with other settings;
            no run is made, and nothing is changed.
    """
    settings = dict(settings) if isinstance(settings, Mapping) else list(settings)
    if model is None and data is None:
        return opening.new_run(name, profile=profile, settings=settings, root=root)
    if profile is not None:
        raise UserError(
            "a profile has settings of its own, and here they are decided from the data",
            got=f"profile={profile!r} beside a model or data",
            next_step="Leave out the profile, or give the model and the data as settings.",
        )
    run = opening.run_at(name, root)
    found = decide_settings(model=model, data=data, settings=settings, say=say)
    opening.refuse_other_settings(run, found.config)
    if not run.exists():
        _write(run, found)
    say(repr(found))
    return run


def _write(run: Run, found: NewSettings) -> None:
    """Writes a new run's folder; where that fails, a folder that was not there before is gone again."""
    was_there = run.folder.exists()
    try:
        run.save_config(found.config)
        add_to_plan(run, decisions=[vars(each) for each in found.decisions])
    except BaseException:
        if was_there:
            run.config_path.unlink(missing_ok=True)
        else:
            shutil.rmtree(run.folder, ignore_errors=True)
        raise


def decide_settings(
    *,
    model: str | None = None,
    data: str | None = None,
    settings: Iterable[str] | Mapping[str, Any] = (),
    hardware: Hardware | None = None,
    say: Say = print,
) -> NewSettings:
    """Decides the settings of a run on some data; writes nothing.

    Args:
        model, data, settings, say: as for `new_run`.
        hardware: the GPUs to decide for; None takes this machine's, or its CPU.

    Raises:
        UserError: settings are wrong, or the data or the tokenizer can't be used.
    """
    settings = dict(settings) if isinstance(settings, Mapping) else list(settings)
    asked: dict[str, Any] = {"model.name": model or MODEL} | ({} if data is None else {"data.source": data})
    config = RunConfig(profile=PROFILE).with_settings(_UNDECIDED).with_settings(asked).with_settings(settings)
    decided = Decided(config, _names(settings))
    corpus = _with_held_out(decided, _read(config))
    _decide_form(decided, corpus)
    checkpoint = find_checkpoint(config.model, weights=False, say=say)
    tokenizer = tokenizer_of(checkpoint)
    lengths = _measured(decided, corpus, tokenizer)
    _decide_metric(decided, corpus)
    shape = _shape(checkpoint)
    hardware, cores = hardware or _gpus(config), cpu_threads()
    several = hardware if hardware and hardware.gpus > 1 else None
    known = planned_tokens(decided.config.data) if several else None
    decide_training(decided, lengths, shape, hardware, cores=cores, known=known)
    started = _started(decided, shape, several, known) if several and known else None
    price = None if hardware else machine_price(config.train)
    cost = training_cost(
        started.config if started else decided.config,
        shape,
        rows=lengths.rows,
        tokens=lengths.tokens,
        sequences=sequences_an_epoch(decided.config, lengths, shape),
        trained_share=lengths.trained_share,
        hardware=hardware,
        cores=cores,
        usd_per_hour=hardware.price_usd_per_hour if hardware else price.usd_per_hour if price else None,
        layout=started.layout if started else None,
    )
    start = started.text(cost.peak_gib) if started else ""
    notes = [*(note for note in corpus.notes if " read as " not in note), *lengths.notes, *decided.notes]
    rest = [f"and {len(notes) - MOST_NOTES} more notes"] if len(notes) > MOST_NOTES else []
    rows = tuple(len(getattr(corpus, split)) for split in SPLITS)
    shown = *notes[:MOST_NOTES], *rest
    return NewSettings(decided.config, tuple(decided.decisions), rows, corpus.name, shown, cost, start)  # type: ignore[arg-type]


def _started(decided: Decided, shape: dict[str, Any], hardware: Hardware, known: TrainingTokens) -> PlannedStart | None:
    """Returns what a start makes of the settings on several GPUs; None where the model can't be planned: it spreads its layers."""
    config = decided.config
    try:
        return plan_start(Workload(config, shape, hardware, known.in_all(config), known.trained_share))
    except ModelError:
        return None


def _names(settings: Iterable[str] | Mapping[str, Any]) -> frozenset[str]:
    """Returns the full names of settings that were given, under today's names."""
    found = (str(setting).partition("=")[0].strip() for setting in settings)
    return frozenset(RENAMED.get(name, name) for name in found)


def _read(config: RunConfig) -> Corpus:
    return read_corpus(config.data, progress=partial(bar, delay=BAR_AFTER_S, disable=None))


def _with_held_out(decided: Decided, corpus: Corpus) -> Corpus:
    """Decides how many rows are held out of a small file, so that most of it is left to learn from."""
    count = sum(len(getattr(corpus, split)) for split in SPLITS)
    cut = any(" rows were cut with seed " in note for note in corpus.notes)
    if not cut or count >= FEW_ROWS or not {"data.eval_rows", "data.test_rows"}.isdisjoint(decided.by_hand):
        return corpus
    tenth = max(1, round(count / 10))
    decided.take("data.eval_rows", tenth, f"a tenth of {count:,} rows, since there are few")
    decided.take("data.test_rows", tenth, f"a tenth of {count:,} rows, since there are few")
    return _read(decided.config)


def _decide_form(decided: Decided, corpus: Corpus) -> None:
    noted = (note.rpartition("; data.format")[0].partition(" read as ")[2] for note in corpus.notes)
    why = next(filter(None, noted), "as the settings name its columns")
    if decided.config.data.source.startswith("embedded"):
        why = "the embedded corpus's own"
    decided.take("data.format", corpus.form, why)


def _measured(decided: Decided, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> RowLengths:
    """Settles the template and measures the training rows with it.

    Raises:
        DataError: no row can be trained.
        ModelError: the template that was set by hand does not work.
    """
    data = decided.config.data
    template = template_of(data, tokenizer)
    why = {
        "chat": "the model's own chat template works",
        "plain": "the model has no chat template" if not tokenizer.chat_template else "; ".join(template.notes),
        "recipe": "the embedded dialogues are those of the 2023 recipe",
    }
    decided.take("data.template", template.name, why[template.name])
    lengths = row_lengths(corpus.train, template, loss_on=data.loss_on, train_on=data.train_on, seed=data.seed)
    if not lengths.totals:
        raise DataError(
            f"no row of {corpus.name} can be trained with data.template={template.name}",
            got="; ".join(lengths.notes[:2]),
            next_step="Set data.template=plain." if template.name != "plain" else "Look at the rows.",
        )
    return lengths


def _decide_metric(decided: Decided, corpus: Corpus) -> None:
    answers = kept_answers(corpus.train, decided.config.data.seed)
    if answers:
        choice = choose(answers)
        decided.take("evaluation.metric", choice.name, choice.reason)


def _shape(checkpoint: Checkpoint) -> dict[str, Any]:
    return checkpoint.shape or read_config_file(checkpoint.folder / "config.json", checkpoint.name)


def _gpus(config: RunConfig) -> Hardware | None:
    """Returns this machine's GPUs, or None where the run would train on the CPU."""
    import torch

    if config.model.device_map == "cpu" or not torch.cuda.is_available():
        return None
    price = machine_price(config.train)
    try:
        found = this_machine(price.usd_per_hour if price else None)
    except UserError:  # a card that does not report its memory
        return None
    return replace(found, gpus=min(found.gpus, torch.cuda.device_count()))


def _shown(value: Any) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else f"{value}"
