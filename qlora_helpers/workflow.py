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

from qlora_helpers.base import phases
from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import read_json
from qlora_helpers.base.text import Say
from qlora_helpers.data.prepare import content_marks
from qlora_helpers.data.run_data import check_source, run_data
from qlora_helpers.evaluation.ask import Answers, ask
from qlora_helpers.evaluation.comparison import ReloadCheck, answered, compared
from qlora_helpers.evaluation.evaluation_file import keep_evaluation, unwritable
from qlora_helpers.evaluation.metrics.choose import refuse_metric
from qlora_helpers.export.adapter import ask_saved, certify, load_adapter, need_adapter, save_adapter
from qlora_helpers.export.certificate import TRAIN_AGAIN
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
from qlora_helpers.training.in_processes import remark_on_loading, several_by_plan, train_in_processes
from qlora_helpers.training.processes import is_main_process, join, main_process_first, several_machines, values_of_all
from qlora_helpers.training.rank_failures import failures_propagated

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.evaluation.evaluate import Evaluation
    from qlora_helpers.evaluation.metrics.own import Function
    from qlora_helpers.evaluation.suite_file import Suite
    from qlora_helpers.export.bundle import ExportReport
    from qlora_helpers.export.leaving import Leaving
    from qlora_helpers.model.loading import LoadedModel
    from qlora_helpers.runs.launch_evaluation import StartedEvaluation
    from qlora_helpers.training.result import TrainResult
    from qlora_helpers.views.widgets.answers import AnswerPanel
    from qlora_helpers.views.widgets.evaluation_panel import EvaluationPanel

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
    """Loads the run's base model and tokenizer and audits them.

    The plan distributes the layers over several GPUs of one process; several processes share them as `train.share` says.
    """
    from qlora_helpers.model.loading import load_model
    from qlora_helpers.model.placement import on_a_gpu
    from qlora_helpers.model.shares import sharing

    config = run.config()
    shared = sharing(config.train.share)
    if shared.processes > 1:
        join(on_cpu=not on_a_gpu(config.model))
    elif remark := remark_on_loading(run):
        say(remark)
    return load_model(config.model, spread=lambda gpus: run_plan.layers_per_gpu(config, gpus), sharing=shared, say=say)


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
        with _first_prepares(run):
            return run_data(run, tokenizer, no_packing=forecast, settled=True)
    from qlora_helpers.training import row_isolation

    longest, sequences = config.data.seq_len_tokens, config.train.micro_batch_size
    no_packing = row_isolation.packing_refusal(model, longest, sequences)
    if (no_packing is None) != (forecast is None):
        why = "its rows are proved not to attend to each other" if no_packing is None else no_packing
        log.info("rows are %s after all: %s", "packed" if no_packing is None else "padded", why)
    with _first_prepares(run):  # after the proof, in which all take part where layers are shared out
        return run_data(run, tokenizer, no_packing=no_packing)


def _first_prepares(run: Run) -> contextlib.AbstractContextManager[None]:
    """Of several processes, lets the first prepare the data, and the others read what it wrote."""
    from qlora_helpers.model.placement import on_a_gpu

    return main_process_first(on_cpu=not on_a_gpu(run.config().model))


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
    """Trains the run's adapters, from the newest verified checkpoint if there is one, and saves the adapter.

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
        trackers = undone.enter_context(reporting(run, run.config())) if is_main_process() else []
        if loaded is None:
            if is_main_process():
                refuse_settings(run.config().train)
                check_source(run)
            loaded = load(run, say=say)
        if model is None:
            model = add_adapters(run, loaded)
            undone.enter_context(removed_on_error(model))
        data = prepare_data(run, loaded.tokenizer, shape=loaded.shape, model=model, say=say)
        if is_main_process():
            say(str(cost_of_run(run, loaded, data)))
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
    from qlora_helpers.model import lora
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
        write_measured(run, lora.count_parameters(model), loaded, result, data)
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
    rivals: Sequence[Run | str] = (),
    again: bool = False,
    say: Say = print,
) -> Evaluation:
    """Asks the base and the tuned model the run's held-out rows and writes `evaluation.json`.

    Each answer is kept as soon as it is there, so an evaluation that was interrupted goes on where it was; what the run holds
    already for this adapter, these rows, settings and versions is not asked again, and without a missing answer no model is loaded.
    Where the run's folder can't be written, that is said before anything is asked, and the result is kept in the current folder.
    Processes that share the model's layers ask it together, and the first one writes.

    Args:
        run: a run with a saved adapter.
        model: the tuned model, if it is in memory already; else the adapter is loaded onto the base model.
        metric: a function of an answer and a reference that returns a number, or a dict of numbers, of which higher is better;
            None takes what `evaluation.metric` says.
        rivals: further runs, or their names, on the same base model: they answer the same rows, each in its own prompt.
        again: whether to ask everything anew.
        loaded, say: as for `train`.

    Raises:
        UserError: the metric can't be used, or a rival has another base model; nothing was asked yet.
    """
    from qlora_helpers.evaluation.run_evaluation import Subject, evaluate_run, refuse_unfit
    from qlora_helpers.model.checkpoints import find_checkpoint
    from qlora_helpers.model.tokenizers import tokenizer_of
    from qlora_helpers.training.tensorboard_events import answered_samples, write_answers
    from qlora_helpers.training.trackers import report_scores

    config, writes = run.config(), is_main_process()
    refuse_unconfirmed(config)
    if writes and (why := unwritable(run)):
        say(f"{run.folder} can't be written ({why}): evaluation.json will be kept in the current folder.")
    with failures_propagated():
        model, loaded = (None, None) if model is None or loaded is None else (model, loaded)
        if model is None:
            need_adapter(run)
            refuse_metric(run, metric)
        others = [_existing_beside(run, each) if isinstance(each, str) else each for each in rivals]
        checkpoint = loaded.checkpoint if loaded else find_checkpoint(config.model, weights=False, say=say)
        refuse_unfit(run, others, checkpoint)
        tokenizer = loaded.tokenizer if loaded else tokenizer_of(checkpoint)
        shape = loaded.shape if loaded else checkpoint.shape or read_json(checkpoint.folder / "config.json")
        data = prepare_data(run, tokenizer, shape=shape, say=say)

        def opened() -> PeftModel:
            return load_adapter(run, load(run, say=say)) if model is None else model

        subject = Subject(run, checkpoint, tokenizer, data, others, model)
        result, kept = evaluate_run(subject, opened, metric=metric, again=again, say=say, writes=writes)
    if not writes:
        return result
    path = keep_evaluation(run, result, random_weights=checkpoint.is_random, asked=bool(kept.given), say=say)
    if path == run.evaluation_path:
        kept.finish(result.rows)
        samples, scores = answered_samples(result)
        write_answers(run, config, samples, scores)
        report_scores(run, config, scores)
    return result


def start_evaluation(run: Run, *, rivals: Sequence[Run | str] = (), again: bool = False) -> StartedEvaluation:
    """Evaluates a run in a process of its own and returns at once; `evaluation_panel(run)` shows how far it is.

    Args:
        run, rivals, again: as for `evaluate`.

    Raises:
        UserError: as for `evaluate`, or the run is being evaluated already.
    """
    from qlora_helpers.evaluation.run_evaluation import refuse_unfit
    from qlora_helpers.runs.launch_evaluation import launch_evaluation

    refuse_unconfirmed(run.config())
    others = [_existing_beside(run, each) if isinstance(each, str) else each for each in rivals]
    refuse_unfit(run, others)
    return launch_evaluation(run, rivals=others, again=again)


def evaluation_panel(run: Run, *, rivals: Sequence[Run | str] = ()) -> EvaluationPanel:
    """Makes a panel that evaluates a run in the background, shows how far it is, and the scorecard when it is done.

    A page that was closed comes back to it: the panel reads the run's folder alone.

    Args:
        run, rivals: as for `evaluate`.
    """
    from qlora_helpers.views.widgets.evaluation_panel import EvaluationPanel

    return EvaluationPanel(run, lambda run: start_evaluation(run, rivals=rivals))


def _existing_beside(run: Run, name: str) -> Run:
    """Opens another run by its name, in the folder that holds this one, or by a path."""
    return existing_run(name, root=run.folder.parent)


def streaming_answers(
    run: Run, model: PeftModel | None = None, loaded: LoadedModel | None = None, *, rivals: Sequence[Run | str] = ()
) -> Answers:
    """Makes a function that answers conversations in pieces, one at a time, as `answer_panel` takes it.

    Args:
        run: a run with a saved adapter.
        model, loaded: the tuned model and its base, if they are in memory; else they are loaded when the first question comes.
        rivals: further runs, or their names, on the same base model.

    Raises:
        UserError: the run has no adapter yet, or a rival was trained on another base model.
    """
    if model is None or loaded is None:
        run.need(
            run.adapter_dir / "adapter_model.safetensors", "Notebook 04_train (or `python -m qlora_helpers train`)"
        )

    def opened() -> tuple[PeftModel, LoadedModel]:
        base = load(run, say=log.info) if model is None or loaded is None else loaded
        return (load_adapter(run, base), base) if model is None or loaded is None else (model, base)

    others = [_existing_beside(run, each) if isinstance(each, str) else each for each in rivals]
    answers = Answers(run, others, opened)
    if model is not None and loaded is not None:
        answers.open()
    return answers


def playground(
    run: Run, *rivals: Run | str, model: PeftModel | None = None, loaded: LoadedModel | None = None
) -> AnswerPanel:
    """Makes a panel that holds a conversation with two models at once: the untuned one, the run, or other runs on its base model.

    It shows itself at once; without a model in memory the run's is loaded when the first question comes. Votes are kept in the
    run's `votes.json`.

    Args:
        run: a run with a saved adapter.
        rivals: further runs, or their names, on the same base model.
        model, loaded: as for `streaming_answers`.
    """
    from qlora_helpers.data.prepared_file import read_prepared_file
    from qlora_helpers.evaluation.votes import keep_vote
    from qlora_helpers.views.widgets.answers import answer_panel

    answers = streaming_answers(run, model, loaded, rivals=rivals)
    saved, config = read_prepared_file(run.data_dir), run.config().evaluation
    return answer_panel(
        answers,
        [row for row in saved.test if not row.is_document] if saved else (),
        temperature=config.temperature if config.do_sample else 0.0,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        vote=lambda vote: " ".join(keep_vote(run, vote, answers.runs).sentences()),
    )


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


def export_to(
    run: Run,
    to: str,
    *,
    quantize: str | None = None,
    out: Path | None = None,
    merged: bool = True,
    say: Say = print,
) -> Leaving:
    """Writes the run's model for one place where it goes next, with the commands that run it there (`export.leaving`).

    Args:
        run: a trained run.
        to: `adapter`, `merged`, `gguf`, `ollama`, `vllm`, `lmi` or `hub`.
        quantize: of GGUF files, the type of their values, such as `q8_0` or `q4_k_m`; None takes F16.
        out: the folder, which is new, empty or an earlier export; None takes `export-TO` in the run's folder.
        merged: False writes the adapter alone.
        say: as for `train`.

    Raises:
        UserError: as for `export.leaving.leave`.
    """
    from qlora_helpers.export.leaving import leave

    return leave(run, to, quantize=quantize, out=out, merged=merged, say=say)


def _shown_in_cell(run: Run) -> contextlib.AbstractContextManager[Callable[[], None] | None]:
    """Shows a live panel below the cell that trains and yields what redraws it; None outside a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if getattr(shell, "kernel", None) is None:
        return contextlib.nullcontext()
    from qlora_helpers.views.widgets import shown_in_cell

    return shown_in_cell(run)
