"""Asks for rows as tokens in a process of its own, with the run's own tokenizer and without torch (`model.preview_process`).

A tokenizer and its chat template are programs of a stranger: one that does not end is ended, and the kernel goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import subprocess
import threading
import time
import weakref
from typing import Any

from qlora_helpers.base.config import DataConfig, ModelConfig
from qlora_helpers.base.python import python_command, python_environment
from qlora_helpers.data.examples import Example

MODULE = "qlora_helpers.model.preview_process"
ANSWER_S = 120.0
"""The longest wait for a row; the first one includes the import of transformers and the trial of the tokenizer."""
IDLE_S = 600
"""After so many seconds without a question the process ends by itself; the next question starts another."""


def request(model: ModelConfig, data: DataConfig, example: Example) -> str:
    """Returns the line that asks for a row's tokens."""
    asked = {"model": {"name": model.name, "revision": model.revision}, "data": dataclasses.asdict(data)}
    return json.dumps(asked | {"example": dataclasses.asdict(example)}, default=str) + "\n"


class TokenWriter:
    """One process, started with the first question, that answers one question after another."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._end: Any = None

    def ask(self, line: str, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """Returns the answer to a request (`request`); `{"error": text}` where there is none.

        Args:
            line: the request.
            timeout_s: the longest wait, in seconds.
        """
        with self._lock:
            try:
                process = self._started()
                assert process.stdin is not None
                process.stdin.write(line.encode())
                process.stdin.flush()
                answer = self._line(process, timeout_s)
            except OSError as error:
                answer = None
                self.close()
                return {"error": f"the row can't be shown as tokens ({error})"}
            if answer is None:
                self.close()
                return {"error": "the tokenizer's process ended or took too long; the row is shown as text alone"}
            return dict(json.loads(answer))

    def close(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                python_command(MODULE, str(IDLE_S)),
                env=python_environment() | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,  # an interrupt of the kernel is none of this process
            )
            self._end = weakref.finalize(self, _end, self._process)
        return self._process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
        assert process.stdout is not None
        answer, deadline = b"", time.monotonic() + timeout_s
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            if not piece:
                return None
            answer += piece
        return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # type: ignore[union-attr]
    with contextlib.suppress(OSError):
        process.kill()
    process.wait()
