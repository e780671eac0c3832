"""One training session of a run: its locks, log, price and heartbeat, and a true status at its end, whatever happens."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from qlora_helpers.base.addresses import redacted
from qlora_helpers.base.errors import RunError
from qlora_helpers.machine.price import needed_price
from qlora_helpers.runs import locks, sigterm
from qlora_helpers.runs.buckets import refuse_unconfirmed
from qlora_helpers.runs.budget import refuse_spent_budget
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.guard import refuse_links
from qlora_helpers.runs.heartbeat import sending_heartbeats
from qlora_helpers.runs.log import logged_to
from qlora_helpers.runs.ranks import machines
from qlora_helpers.runs.status import INTERRUPTED
from qlora_helpers.runs.trackers import refuse_missing

LONGEST_ERROR = 2000  # characters of a message that a status keeps
log = logging.getLogger(__name__)


@contextlib.contextmanager
def training_session(run: Run, *, at_end: Callable[[Run], None] | None = None) -> Iterator[None]:
    """Keeps other trainers off this run and its GPUs during the block, writes its log, and records how it ended.

    Args:
        run: the run.
        at_end: called after a session that had begun has ended, well or badly, while the run's lock is still held.

    Raises:
        RunError: another process trains this run or uses its GPUs, or its budget is used up.
        UserError: the budget is in dollars and the machine's price is unknown.
    """
    refuse_links(run.folder)
    with locks.run_lock(run), logged_to(run.log_path):
        began = False
        try:
            config = run.config()
            refuse_unconfirmed(config)
            refuse_spent_budget(config.train, run.status())
            refuse_missing(config.train)
            price = needed_price(config.train)
            gpus = locks.visible_gpus() if config.model.device_map != "cpu" else ()
            with locks.gpu_locks(run, gpus):
                number = run.open_session(usd_per_hour=price.usd_per_hour * machines() if price else None).session
                began = True
                with sending_heartbeats(run, number):
                    yield
            run.requests.acknowledge_all("the training had already ended")
        except BaseException as error:
            _record_failure(run, error)
            raise
        finally:
            if at_end and began:
                at_end(run)


def _record_failure(run: Run, error: BaseException) -> None:
    message = redacted(f"{type(error).__name__}: {error}")
    interrupted = isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and error.code == sigterm.EXIT_CODE
    )
    with contextlib.suppress(RunError):  # a full disk must not hide the error itself
        if interrupted:  # a person, or whoever sent SIGTERM, meant it: that is no failure
            log.info("training was interrupted")
            run.set_status(state="stopped", exit_reason=INTERRUPTED, last_error=None)
            run.requests.acknowledge_all("the training was interrupted first")
            return
        log.error("training ended: %s", message)
        run.set_status(state="failed", exit_reason="an error", last_error=message[:LONGEST_ERROR])
        run.requests.acknowledge_all("the training failed first")
