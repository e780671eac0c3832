"""Evaluates a run, in this process or in one of its own, by held-out rows or by a harness; checks that it reloads as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import read_json
from qlora_helpers.base.text import Say
from qlora_helpers.evaluation.comparison import ReloadCheck, answered, compared
from qlora_helpers.evaluation.evaluation_file import keep_evaluation, unwritable
from qlora_helpers.evaluation.metrics.choose import refuse_metric
from qlora_helpers.export.adapter import load_adapter, need_adapter
from qlora_helpers.model.run_model import RunModel
from qlora_helpers.planning import out_of_memory
from qlora_helpers.runs.buckets import refuse_unconfirmed
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.locks import MODEL_IN_USE
from qlora_helpers.runs.plan_file import add_to_plan
from qlora_helpers.training.processes import is_main_process
from qlora_helpers.training.rank_failures import failures_propagated
from qlora_helpers.workflow import preparing
from qlora_helpers.workflow.asking import rival_runs

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_helpers.evaluation.evaluate import Evaluation
    from qlora_helpers.evaluation.kept_answers import KeptAnswers
    from qlora_helpers.evaluation.metrics.own import Function
    from qlora_helpers.evaluation.run_evaluation import Subject
    from qlora_helpers.evaluation.suite_file import Suite
    from qlora_helpers.model.loading import LoadedModel
    from qlora_helpers.runs.launch_evaluation import StartedEvaluation
    from qlora_helpers.views.widgets.evaluation_panel import EvaluationPanel


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
    from qlora_helpers.evaluation.run_evaluation import evaluate_run

    writes = is_main_process()
    refuse_unconfirmed(run.config())
    if writes and (why := unwritable(run)):
        say(f"{run.folder} can't be written ({why}): evaluation.json will be kept in the current folder.")
    with failures_propagated():
        model, loaded = (None, None) if model is None or loaded is None else (model, loaded)
        if model is None:
            need_adapter(run)
            refuse_metric(run, metric)
        subject = _subject(run, rival_runs(run, rivals), model, loaded, say)

        def opened() -> PeftModel:
            return load_adapter(run, preparing.load(run, say=say)) if model is None else model

        result, kept = evaluate_run(subject, opened, metric=metric, again=again, say=say, writes=writes)
    if writes:
        _keep(result, kept, subject, say)
    return result


def _subject(run: Run, others: Sequence[Run], model: PeftModel | None, loaded: LoadedModel | None, say: Say) -> Subject:
    """Opens what is evaluated, without a model: checkpoint, tokenizer and data, whether the base model is loaded or not."""
    from qlora_helpers.evaluation.run_evaluation import Subject, refuse_unfit
    from qlora_helpers.model.checkpoints import find_checkpoint
    from qlora_helpers.model.tokenizers import tokenizer_of

    checkpoint = loaded.checkpoint if loaded else find_checkpoint(run.config().model, weights=False, say=say)
    refuse_unfit(run, others, checkpoint)
    tokenizer = loaded.tokenizer if loaded else tokenizer_of(checkpoint)
    shape = loaded.shape if loaded else checkpoint.shape or read_json(checkpoint.folder / "config.json")
    data = preparing.prepare_data(run, tokenizer, shape=shape, say=say)
    return Subject(run, checkpoint, tokenizer, data, others, model)


def _keep(result: Evaluation, kept: KeptAnswers, subject: Subject, say: Say) -> None:
    """Keeps the result, in the current folder where the run's can't be written, and reports the scores where the curves are."""
    from qlora_helpers.training.tensorboard_events import answered_samples, write_answers
    from qlora_helpers.training.trackers import report_scores

    run, is_random = subject.run, subject.checkpoint.is_random
    path = keep_evaluation(run, result, random_weights=is_random, asked=bool(kept.given), say=say)
    if path == run.evaluation_path:
        kept.finish(result.rows)
        samples, scores = answered_samples(result)
        write_answers(run, run.config(), samples, scores)
        report_scores(run, run.config(), scores)


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
    others = rival_runs(run, rivals)
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
        loaded = preparing.load(run, say=say)
        model = load_adapter(run, loaded)
    data = preparing.prepare_data(run, loaded.tokenizer, shape=loaded.shape, say=say) if HELD_OUT in names else None
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
    data = preparing.prepare_data(run, loaded.tokenizer, shape=loaded.shape, say=say)
    fresh = preparing.load(run, say=say)
    reloaded = load_adapter(run, fresh)
    with MODEL_IN_USE:
        both = [answered(RunModel(run, each, fresh), data, prompts) for each in (model, reloaded)]
    check = ReloadCheck(**compared(*both))
    add_to_plan(run, reload=dataclasses.asdict(check))
    if not check.passed:
        raise RunError(str(check), next_step="Train again; the saved adapter is not the one that was trained.")
    return check
