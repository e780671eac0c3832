"""`make demo`: the whole job on a small model, from a data file to a report."""

from __future__ import annotations

import os
import time
from pathlib import Path

from qlora_helpers import workflow
from qlora_helpers.base.text import Say
from qlora_helpers.beginning import new_run
from qlora_helpers.data.run_data import check_source
from qlora_helpers.runs import sigterm
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.opening import run_at
from qlora_helpers.runs.plan_file import add_to_plan
from qlora_helpers.views import report
from qlora_helpers.views.file_links import address_of


def demo(*, data: str | None = None, root: str | os.PathLike[str] | None = None, say: Say = print) -> Path:
    """Does the whole job on a small model and writes a report; results of an earlier call are used again.

    Args:
        data: a data file in any form (`docs/data.md`), whose settings are then decided as by `qlora new`, or a hub data set; None
            takes the embedded corpus and the profile's settings.
        root: the folder that holds the runs; None takes `$QLORA_RUNS`, else `runs`.
        say: called with each line to show.

    Returns:
        The report's path.
    """
    started = time.monotonic()
    run = workflow.open_run("demo", profile="demo", root=root) if data is None else _run_on(data, root, say)
    if run.status().state == "finished" and run.evaluation_path.exists() and run.adapter_dir.exists():
        say(f"{run.name} is finished already; its report is written again from the saved results.")
        return _reported(run, say)
    check_source(run)
    loaded = workflow.load(run, say=say)
    say(str(loaded))
    say(str(workflow.prepare_data(run, loaded.tokenizer, shape=loaded.shape, say=say)))
    if run.status().state == "finished" and run.adapter_dir.exists():
        model = workflow.load_adapter(run, loaded)
    else:
        model = workflow.add_adapters(run, loaded)
        say(str(workflow.train(run, model=model, loaded=loaded, say=say)))
        if sigterm.interrupted():  # a person who stops the training means the demo
            raise KeyboardInterrupt
    say("Saving, reloading and comparing ...")
    check = workflow.check_reload(run, model, loaded, say=lambda text: None)
    say(str(check))
    result = workflow.evaluate(run, model=model, loaded=loaded, say=say)
    say(str(result))
    add_to_plan(run, demo_seconds=round(time.monotonic() - started))
    return _reported(run, say)


def _reported(run: Run, say: Say) -> Path:
    """Writes the report and ends with the address under which a browser opens it."""
    path = report.write_report(run)
    say(f"The report: {address_of(path)}")
    return path


def _run_on(data: str, root: str | os.PathLike[str] | None, say: Say) -> Run:
    """Opens the demo's run on a person's data, or sets it up as `qlora new` does."""
    run = run_at(_demo_name(data), root)
    if run.exists() and run.config().data.source == data:
        return run
    return new_run(_demo_name(data), data=data, root=root, say=say)


def _demo_name(data: str) -> str:
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in Path(data).stem)
    return f"demo-{plain[:80] or 'data'}"
