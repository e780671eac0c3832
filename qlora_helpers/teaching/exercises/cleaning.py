"""The exercise of notebook 08: free what costs no result and no training that could go on."""

from __future__ import annotations

import contextlib
import io
import os
import random
import socket
import tempfile
from collections.abc import Sequence
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.runs.cleanup import free
from qlora_helpers.runs.opening import open_run
from qlora_helpers.runs.space import SpaceItem, items_of
from qlora_helpers.teaching.exercise import Exercise, Wrong, call

RESUMES = ("stopped", "failed")
"""States in which a run goes on from its checkpoints when it is started again."""


def may_go(items):
    """The solution of `clean_without_loss`."""
    return [item for item in items if item.id.endswith("/checkpoints") and item.run.status().state == "finished"]


def _judge_clean(function: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        items = _items_of_runs(folder)
        got = call(function, list(items))
        if not isinstance(got, list | tuple) or any(each not in items for each in got):
            raise Wrong(message="Return a list of some of the items that your function was given.")
        got = list(dict.fromkeys(got))
        _refuse_loss(got)
        with contextlib.redirect_stdout(io.StringIO()):
            freed = free(got, confirm=True)
        kept = [item for item in may_go(items) if item.paths[0].exists()]
        if kept:
            raise Wrong("too-careful", item=kept[0].id)
        left = [item for item in items if item.paths and item.paths[0].exists()]
        assert freed and len(left) == len(items) - len(got)
    return f"{freed:,} bytes are freed. Every adapter is there, and the stopped and failed runs can go on."


def _items_of_runs(folder: str) -> list[SpaceItem]:
    """Items of five real run folders, whose names say nothing of their states."""
    names = random.sample(["ant", "bee", "cat", "dog", "eel", "fox"], 5)
    items = []
    for name, state in zip(names, ("finished", "finished", "running", *RESUMES), strict=True):
        run = open_run(name, profile="tiny", root=folder)
        for part in (run.checkpoints_dir, run.data_dir, run.adapter_dir):
            part.mkdir()
            (part / "content").write_bytes(bytes(random.randrange(1_000, 9_000)))
        alive = {"pid": os.getpid(), "host": socket.gethostname()} if state == "running" else {}
        run.set_status(state=state, **alive)
        items += items_of(run)
    random.shuffle(items)
    return items


def _refuse_loss(got: Sequence[SpaceItem]) -> None:
    """Names what the items would cost, the worst first, in whichever order they come."""
    known = [(item, item.id.rpartition("/")[2], item.run.status().state) for item in got if item.run is not None]
    for item, part, _ in known:
        if part == "adapter":
            raise Wrong("result", item=item.id)
    for item, _, state in known:
        if state == "running":
            try:
                free(item, confirm=True)
            except UserError as error:
                raise Wrong("running", item=item.id, error=error.problem) from None
    for item, part, _ in known:
        if part != "checkpoints":
            raise Wrong("what-is-small", item=item.id)
    for item, _, state in known:
        if state in RESUMES:
            raise Wrong("resume", item=item.id, state=state)


CLEAN_WITHOUT_LOSS = Exercise(
    name="clean_without_loss",
    title="Clean without loss",
    kind="write",
    minutes=5,
    question="Write may_go(items): of the items of several runs, return a list of those that only serve to "
    "resume a training, where the training has finished.",
    judge=_judge_clean,
    misconceptions={
        "result": "{item} is a result: without its adapter, all of that training was for nothing.",
        "running": "{item} belongs to a training at work, and `free` refuses: {error}.",
        "what-is-small": "{item} does not serve to resume. It holds what explains the result, and takes little space.",
        "resume": "The run of {item} has {state}: from its checkpoints it could go on, and without them it begins again.",
        "too-careful": "{item} is still there, but its run has finished: nobody will resume it.",
    },
    hints=(
        "Which part of a run's folder is needed to resume, and nothing else? `item.id` ends with its name.",
        "`item.run.status().state` is 'finished' where nothing is left to resume.",
    ),
    solution_is=may_go,
)
