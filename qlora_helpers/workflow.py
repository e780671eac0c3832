"""A whole run: composes the steps, and alone decides a run's state and holds its lock.

The command line, `train(run)` in a cell and every launched process enter here. Each function takes a run, reads what earlier
steps left in its folder, does one step and writes the result. The steps know nothing of each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.text import Say
from qlora_helpers.data.prepare import content_marks
from qlora_helpers.data.run_data import check_source, run_data
from qlora_helpers.evaluation.ask import ask, streaming_answers
from qlora_helpers.evaluation.comparison import ReloadCheck, answered, compared
from qlora_helpers.evaluation.evaluation_file import keep_evaluation, unwritable
from qlora_helpers.export.adapter import certify, load_adapter, save_adapter
from qlora_helpers.export.merge import SHARD_GIB
from qlora_helpers.machine.environment import versions
from qlora_helpers.model.run_model import RunModel
from qlora_helpers.model.shapes.families import packing_refusal
from qlora_helpers.planning import out_of_memory, run_plan
from qlora_helpers.planning.cost import cost_of_run
from qlora_helpers.planning.measured import write_measured
from qlora_helpers.runs import sigterm
from qlora_helpers.runs.buckets import refuse_unconfirmed
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.locks import MODEL_IN_USE
from qlora_helpers.runs.log import prints_into
from qlora_helpers.runs.opening import existing_run, open_run, runs_root
from qlora_helpers.runs.plan_file import add_to_plan
from qlora_helpers.runs.session import training_session
from qlora_helpers.sagemaker.after_training import shut_app_down
from qlora_helpers.training.checkpoints import has_trained, refuse_other_than_trained_on
from qlora_helpers.training.processes import is_main_process, main_process_first

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.evaluation.evaluate import Evaluation
    from qlora_helpers.evaluation.metrics.own import Function
    from qlora_helpers.evaluation.suite_file import Suite
    from qlora_helpers.export.bundle import ExportReport
    from qlora_helpers.model.loading import LoadedModel
    from qlora_helpers.training.result import TrainResult

# What a notebook calls in the course of a run, whichever module it is in
__all__ = [
    "add_adapters",
    "ask",
    "check_reload",
    "evaluate",
    "evaluate_suite",
    "existing_run",
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
    """Loads the run's base model and tokenizer and audits them; the plan distributes the layers over several GPUs."""
    from qlora_helpers.model.loading import load_model

    config = run.config()
    return load_model(config.model, spread=lambda gpus: run_plan.layers_per_gpu(config, gpus), say=say)


def add_adapters(run: Run, loaded: LoadedModel) -> PeftModel:
    """Adds new adapters to a loaded model, as the run's settings say."""
    from qlora_helpers.model import lora

    config = run.config()
    return lora.add_adapters(loaded.model, config.adapter, seed=config.train.seed)


def prepare_data(
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    *,
    shape: dict[str, Any],
    model: torch.nn.Module | None = None,
    say: Say = print,
) -> PreparedData:
    """Returns the run's labelled and packed data: what is saved if it still fits the settings, else prepares and saves it.

    Rows are packed where the model keeps them from attending to each other. A proof on the loaded model decides that; before there
    is one, its `config.json` does, and once the run has trained, the data that it trained on.

    Args:
        run: the run.
        tokenizer: the model's.
        shape: the model's `config.json`.
        model: the loaded model that is about to train, with or without adapters.
        say: called with a line on what takes long.

    Raises:
        UserError: the data can't be used, its label report failed, or the run has trained on other data.
    """
    refuse_other_than_trained_on(run, content_marks(run.config().data, tokenizer))
    config, forecast = run.config(), packing_refusal(shape)
    if model is None or not config.data.packing or has_trained(run):
        return run_data(run, tokenizer, no_packing=forecast, settled=True)
    from qlora_helpers.training import row_isolation

    longest, sequences = config.data.seq_len_tokens, config.train.micro_batch_size
    no_packing = row_isolation.packing_refusal(model, longest, sequences)
    if (no_packing is None) != (forecast is None):
        why = "its rows are proved not to attend to each other" if no_packing is None else no_packing
        log.info("rows are %s after all: %s", "packed" if no_packing is None else "padded", why)
    return run_data(run, tokenizer, no_packing=no_packing)


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
    """Trains the run's adapters, from the newest verified checkpoint if there is one, and saves the adapter.

    Args:
        run: the run.
        model: the model with adapters, if it is in memory already.
        loaded: the base model that `model` is built on, or that gets new adapters.
        show_progress: whether to show progress: a live panel in a notebook, Trainer's progress bar elsewhere.
        shut_down_app: whether to shut the SageMaker Studio app down after the training, unless a person stopped it.
        say: called with a line on what takes long.

    Raises:
        RunError: another process trains this run or uses its GPUs, its budget is used up, or training ended badly.
    """
    from qlora_helpers.model.lora import removed_on_error
    from qlora_helpers.training.run_steps import train_steps

    show_progress = show_progress and not prints_into(run.log_path)
    with _session(run, show_progress, shut_down_app) as redraw, contextlib.ExitStack() as undone:
        refuse_other_than_trained_on(run)
        if loaded is None:
            if is_main_process():
                check_source(run)
            loaded = load(run, say=say)
        if model is None:
            model = add_adapters(run, loaded)
            undone.enter_context(removed_on_error(model))
        with main_process_first(on_cpu=str(loaded.model.device) == "cpu"):
            data = prepare_data(run, loaded.tokenizer, shape=loaded.shape, model=model, say=say)
        if is_main_process():
            say(str(cost_of_run(run, loaded, data)))
        result = train_steps(run, model, loaded, data, redraw=redraw, show_bar=show_progress and not redraw)
        if is_main_process():
            _save_result(run, model, loaded, data, result)
    return result


@contextlib.contextmanager
def _session(run: Run, show_progress: bool, shut_down_app: bool) -> Iterator[Callable[[], None] | None]:
    """Opens the run's training session in the main process; yields what redraws the panel in the cell, if there is one."""
    with contextlib.ExitStack() as stack:
        redraw = stack.enter_context(_shown_in_cell(run)) if show_progress and is_main_process() else None
        stack.enter_context(sigterm.catching())
        if is_main_process():
            stack.enter_context(training_session(run, at_end=shut_app_down if shut_down_app else None))
        if redraw:
            redraw()
        yield redraw


def _save_result(run: Run, model: PeftModel, loaded: LoadedModel, data: PreparedData, result: TrainResult) -> None:
    """Saves and certifies the adapter, writes what was measured into `plan.json`, and records how the training ended."""
    from qlora_helpers.model import lora

    log.info("%s", result)
    trained = RunModel(run, model, loaded)
    save_adapter(trained)
    if not sigterm.received():  # after SIGTERM only seconds are left; the session that resumes will certify
        log.info("certificate:\n%s", certify(trained, data))
    if result.new_steps:  # a session without steps has measured nothing
        write_measured(run, lora.count_parameters(model), loaded, result, data)
    run.set_status(
        state="stopped" if result.stopped else "finished",
        step=result.steps,
        exit_reason=result.stop_reason or "all steps are done",
    )


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
    """Resumes a run that failed from its last verified checkpoint, without restarting the process.

    Args:
        settings: changes to the settings. If the run was out of memory, None takes the fastest settings that should fit.
        run, model, loaded, show_progress, say: as for `train`.

    Raises:
        RunError: as for `train`, or a setting would change that is fixed once the run has trained.
    """
    settings = out_of_memory.next_settings(run) if settings is None else settings
    if settings:
        run.change_config(run.config().with_settings(settings))
        say("Going on with " + ", ".join(settings))
    return train(run, model=model, loaded=loaded, show_progress=show_progress, say=say)


@out_of_memory.rescued
def evaluate(
    run: Run,
    *,
    model: PeftModel | None = None,
    loaded: LoadedModel | None = None,
    metric: Function | None = None,
    say: Say = print,
) -> Evaluation:
    """Asks the base and the tuned model the run's held-out rows and writes `evaluation.json`.

    Where the run's folder can't be written, that is said before anything is asked, and the result is kept in the current folder.

    Args:
        run: a run with a saved adapter.
        model: the tuned model, if it is in memory already; else the adapter is loaded onto the base model.
        metric: a function of an answer and a reference that returns a number, or a dict of numbers, of which higher is better;
            None takes what `evaluation.metric` says.
        loaded, say: as for `train`.

    Raises:
        UserError: the metric can't be used; nothing was asked yet.
    """
    from qlora_helpers.data.plain_templates import template_name
    from qlora_helpers.evaluation import evaluate as evaluation
    from qlora_helpers.training.tensorboard_events import answered_samples, write_answers

    config = run.config()
    refuse_unconfirmed(config)
    if why := unwritable(run):
        say(f"{run.folder} can't be written ({why}): evaluation.json will be kept in the current folder.")
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
            template=template_name(config.data),
            max_tokens=config.data.seq_len_tokens,
            long_rows=config.data.long_rows,
            train_keys=data.train_keys,
            train_answers=data.train_answers,
            shots=data.shots,
            metric=metric,
        )
    path = keep_evaluation(run, result, random_weights=loaded.checkpoint.is_random, say=say)
    if path == run.evaluation_path:
        write_answers(run, config, *answered_samples(result))
    return result


@out_of_memory.rescued
def evaluate_suite(
    run: Run,
    tasks: str | Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    batch_size: int | None = None,
    model: PeftModel | None = None,
    loaded: LoadedModel | None = None,
    say: Say = print,
) -> Suite:
    """Hands the base and the tuned model to lm-eval, EleutherAI's evaluation harness, and keeps what it says in `suite.json`.

    Args:
        run: a run with a saved adapter.
        tasks: names of lm-eval, paths of YAML files (which may name code to run), or `held_out` for the run's own held-out rows.
        limit, shots, chat, batch_size: as for `evaluation.suite.ask_tasks`.
        model, loaded, say: as for `evaluate`.

    Returns:
        The scores of all tasks that were asked with this adapter; the report shows them too.

    Raises:
        UserError: lm-eval is not installed, or a task is unknown, or can't be asked here.
    """
    from qlora_helpers.evaluation import suite
    from qlora_helpers.evaluation.suite_file import keep_suite
    from qlora_helpers.evaluation.suite_task import HELD_OUT
    from qlora_helpers.export.certificate import require_certificate

    suite.need_harness()
    names = suite.check_tasks(tasks)
    suite.check_numbers(limit=limit, shots=shots, batch_size=batch_size)
    certificate = require_certificate(run.adapter_dir)
    if model is None or loaded is None:
        loaded = load(run, say=say)
        model = load_adapter(run, loaded)
    data = prepare_data(run, loaded.tokenizer, shape=loaded.shape, say=say) if HELD_OUT in names else None
    with MODEL_IN_USE:
        found = suite.ask_tasks(
            RunModel(run, model, loaded),
            names,
            data,
            adapter_sha256=certificate.weights_sha256,
            limit=limit,
            shots=shots,
            chat=chat,
            batch_size=batch_size,
            say=say,
        )
    return keep_suite(run, found)


@out_of_memory.rescued
def check_reload(run: Run, model: PeftModel, loaded: LoadedModel, *, prompts: int = 3, say: Say = print) -> ReloadCheck:
    """Loads base model and adapter from disk, compares them with the model in memory, and writes the outcome to `plan.json`.

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
    """Exports what leaves the run: the adapter, the merged model and the files that servers need (`export.bundle`).

    Args:
        run: a trained run.
        out: the folder, which is new, empty or an earlier export; None takes `export` in the run's folder.
        merged, drift: whether to write the merged model, and to measure how far it is from the adapter on its base.
        shard_gib: size of a file of the merged model, GiB.
        say: as for `train`.

    Raises:
        UserError: as for `export.bundle.export`.
    """
    from qlora_helpers.export.bundle import export

    def prepare(loaded: LoadedModel) -> PreparedData:
        return prepare_data(run, loaded.tokenizer, shape=loaded.shape, say=say)

    return export(run, out=out, merged=merged, prepare=prepare if drift else None, shard_gib=shard_gib, say=say)


def _shown_in_cell(run: Run) -> contextlib.AbstractContextManager[Callable[[], None] | None]:
    """Shows a live panel below the cell that trains and yields what redraws it; None outside a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if getattr(shell, "kernel", None) is None:
        return contextlib.nullcontext()
    from qlora_helpers.views.widgets import shown_in_cell

    return shown_in_cell(run)
