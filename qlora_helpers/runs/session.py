"""One training session of a run: its locks, log, price and heartbeat, and a true status at its end whatever happens."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from qlora_helpers.base.errors import RunError
from qlora_helpers.machine.price import needed_price
from qlora_helpers.runs import locks
from qlora_helpers.runs.budget import refuse_spent_budget
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.heartbeat import beating
from qlora_helpers.runs.log import logged_to
from qlora_helpers.runs.status import INTERRUPTED

log = logging.getLogger(__name__)


@contextlib.contextmanager
def session(run: Run, *, at_end: Callable[[Run], None] | None = None) -> Iterator[None]:
    """Keeps a second trainer off this run and its GPUs, writes the log, and leaves a true status whatever happens.

    Args:
        run: the run.
        at_end: called when a session that began has ended, well or badly, while its locks are still held.
    """
    with locks.run_lock(run), logged_to(run.log_path):
        began = False
        try:
            config = run.config()
            refuse_spent_budget(config.train, run.status())
            price = needed_price(config.train)
            gpus = locks.visible_gpus() if config.model.device_map != "cpu" else ()
            with locks.gpu_locks(run, gpus):
                session = run.open_session(usd_per_hour=price.usd_per_hour if price else None).session
                began = True
                with beating(run, session):
                    yield
            run.requests.acknowledge_all("the training had ended already")
        except BaseException as error:
            reason = INTERRUPTED if isinstance(error, KeyboardInterrupt | SystemExit) else "an error"
            log.error("training ended: %s: %s", type(error).__name__, error)
            with contextlib.suppress(RunError):  # a full disk must not hide why
                run.set_status(state="failed", exit_reason=reason, last_error=f"{type(error).__name__}: {error}"[:2000])
                run.requests.acknowledge_all("the training failed first")
            raise
        finally:
            if at_end and began:
                at_end(run)
