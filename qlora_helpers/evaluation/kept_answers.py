"""Answers that are kept: each one in a run's `answers.jsonl` as soon as it is given, and those of an earlier `evaluation.json`.

An answer is known by a digest of all that it depends on: the model that gave it (base model and adapter, by their content), the
settings of the generation, the versions of the libraries, and the tokens of its prompt. So what is found again is exactly what
would be asked again, row by row, and nothing else. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from qlora_helpers.base.config import EvaluationConfig
from qlora_helpers.base.files import write_text
from qlora_helpers.base.folders import open_regular
from qlora_helpers.base.text import Say
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.guard import open_to_append
from qlora_helpers.runs.locks import is_being_evaluated

KEY = "asked"  # an answer's digest, in `evaluation.json` and `answers.jsonl`
MADE_WITH = ("torch", "transformers", "peft", "bitsandbytes")
MOST_BYTES, MOST_LEFT = 256 * 1024**2, 20_000  # of a file that is read; answers that a finished evaluation leaves in it
WAY = 1  # how answers are made; another number where that changes, so that older ones are asked again


def versions_that_matter() -> dict[str, str]:
    """Returns the versions that an answer depends on, without the builds of one version for other machines."""
    found = {}
    for name in MADE_WITH:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name).partition("+")[0]
    return found


def digest_of(mark: str, config: EvaluationConfig, prompt: Sequence[int], labelled: Mapping[str, Any] | None) -> str:
    """Returns the digest of a question to a model.

    Args:
        mark: of the model, its adapter included.
        config: how answers are generated; how they are scored does not count.
        prompt: token ids.
        labelled: the row's tokens and labels, of which the loss is taken; None where none is.
    """
    sampling = [config.temperature, config.top_p] if config.do_sample else None
    row = None if labelled is None else [list(labelled["input_ids"]), list(labelled["labels"])]
    values = [WAY, mark, config.max_new_tokens, sampling, versions_that_matter(), list(prompt), row]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


@dataclass
class KeptAnswers:
    """The answers that are known, and the file that takes new ones as they come.

    Attributes:
        marks: a digest of each model that is asked, by its name in an evaluation.
        known: values of answers by their digest.
        form: how the answers of the last evaluation were made.
        path: the file; None keeps answers in memory alone.
        reused: answers that were not asked again.
        given: answers that were given now.
    """

    marks: Mapping[str, str]
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    form: tuple[str, ...] = ()
    path: Path | None = None
    reused: int = 0
    given: int = 0
    _file: IO[str] | None = None

    def digest(self, model: str, config: EvaluationConfig, prompt: Sequence[int], labelled: Any) -> str:
        """Returns the digest of a question to one of the models."""
        return digest_of(self.marks[model], config, prompt, labelled)

    def begin(self, total: int, reused: int) -> None:
        """Writes that an evaluation of so many answers begins, of which some are known already."""
        self.reused = reused
        self._write(
            {"event": "start", "total": total, "known": reused, "pid": os.getpid(), "host": socket.gethostname()}
        )

    def add(self, digest: str, model: str, values: Mapping[str, Any]) -> None:
        """Keeps values of an answer, beside those that are known of it."""
        new = "text" in values and digest not in self.known
        self.given += new
        self.known[digest] = self.known.get(digest, {}) | dict(values)
        self._write({KEY: digest, "model": model, **values})

    def _write(self, record: dict[str, Any]) -> None:
        """Appends a line; where the disk does not take it, answers stay in memory, and only an interruption would lose them."""
        if self.path is None:
            return
        try:
            if self._file is None:
                self._file = _opened(self.path)
            self._file.write(json.dumps({"time": round(time.time(), 3)} | record) + "\n")
            self._file.flush()
        except OSError:
            self.close()
            self.path = None

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def finish(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Leaves in the file what `evaluation.json` does not hold, such as the answers of a run that was compared before."""
        self.close()
        if self.path is None:
            return
        used = {answer.get(KEY) for row in rows for answer in row["answers"].values()}
        left = [{KEY: digest, **values} for digest, values in self.known.items() if digest not in used][-MOST_LEFT:]
        if left:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in left))
        else:
            self.path.unlink(missing_ok=True)


def _opened(path: Path) -> IO[str]:
    """Opens the file to append, after ending a line that a killed process left half written."""
    with open_to_append(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return open_to_append(path, "a", encoding="utf-8")


def answers_path(run: Run) -> Path:
    """Returns the path of a run's `answers.jsonl`."""
    return run.folder / "answers.jsonl"


def read_kept(
    run: Run, evaluation: Mapping[str, Any], marks: Mapping[str, str], *, writable: bool = True
) -> KeptAnswers:
    """Reads the answers that a run holds.

    Args:
        run: the run.
        evaluation: the values of its `evaluation.json`, empty where there is none.
        marks: as for `KeptAnswers`.
        writable: whether new answers can be kept in the run's folder.
    """
    known: dict[str, dict[str, Any]] = {}
    for row in evaluation.get("rows", ()):
        for answer in row.get("answers", {}).values():
            if isinstance(answer.get(KEY), str):
                known[answer[KEY]] = {key: answer[key] for key in ANSWER if key in answer}
    for line in _lines(answers_path(run)):
        if isinstance(line.get(KEY), str):
            values = {key: line[key] for key in ANSWER if key in line}
            known[line[KEY]] = known.get(line[KEY], {}) | values
    known = {digest: values for digest, values in known.items() if _is_answer(values)}
    return KeptAnswers(marks, known, tuple(evaluation.get("form", ())), answers_path(run) if writable else None)


ANSWER = ("text", "tokens", "stopped", "nats", "loss_tokens")
"""The values of an answer that come from the model; all others are computed from them."""


def _is_answer(values: Mapping[str, Any]) -> bool:
    kinds = {"text": str, "tokens": int, "stopped": bool}
    whole = all(type(values.get(key)) is kind for key, kind in kinds.items())
    loss = [values[key] for key in ("nats", "loss_tokens") if key in values]
    return whole and len(loss) in (0, 2) and all(type(value) in (int, float) for value in loss)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of the file; lines that a killed process left half written are passed over."""
    try:
        with open_regular(path) as file:
            content = file.read(MOST_BYTES)
    except OSError:
        return
    for line in content.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


@dataclass(frozen=True)
class EvaluationProgress:
    """How far a run's evaluation has come.

    Attributes:
        done, total: answers that are there, and answers in all.
        running: whether a process of this machine is at it.
        model: who is answering, by its name in an evaluation; empty before the first answer.
        started: when it began, seconds since 1970.
        left_s: seconds that are left at the speed so far; None while nothing can be said.
        pid: the process that began it.
    """

    done: int
    total: int
    running: bool
    model: str
    started: float
    left_s: float | None
    pid: int = 0

    def __repr__(self) -> str:
        state = "is running" if self.running else "was interrupted; it goes on where it was"
        return f"{self.done} of {self.total} answers; the evaluation {state}"


def evaluation_progress(run: Run) -> EvaluationProgress | None:
    """Returns how far an evaluation has come that is running or was interrupted; None where there is neither."""
    start: dict[str, Any] = {}
    answers: set[str] = set()
    model, last = "", 0.0
    for line in _lines(answers_path(run)):
        if line.get("event") == "start":
            start, answers, last = line, set(), 0.0
        elif start and "text" in line:
            answers.add(str(line.get(KEY)))
            model, last = str(line.get("model", "")), _number(line.get("time"))
    if not start:
        return None
    known, total, began, pid = (_number(start.get(key)) for key in ("known", "total", "time", "pid"))
    seconds = last - began
    speed = len(answers) / seconds if answers and seconds > 0 else 0.0
    left = (total - known - len(answers)) / speed if speed else None
    done = int(known) + len(answers)
    return EvaluationProgress(done, int(total), is_being_evaluated(run), model, began, left, int(pid))


def _number(value: Any) -> float:
    return value if type(value) in (int, float) and value >= 0 else 0


@contextlib.contextmanager
def kept_in_run(kept: KeptAnswers) -> Iterator[None]:
    """Closes the file of kept answers however the block ends."""
    try:
        yield
    finally:
        kept.close()


def say_reused(kept: KeptAnswers, made: str, say: Say) -> None:
    """Says how many answers were not asked again, and why."""
    if not kept.reused:
        return
    if not kept.given:
        when = f" of {made}" if made else ""
        say(
            f"Nothing was asked: all {kept.reused} answers{when} are for this adapter, these rows, settings and versions. "
            "`again=True` asks anew."
        )
    else:
        say(f"{kept.reused} of {kept.reused + kept.given} answers were there already, and the others were asked now.")
