"""The training loop of one session of a run, with its TensorBoard events and what else is called at each step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qlora_helpers.base.phases import Show
from qlora_helpers.data.prepare import content_marks
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.locks import MODEL_IN_USE
from qlora_helpers.training import train as loop
from qlora_helpers.training.callback import CallEachTime
from qlora_helpers.training.checkpoints import refuse_other_than_trained_on
from qlora_helpers.training.phase_callback import PhaseCallback
from qlora_helpers.training.processes import is_main_process
from qlora_helpers.training.result import TrainResult
from qlora_helpers.training.tensorboard_events import event_callback, unanswered_samples

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainerCallback

    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.model.loading import LoadedModel


def train_steps(
    run: Run,
    model: PeftModel,
    loaded: LoadedModel,
    data: PreparedData,
    *,
    redraw: Callable[[], None] | None = None,
    show: Show | None = None,
    trackers: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Trains the model by the run's settings, from its newest verified checkpoint if there is one.

    Args:
        run: the run, whose session is open.
        model: the model with adapters.
        loaded: the base model that `model` is built on.
        data: the run's prepared data.
        redraw: called whenever there is something new to show.
        show: what shows a bar and the losses; None shows none.
        trackers: callbacks that hand the figures to experiment trackers.

    Raises:
        RunError: the run has trained on another model or other data, or training ended badly.
    """
    config = run.config()
    marks = content_marks(config.data, loaded.tokenizer) | loaded.checkpoint.marks
    events = event_callback(run, config, samples=unanswered_samples(data.test)) if is_main_process() else None
    callbacks = [each for each in (events, PhaseCallback(show) if show else None) if each]
    with MODEL_IN_USE, contextlib.ExitStack() as closed:
        for each in callbacks:
            closed.enter_context(contextlib.closing(each))
        callbacks += trackers
        callbacks += [CallEachTime(redraw)] if redraw else []
        return loop.train(
            model,
            loaded.tokenizer,
            data,
            config.train,
            run,
            extra_callbacks=tuple(callbacks),
            show_progress=False,
            trained_on=refuse_other_than_trained_on(run, marks),
        )
