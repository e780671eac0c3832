"""Asks a run's models questions, in pieces, one model or two side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_helpers.evaluation.ask import Answers
from qlora_helpers.export.adapter import load_adapter, need_adapter
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.opening import existing_run
from qlora_helpers.workflow import preparing

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_helpers.model.loading import LoadedModel
    from qlora_helpers.views.widgets.answers import AnswerPanel


log = logging.getLogger(__name__)


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
        need_adapter(run)

    def opened() -> tuple[PeftModel, LoadedModel]:
        base = preparing.load(run, say=log.info) if model is None or loaded is None else loaded
        return (load_adapter(run, base), base) if model is None or loaded is None else (model, base)

    others = rival_runs(run, rivals)
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


def rival_runs(run: Run, rivals: Sequence[Run | str]) -> list[Run]:
    """Opens runs that are named, in the folder that holds this one or by a path; those that are open stay as they are."""
    return [existing_run(each, root=run.folder.parent) if isinstance(each, str) else each for each in rivals]
