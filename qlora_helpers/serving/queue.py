"""Answers requests one after the other in a thread of its own, and hands their pieces to the event loop.

Whether the adapters are on is a state of the model, so one answer is given at a time. A client that has gone ends its answer at
the next token. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.serving.refusal import Refusal

log = logging.getLogger(__name__)
MOST_WAITING = 16
_LOOK_EVERY_S = 0.25
_END = object()
_Work = Callable[[], Iterator[Any]]


class AnswerQueue:
    """A thread that works off answers in the order in which they were asked.

    Args:
        most_waiting: answers that are taken at once, the one that is being given included.
    """

    def __init__(self, most_waiting: int = MOST_WAITING) -> None:
        self.most_waiting = most_waiting
        self._waiting = 0
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closed = threading.Event()
        threading.Thread(target=self._work, name="answers", daemon=True).start()

    def close(self) -> None:
        """Ends the answer that is being given at its next token, and all that wait."""
        self._closed.set()

    def refuse_full(self) -> None:
        """Refuses a further answer while as many as may be wait already.

        Raises:
            Refusal: they do.
        """
        if self._waiting >= self.most_waiting:
            raise Refusal("Too many requests wait already; try again later.", status=429, code="rate_limit_exceeded")

    async def pieces(self, work: _Work, is_gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[Any]:
        """Yields what an answer yields. Where the caller stops asking, or `is_gone` says so, the answer ends at its next token.

        Args:
            work: makes the iterator of the answer; called in the thread.
            is_gone: whether nobody waits for it any more.

        Raises:
            Refusal: too many wait already, or the answer failed; what failed is in the log.
        """
        self.refuse_full()
        loop, found, gone = asyncio.get_running_loop(), asyncio.Queue[Any](), threading.Event()

        def put(value: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(found.put_nowait, value)

        def job() -> None:
            try:
                self._give(work, put, gone)
            finally:
                put(_END)

        self._waiting += 1
        try:
            self._jobs.put(job)
            looked = time.monotonic()
            while True:
                piece = None
                with contextlib.suppress(TimeoutError):
                    piece = await asyncio.wait_for(found.get(), _LOOK_EVERY_S)
                if piece is _END:
                    return
                if isinstance(piece, Refusal):
                    raise piece
                if piece is not None:
                    yield piece
                if time.monotonic() - looked >= _LOOK_EVERY_S:
                    if await is_gone():
                        return
                    looked = time.monotonic()
        finally:
            gone.set()
            self._waiting -= 1

    def _give(self, work: _Work, put: Callable[[Any], None], gone: threading.Event) -> None:
        if gone.is_set() or self._closed.is_set():
            return
        try:
            with contextlib.closing(work()) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    put(piece)
                    if gone.is_set() or self._closed.is_set():
                        return
        except Refusal as refusal:
            put(refusal)
        except UserError as error:
            log.warning("an answer failed: %s", error)
            put(Refusal(f"The answer failed: {error.problem}.", status=500))
        except Exception as error:
            log.exception("an answer failed")
            put(Refusal(_failure(error), status=503 if _is_out_of_memory(error) else 500))

    def _work(self) -> None:
        while True:
            self._jobs.get()()


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def _failure(error: BaseException) -> str:
    if not _is_out_of_memory(error):
        return "The answer failed; the server's log says why."
    import torch

    torch.cuda.empty_cache()
    return "Memory ran out during this answer. Ask for fewer tokens, or send a shorter conversation."
