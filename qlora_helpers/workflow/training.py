"""Trains a run: opens its session, saves and certifies the adapter, and records how the training ended."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from qlora_helpers.base import phases
from qlora_helpers.base.text import Say
from qlora_helpers.data.run_data import check_source
from qlora_helpers.export.adapter import ask_saved, certify, save_adapter
from qlora_helpers.export.certificate import TRAIN_AGAIN
from qlora_helpers.model.run_model import RunModel
from qlora_helpers.planning import out_of_memory
from qlora_helpers.planning.cost import cost_of_run
from qlora_helpers.planning.measured import write_measured
from qlora_helpers.runs import sigterm
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.locks import run_lock
from qlora_helpers.runs.log import prints_into
from qlora_helpers.runs.session import training_session
from qlora_helpers.sagemaker.after_training import shut_app_down
from qlora_helpers.training.checkpoint_choice import choice_in_words, go_back_to
from qlora_helpers.training.checkpoints import last_good_step, refuse_other_than_trained_on
from qlora_helpers.training.in_processes import several_by_plan, train_in_processes
from qlora_helpers.training.processes import is_main_process, several_machines, values_of_all
from qlora_helpers.training.rank_failures import failures_propagated
from qlora_helpers.workflow import preparing

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.model.loading import LoadedModel
    from qlora_helpers.training.result import TrainResult


log = logging.getLogger(__name__)


@out_of_memory.rescued
def train(
    run: Run,
    *,
    model: PeftModel | None = None,
    loaded: LoadedModel | None = None,
    show_progress: bool = True,
    shut_down_app: bool = False,
    in_this_process: bool = False,
    say: Say = print,
) -> TrainResult:
    """Trains the run's adapters, from the newest healthy checkpoint if there is one, and saves the adapter.

    Where several GPUs are free and the plan shares the work among processes, such as shards of a large model, it starts these and
    waits for them (`training.in_processes`), unless a model is in memory already.

    Args:
        run: the run.
        model: the model with adapters, if it is in memory already.
        loaded: the base model that `model` is built on, or that gets new adapters.
        show_progress: whether to show progress: a live panel in a notebook, a bar and a table of losses elsewhere.
        shut_down_app: whether to shut the SageMaker Studio app down after the training, unless a person stopped it.
        in_this_process: whether to train here, with the layers spread over the GPUs, whatever the plan finds fastest.
        say: called with a line on what takes long.

    Raises:
        RunError: another process trains this run or uses its GPUs, its budget is used up, or training ended badly.
    """
    from qlora_helpers.model.lora import removed_on_error
    from qlora_helpers.training.run_steps import train_steps
    from qlora_helpers.training.trackers import reporting
    from qlora_helpers.training.train import refuse_settings

    show_progress = show_progress and not prints_into(run.log_path)
    if loaded is None and model is None and not in_this_process and several_by_plan(run):
        with _shown_in_cell(run) if show_progress else contextlib.nullcontext() as redraw:
            return train_in_processes(run, redraw=redraw, shut_down_app=shut_down_app, say=say)

    def stuck(error: Exception) -> None:
        if is_main_process():
            out_of_memory.record_elsewhere(run, error)

    with (
        _session(run, show_progress, shut_down_app) as redraw,
        failures_propagated(stuck),
        contextlib.ExitStack() as undone,
    ):
        refuse_other_than_trained_on(run)
        if is_main_process() and (chosen := choice_in_words(run.checkpoints_dir)):
            say(chosen)
            log.info("%s", chosen)
        trackers = undone.enter_context(reporting(run, run.config())) if is_main_process() else []
        if loaded is None:
            if is_main_process():
                refuse_settings(run.config().train)
                check_source(run)
            loaded = preparing.load(run, say=say)
        if model is None:
            model = preparing.add_adapters(run, loaded)
            undone.enter_context(removed_on_error(model))
        data = preparing.prepare_data(run, loaded.tokenizer, shape=loaded.shape, model=model, say=say)
        if is_main_process():
            say(str(cost_of_run(run, loaded, data, done=last_good_step(run.checkpoints_dir))))
        show = phases.current() if show_progress and not redraw and is_main_process() else None
        result = train_steps(run, model, loaded, data, redraw=redraw, show=show, trackers=trackers)
        _save_result(run, model, loaded, data, result, say)
    return result


@contextlib.contextmanager
def _session(run: Run, show_progress: bool, shut_down_app: bool) -> Iterator[Callable[[], None] | None]:
    """Opens the run's training session in the main process; yields what redraws the panel in the cell, if there is one."""
    with contextlib.ExitStack() as stack:
        redraw = stack.enter_context(_shown_in_cell(run)) if show_progress and is_main_process() else None
        stack.enter_context(sigterm.catching())
        if is_main_process():
            stack.enter_context(training_session(run, at_end=shut_app_down if shut_down_app else None))
        if several_machines():
            from qlora_helpers.training.peers import joined

            stack.enter_context(joined(run))
        if redraw:
            redraw()
        yield redraw


def _save_result(
    run: Run, model: PeftModel, loaded: LoadedModel, data: PreparedData, result: TrainResult, say: Say
) -> None:
    """Saves and certifies the adapter, writes what was measured into `plan.json`, and records how the training ended.

    The first process writes. Where layers are shared out, the others take part in what the model is asked.
    """
    from qlora_helpers.model import parameter_counts
    from qlora_helpers.model.sharding import is_sharded

    trained = RunModel(run, model, loaded)
    ending, warning = any(values_of_all(sigterm.received())), ""
    if is_main_process():
        log.info("%s", result)
        save_adapter(trained)
    if not ending:  # after SIGTERM only seconds are left; the session that resumes will certify
        if is_main_process():
            warning = _certified(trained, data)
        elif is_sharded(model):
            ask_saved(trained, data)
    if not is_main_process():
        return
    if warning:
        say(f"WARNING: {warning}")
    if result.new_steps:  # a session without steps has measured nothing
        write_measured(run, parameter_counts.count_parameters(model), loaded, result, data)
    run.set_status(
        state="stopped" if result.stopped else "finished",
        step=result.steps,
        exit_reason=result.stop_reason or "all steps are done",
        warning=warning,
    )


def _certified(trained: RunModel, data: PreparedData) -> str:
    """Certifies the adapter, and returns what is wrong with it; empty if nothing is."""
    trained.run.set_status(phase="certifying")
    certificate = certify(trained, data)
    log.info("certificate:\n%s", certificate)
    problems = "; ".join(certificate.problems)
    return f"the saved adapter's certificate failed: {problems}. {TRAIN_AGAIN}" if problems else ""


@out_of_memory.rescued
def retry(
    run: Run,
    *,
    model: PeftModel | None = None,
    loaded: LoadedModel | None = None,
    settings: Iterable[str] | dict[str, Any] | None = None,
    checkpoint: int | None = None,
    show_progress: bool = True,
    say: Say = print,
) -> TrainResult:
    """Resumes a run that failed from its last healthy checkpoint, without restarting the process.

    Where training failed because its weights were spoilt, the checkpoints since the first abnormal step are set aside; where none
    is left, it starts anew from the untrained adapter. What was chosen is said.

    Args:
        settings: changes to the settings. If the run was out of memory, None takes the fastest settings that should fit.
        checkpoint: the step of a checkpoint to go on from, even if it was set aside; None takes the last healthy one.
        run, model, loaded, show_progress, say: as for `train`.

    Raises:
        RunError: as for `train`, there is no such checkpoint, or a setting would change that is fixed once the run has trained.
    """
    settings = out_of_memory.next_settings(run) if settings is None else settings
    if settings:
        run.change_config(run.config().with_settings(settings))
        texts = [f"{name}={value}" for name, value in settings.items()] if isinstance(settings, dict) else settings
        say("Going on with " + ", ".join(texts))
    if checkpoint is not None:
        with run_lock(run):
            go_back_to(run.checkpoints_dir, checkpoint)
    return train(run, model=model, loaded=loaded, show_progress=show_progress, say=say)


def _shown_in_cell(run: Run) -> contextlib.AbstractContextManager[Callable[[], None] | None]:
    """Shows a live panel below the cell that trains and yields what redraws it; None outside a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if getattr(shell, "kernel", None) is None:
        return contextlib.nullcontext()
    from qlora_helpers.views.widgets import shown_in_cell

    return shown_in_cell(run)
