"""A whole run: composes the steps, and alone owns a run's state and its lock.

What the command line, `train(run)` in a cell and torchrun all enter. Each function takes a run, finds what earlier steps left
in its folder, does one step and writes what it made. Steps know nothing of each other; here is where they meet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.files import write_json
from qlora_helpers.base.text import Say
from qlora_helpers.evaluation.ask import ask, streaming_answers
from qlora_helpers.evaluation.comparison import ReloadCheck, answered, compared
from qlora_helpers.export.adapter import certify, load_adapter, save_adapter
from qlora_helpers.export.merge import SHARD_GIB
from qlora_helpers.machine.environment import versions
from qlora_helpers.model.run_model import RunModel
from qlora_helpers.model.shapes.families import supports_packing
from qlora_helpers.planning import out_of_memory, run_plan
from qlora_helpers.planning.measured import write_measured
from qlora_helpers.runs import locks, sigterm
from qlora_helpers.runs.folder import Run, add_to_plan
from qlora_helpers.runs.locks import MODEL_IN_USE
from qlora_helpers.runs.log import prints_into
from qlora_helpers.runs.opening import existing_run, open_run, runs_root
from qlora_helpers.runs.session import session
from qlora_helpers.runs.status import BY_REQUEST, INTERRUPTED
from qlora_helpers.training.checkpoints import refuse_other_than_trained_on

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.evaluation.evaluate import Evaluation
    from qlora_helpers.export.bundle import ExportReport
    from qlora_helpers.model.loading import LoadedModel
    from qlora_helpers.training.result import TrainResult

# What a notebook calls on the way through a run, whichever module holds it.
__all__ = [
    "Say",
    "add_adapters",
    "ask",
    "check_reload",
    "check_source",
    "evaluate",
    "existing_run",
    "is_main_process",
    "load",
    "load_adapter",
    "open_run",
    "prepare_data",
    "retry",
    "runs_root",
    "streaming_answers",
    "train",
    "versions",
]

log = logging.getLogger(__name__)


@out_of_memory.rescued
def load(run: Run, *, say: Say = print) -> LoadedModel:
    """Loads the run's base model and tokenizer, audited; over several GPUs as the plan shares its layers out."""
    from qlora_helpers.model.loading import load_model

    config = run.config()
    return load_model(config.model, spread=lambda gpus: run_plan.layers_per_gpu(config, gpus), say=say)


def add_adapters(run: Run, loaded: LoadedModel) -> PeftModel:
    """Puts fresh adapters on a loaded model, as the run's settings say."""
    from qlora_helpers.model import lora

    config = run.config()
    return lora.add_adapters(loaded.model, config.adapter, seed=config.train.seed)


def check_source(run: Run) -> None:
    """Reads the data once before gigabytes of model are loaded, so that a mistake in it is told at once.

    Raises:
        DataError: the source can't be read or used.
    """
    from qlora_helpers.data.sources import read_corpus

    if not (run.data_dir / "prepared.json").exists():
        read_corpus(run.config().data)


def prepare_data(
    run: Run, tokenizer: PreTrainedTokenizerBase, *, shape: dict[str, Any], say: Say = print
) -> PreparedData:
    """The run's labelled and packed data: what is there if it still fits the settings, else made and saved.

    Args:
        run: the run.
        tokenizer: the model's.
        shape: the model's `config.json`; says whether packed rows can be kept apart.
        say: told what takes long.
    """
    from qlora_helpers.data.prepare import content_marks, prepared
    from qlora_helpers.data.sources import read_corpus

    refuse_other_than_trained_on(run, content_marks(run.config().data, tokenizer))
    config = run.config().data
    can_pack = supports_packing(shape, config.seq_len_tokens)
    data = prepared(config, tokenizer, run.data_dir, read=read_corpus, can_pack=can_pack)
    if not data.report.passed:
        raise UserError(
            "the label report failed: " + "; ".join(data.report.problems),
            next_step="Look at it in notebook 03 before training.",
        )
    return data


@out_of_memory.rescued
def train(
    run: Run,
    *,
    model: PeftModel | None = None,
    loaded: LoadedModel | None = None,
    show_progress: bool = True,
    shut_down_app: bool = False,
    say: Say = print,
) -> TrainResult:
    """Trains the run's adapters, or goes on from its newest good checkpoint, and saves the adapter.

    Args:
        run: the run.
        model: the model with adapters, where it is in memory already.
        loaded: the base model under `model`, or that gets adapters here.
        show_progress: whether progress is drawn: a live panel in a notebook, Trainer's bar elsewhere.
        shut_down_app: shut the SageMaker Studio app down when the training has ended, unless a person stopped it.
        say: told what takes long.

    Raises:
        RunError: another process trains this run or uses its GPUs, its dollars are used up, or training ended badly; the last good
            checkpoint is intact.
    """
    from qlora_helpers.data.prepare import content_marks
    from qlora_helpers.model import lora
    from qlora_helpers.training import train as training
    from qlora_helpers.training.callback import CallEachTime
    from qlora_helpers.training.tensorboard_events import event_callback, unanswered_samples

    config = run.config()
    main = is_main_process()
    show_progress = show_progress and not prints_into(run.log_path)
    with contextlib.ExitStack() as owned, contextlib.ExitStack() as undone:
        redraw = owned.enter_context(_shown_in_cell(run)) if show_progress and main else None
        owned.enter_context(sigterm.caught())
        if main:
            owned.enter_context(session(run, at_end=_shut_app_down if shut_down_app else None))
        if redraw:
            redraw()
        refuse_other_than_trained_on(run)
        if loaded is None:
            if main:
                check_source(run)
            loaded = load(run, say=say)
        model = model or undone.enter_context(_adapters_on(run, loaded))
        with _main_process_first(loaded):
            data = prepare_data(run, loaded.tokenizer, shape=loaded.shape, say=say)
        marks = content_marks(config.data, loaded.tokenizer) | loaded.checkpoint.marks
        events = event_callback(run, config, samples=unanswered_samples(data.test)) if main else None
        with MODEL_IN_USE, contextlib.closing(events) if events else contextlib.nullcontext():
            callbacks = [events] if events else []
            callbacks += [CallEachTime(redraw)] if redraw else []
            result = training.train(
                model,
                loaded.tokenizer,
                data,
                config.train,
                run,
                extra_callbacks=tuple(callbacks),
                show_progress=show_progress and not redraw,
                trained_on=refuse_other_than_trained_on(run, marks),
            )
        if main:
            log.info("%s", result)
            trained = RunModel(run, model, loaded)
            save_adapter(trained)
            if not sigterm.asked():  # seconds are left; the session that goes on certifies
                log.info("certificate:\n%s", certify(trained, data))
            if result.new_steps:  # nothing is measured where nothing was left to train
                write_measured(run, lora.count_parameters(model), loaded, result, data)
            run.set_status(
                state="stopped" if result.stopped else "finished",
                step=result.steps,
                exit_reason=result.stop_reason or "all steps are done",
            )
    return result


@contextlib.contextmanager
def _adapters_on(run: Run, loaded: LoadedModel) -> Iterator[PeftModel]:
    """Fresh adapters on a model; taken off again where the session fails, so that the next one can add its own."""
    from qlora_helpers.model import lora

    model = add_adapters(run, loaded)
    try:
        yield model
    except BaseException:
        lora.remove_adapters(model)
        raise


@out_of_memory.rescued
def retry(
    run: Run,
    *,
    model: PeftModel | None = None,
    loaded: LoadedModel | None = None,
    settings: Iterable[str] | dict[str, Any] | None = None,
    show_progress: bool = True,
    say: Say = print,
) -> TrainResult:
    """Goes on with a run that failed, from its last good checkpoint and without a restart of the process.

    Args:
        run: the run.
        model, loaded: as for `train`.
        settings: changes to the settings. None takes, after the run was out of memory, the fastest that should fit.
        show_progress, say: as for `train`.

    Raises:
        RunError: see `train`; a setting that can't change once training has begun.
    """
    settings = out_of_memory.next_settings(run) if settings is None else settings
    if settings:
        run.change_config(run.config().with_settings(settings))
        say("Going on with " + ", ".join(settings))
    return train(run, model=model, loaded=loaded, show_progress=show_progress, say=say)


@out_of_memory.rescued
def evaluate(
    run: Run, *, model: PeftModel | None = None, loaded: LoadedModel | None = None, say: Say = print
) -> Evaluation:
    """Asks base and tuned model the run's held-out rows and writes `evaluation.json`.

    Args:
        run: a run with a saved adapter.
        model: the tuned model, where it is in memory already; else the adapter is loaded onto the base.
        loaded: the base model under `model`.
        say: told what takes long.
    """
    from qlora_helpers.evaluation import evaluate as evaluation
    from qlora_helpers.training.tensorboard_events import answered_samples, write_answers

    config = run.config()
    if model is None or loaded is None:
        loaded = load(run, say=say)
        model = load_adapter(run, loaded)
    data = prepare_data(run, loaded.tokenizer, shape=loaded.shape, say=say)
    with MODEL_IN_USE:
        result = evaluation.evaluate(
            model,
            loaded.tokenizer,
            data.test,
            config.evaluation,
            template=config.data.template,
            max_tokens=config.data.seq_len_tokens,
            train_keys=data.train_keys,
        )
    write_json(run.evaluation_path, result.to_dict() | {"random_weights": loaded.checkpoint.is_random})
    write_answers(run, config, *answered_samples(result))
    return result


@out_of_memory.rescued
def check_reload(run: Run, model: PeftModel, loaded: LoadedModel, *, prompts: int = 3, say: Say = print) -> ReloadCheck:
    """Loads base and adapter again from disk and compares them with the model in memory; `plan.json` keeps the outcome.

    Raises:
        RunError: they differ.
    """
    data = prepare_data(run, loaded.tokenizer, shape=loaded.shape, say=say)
    fresh = load(run, say=say)
    reloaded = load_adapter(run, fresh)
    with MODEL_IN_USE:
        both = [answered(RunModel(run, each, fresh), data, prompts) for each in (model, reloaded)]
    check = ReloadCheck(**compared(*both))
    add_to_plan(run, reload=dataclasses.asdict(check))
    if not check.passed:
        raise RunError(str(check), next_step="Train again; the saved adapter is not the one that was trained.")
    return check


def export_run(
    run: Run,
    *,
    out: Path | None = None,
    merged: bool = True,
    drift: bool = True,
    shard_gib: float = SHARD_GIB,
    say: Say = print,
) -> ExportReport:
    """Writes what leaves the run: the adapter, the merged model and what servers need (`export.bundle`).

    Args:
        run: a trained run.
        out: the folder, new, empty or an earlier export; None takes `export` in the run's.
        merged: whether to write the merged model.
        drift: whether to measure how far it is from the adapter on 4-bit and on bfloat16 weights, where memory allows.
        shard_gib: size of a file of the merged model, GiB.
        say: told what takes long.

    Raises:
        RunError, ModelError: as `export.bundle.export` does.
    """
    from qlora_helpers.export.bundle import export

    def prepare(loaded: LoadedModel) -> PreparedData:
        return prepare_data(run, loaded.tokenizer, shape=loaded.shape, say=say)

    return export(run, out=out, merged=merged, prepare=prepare if drift else None, shard_gib=shard_gib, say=say)


def is_main_process() -> bool:
    """True but in the second and later processes of a torchrun job."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def _main_process_first(loaded: LoadedModel) -> Iterator[None]:
    """Under torchrun the first process prepares the data, the others then read it."""
    if "RANK" not in os.environ:
        yield
        return
    from accelerate import PartialState

    with PartialState(cpu=str(loaded.model.device) == "cpu").main_process_first():
        yield


def _shut_app_down(run: Run) -> None:
    """Shuts the Studio app down, unless a person ended the training or another one goes on beside it."""
    from qlora_helpers.sagemaker.resources import stop_this_app

    if run.status().exit_reason in (INTERRUPTED, BY_REQUEST, sigterm.REASON):
        return
    try:
        locks.refuse_taken_gpus(locks.visible_gpus())
        log.warning("shutting down this app: %s", stop_this_app())
    except UserError as error:
        log.warning("the app was not shut down: %s", error)


def _shown_in_cell(run: Run) -> contextlib.AbstractContextManager[Callable[[], None] | None]:
    """A live panel below the notebook cell that trains, as a function that redraws it; None outside a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if getattr(shell, "kernel", None) is None:
        return contextlib.nullcontext()
    from qlora_helpers.views.widgets import shown_in_cell

    return shown_in_cell(run)
