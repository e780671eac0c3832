"""Shuts down the SageMaker Studio app that a run trained in, so that an instance without work costs nothing."""

from __future__ import annotations

import logging

from qlora_helpers.base.errors import UserError
from qlora_helpers.runs import locks, sigterm
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.status import BY_INTERRUPT, BY_REQUEST, INTERRUPTED
from qlora_helpers.sagemaker.resources import stop_this_app

log = logging.getLogger(__name__)


def shut_app_down(run: Run) -> None:
    """Shuts this app down, unless a person ended the training or another training still uses the GPUs."""
    if run.status().exit_reason in (INTERRUPTED, BY_INTERRUPT, BY_REQUEST, sigterm.REASON):
        return
    try:
        locks.refuse_busy_gpus(locks.visible_gpus())
        log.warning("shutting down this app: %s", stop_this_app())
    except UserError as error:
        log.warning("the app was not shut down: %s", error)
