"""How a command shows what it does: bars on a terminal, lines in a file or pipe, JSON for a program, or nothing.

Owns what `--quiet` and `--json` mean (docs/terminal.md) and keeps the libraries' own bars and remarks off the terminal. What they
warn of goes to the run's log.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import stat
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from qlora_helpers.base.addresses import redacted
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.phases import Show, showing
from qlora_helpers.base.text import plain
from qlora_helpers.base.units import duration

LIBRARIES = ("transformers", "peft", "bitsandbytes", "accelerate")
QUIET = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "DATASETS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}
OURS = Path(__file__).resolve().parents[1]
RESULTS = (
    *(
        "steps",
        "new_steps",
        "loss",
        "eval_loss",
        "seconds",
        "tokens_per_s",
        "peak_gib",
        "machine",
        "stopped",
        "stop_reason",
    ),
    *("scores", "gain", "scoring", "comparisons", "worth", "skipped", "remarks"),
)
"""What a result may hold: of a training, and of an evaluation, whose rows are in the run's evaluation.json."""
SHARE_TO_JUDGE_BY = 0.05  # what is left is said once so much of a phase is done
QUICK_S, EVERY_S = 2.0, 30.0  # a phase that took less has no line in a file; a longer one has one now and then
log = logging.getLogger("qlora_helpers.libraries")


class TerminalShow(Show):
    """One bar a phase, which stays as a line when it has ended."""

    is_own = True
    FORM = "{desc:<18}{bar:24} {n_fmt:>6} of {total_fmt}{unit}  {elapsed}, {remaining} left{postfix}"
    OPEN = "{desc:<18}{n_fmt}{unit}  {elapsed}{postfix}"

    def bar(self, desc: str, *, total: float | None = None, unit: str = "it", **options: Any) -> Any:
        from tqdm import tqdm

        wide = shutil.get_terminal_size().columns >= 60
        return tqdm(
            desc=desc,
            total=total,
            unit="" if unit == "it" else unit,
            bar_format=None if not wide else self.FORM if total is not None else self.OPEN,
            file=sys.stderr,
            delay=0.3,  # what is over sooner needs no bar
            mininterval=0.2,
            dynamic_ncols=True,
            **{name: options[name] for name in ("disable", "initial", "unit_scale") if options.get(name)},
        )

    def say(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)


class LineShow(Show):
    """Lines for a file or a pipe: a phase that takes long says now and then how far it is, and once that it has ended."""

    is_own = True

    def bar(self, desc: str, *, total: float | None = None, unit: str = "it", **options: Any) -> Any:
        return _Lines(self, desc, total, "" if unit == "it" else unit, options)

    def training(self, max_steps: int, done: int) -> Any:
        opened = super().training(max_steps, done)
        opened.hidden = True  # the table of losses says how far it is
        return opened

    def say(self, text: str) -> None:
        print(text, flush=True)


class _Lines:
    """A phase in lines."""

    def __init__(self, show: Show, desc: str, total: float | None, unit: str, options: Mapping[str, Any]) -> None:
        self.show, self.desc, self.total, self.unit = show, desc, total, unit
        self.hidden = bool(options.get("disable"))
        self.done = self._first = options.get("initial") or 0
        self._began = self._said = time.monotonic()
        self._closed = False

    def update(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self._said >= EVERY_S and not self.hidden:
            self._said = now
            self.show.say(f"{self.desc}: {self._amount()}{self._left(now)}")

    def _left(self, now: float) -> str:
        if not self.total or self.done - self._first < SHARE_TO_JUDGE_BY * (self.total - self._first):
            return ""  # the first of many takes longest
        left = (now - self._began) / (self.done - self._first) * (self.total - self.done)
        return f", about {duration(left)} left"

    def _amount(self) -> str:
        return f"{self.done:,.0f}" + (f" of {self.total:,.0f}" if self.total else "") + self.unit

    def set_postfix_str(self, text: str, *args: Any) -> None:
        """Says nothing: a line is not changed."""

    def close(self) -> None:
        seconds = time.monotonic() - self._began
        if not self._closed and not self.hidden and seconds >= QUICK_S:
            self.show.say(f"{self.desc}: {self._amount()} in {duration(seconds)}")
        self._closed = True

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class QuietShow(LineShow):
    """Nothing at all; errors come on stderr as always."""

    def say(self, text: str) -> None:
        """Says nothing."""


class JsonShow(LineShow):
    """An object a line on stdout (docs/terminal.md)."""

    def bar(self, desc: str, *, total: float | None = None, unit: str = "it", **options: Any) -> Any:
        if not options.get("disable"):
            self.event("phase", name=desc, total=total, unit=unit.strip())
        return _Lines(QuietShow(), desc, total, unit, options)

    def say(self, text: str) -> None:
        self.event("line", text=plain(text))

    def step(self, values: Mapping[str, Any]) -> None:
        self.event("step", **values)

    def result(self, command: str, found: Any, *, said: bool = False) -> None:
        self.event("result", command=command, **_values_of(found))

    def error(self, error: UserError) -> None:
        """Prints what a person can fix."""
        parts = {name: getattr(error, name, "") for name in ("problem", "expected", "got", "next_step")}
        self.event("error", text=str(error), **parts)

    def event(self, kind: str, **values: Any) -> None:
        """Prints an object with the key `event` and what belongs to it."""
        print(json.dumps({"event": kind, **values}, allow_nan=False), flush=True)


def _values_of(found: Any) -> dict[str, Any]:
    """What a command found, as plain values: the keys that docs/terminal.md promises."""
    if isinstance(found, Path):
        return {"path": str(found)}
    values = found.to_dict() if hasattr(found, "to_dict") else dataclasses.asdict(found)
    return {name: values[name] for name in RESULTS if name in values}


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds `--quiet` and `--json` to a command."""
    either = command.add_mutually_exclusive_group()
    either.add_argument("--quiet", action="store_true", help="print nothing but errors")
    either.add_argument("--json", action="store_true", help="print an object a line (docs/terminal.md)")


def as_options(options: argparse.Namespace) -> list[str]:
    """Returns the options of `add_options` for another process."""
    return [f"--{name}" for name in ("quiet", "json") if getattr(options, name)]


def chosen(*, quiet: bool = False, as_json: bool = False) -> Show:
    """Returns how this process shows what it does: of several processes of one training, the first alone does."""
    if as_json:
        return JsonShow() if os.environ.get("RANK", "0") == "0" else QuietShow()
    if quiet or os.environ.get("RANK", "0") != "0":
        return QuietShow()
    return TerminalShow() if sys.stderr.isatty() and sys.stdout.isatty() else LineShow()


@contextlib.contextmanager
def shown(*, quiet: bool = False, as_json: bool = False) -> Iterator[Show]:
    """Shows phases and figures as a command does, and keeps the libraries quiet, during the block."""
    show = chosen(quiet=quiet, as_json=as_json)
    with showing(show), _without_chatter(show):
        yield show


@contextlib.contextmanager
def _without_chatter(show: Show) -> Iterator[None]:
    """Keeps bars and remarks of libraries off the terminal; their warnings go to the package's log, which a run keeps."""
    keeps = _is_file(2)  # such as a background run's log, in which the libraries' warnings belong
    with contextlib.ExitStack() as undone:
        for name, value in QUIET.items():
            if name not in os.environ and not (keeps and name.endswith("VERBOSITY")):
                os.environ[name] = value
                undone.callback(os.environ.pop, name, None)
        undone.callback(setattr, warnings, "showwarning", warnings.showwarning)
        warnings.showwarning = _showwarning
        from transformers.utils import logging as theirs

        theirs.get_logger()  # makes the handler that prints
        if not keeps:
            _raise_levels(undone)
        _take_bars(theirs, show, undone)
        yield


def _is_file(number: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(number).st_mode)
    except OSError:
        return False


def _raise_levels(undone: contextlib.ExitStack) -> None:
    """Prints errors of libraries alone."""
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        printing = [each for each in logger.handlers if type(each) is logging.StreamHandler]
        for handler in printing:
            undone.callback(handler.setLevel, handler.level)
            handler.setLevel(logging.ERROR)
        if not printing:
            handler = logging.StreamHandler()
            handler.setLevel(logging.ERROR)
            logger.addHandler(handler)
            undone.callback(logger.removeHandler, handler)


def _take_bars(theirs: Any, show: Show, undone: contextlib.ExitStack) -> None:
    """Shows transformers' bar of loaded weights as a phase, and no other bar of its own."""

    def made(factory: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        if options.get("desc") == "Loading weights" and args:
            return _Passed(args[0], show)
        return theirs.EmptyTqdm(*args, **options)

    if hasattr(theirs, "set_tqdm_hook"):
        undone.callback(theirs.set_tqdm_hook, theirs.set_tqdm_hook(made))
    else:
        undone.callback(setattr, theirs, "_tqdm_active", theirs._tqdm_active)
        theirs._tqdm_active = False  # `disable_progress_bar` would hide the hub's downloads, too


class _Passed:
    """What transformers iterates over while it loads weights, shown as a phase."""

    def __init__(self, items: Iterable[Any], show: Show) -> None:
        self.items, self.show = items, show

    def __iter__(self) -> Iterator[Any]:
        count = len(self.items) if isinstance(self.items, Sized) else None
        with self.show.bar("loading weights", total=count, unit=" tensors") as bar:
            for item in self.items:
                yield item
                bar.update(1)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: None


def _showwarning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    text = plain(redacted(str(message)))
    if {"site-packages", "dist-packages"}.intersection(Path(filename).parts) and not Path(filename).is_relative_to(
        OURS
    ):
        log.info("%s:%s: %s: %s", Path(filename).name, lineno, category.__name__, text)
    else:
        print(f"warning: {text}", file=sys.stderr)
