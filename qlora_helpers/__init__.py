"""Interactive QLoRA fine-tuning for JupyterLab and SageMaker Studio.

`import qlora_helpers as ql` gives what a whole run needs, from `ql.open_run` to `ql.export_run`; `dir(ql)` lists it. A name is
imported when it is first used, so importing the package imports no torch and prints nothing. Each folder is a room whose
docstring says what it holds; a lesson that opens a part imports it from there.
"""

import logging
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# The room and module where each public name lives. No name here may equal a room's: importing the room would replace it.
_HOMES = {
    "UserError": "base.errors",
    "profile_config": "base.profiles",
    "check_machine": "machine.environment",
    "versions": "machine.environment",
    "new_run": "beginning",
    "open_run": "runs.opening",
    "existing_run": "runs.opening",
    "runs_root": "runs.opening",
    "start": "planning.starting",
    "find_space": "runs.cleanup",
    "free": "runs.cleanup",
    "plan_run": "planning.run_plan",
    "load": "workflow",
    "add_adapters": "workflow",
    "load_adapter": "workflow",
    "prepare_data": "workflow",
    "train": "workflow",
    "retry": "workflow",
    "check_reload": "workflow",
    "evaluate": "workflow",
    "start_evaluation": "workflow",
    "evaluation_panel": "workflow",
    "evaluate_suite": "workflow",
    "export_run": "workflow",
    "export_to": "workflow",
    "ask": "workflow",
    "streaming_answers": "workflow",
    "playground": "workflow",
    "read_votes": "evaluation.votes",
    "data_card": "views.data_card",
    "clone_run": "runs.opening",
    "list_runs": "views.widgets",
    "compare_runs": "views.run_comparison",
    "sweep": "views.sweep",
    "sweep_form": "views.widgets",
    "serve": "serving.process",
    "stop_serving": "serving.process",
    "write_report": "views.report",
    "KeptFiles": "views.file_links",
    "start_tensorboard": "views.tensorboard",
    "watch": "views.widgets",
    "ConfigForm": "views.widgets",
    "row_browser": "views.widgets",
    "answer_panel": "views.widgets",
}
__all__ = list(_HOMES)

if TYPE_CHECKING:  # what editors and the type checker see; a test compares it with the table
    from qlora_helpers.base.errors import UserError
    from qlora_helpers.base.profiles import profile_config
    from qlora_helpers.beginning import new_run
    from qlora_helpers.evaluation.votes import read_votes
    from qlora_helpers.machine.environment import check_machine, versions
    from qlora_helpers.planning.run_plan import plan_run
    from qlora_helpers.planning.starting import start
    from qlora_helpers.runs.cleanup import find_space, free
    from qlora_helpers.runs.opening import clone_run, existing_run, open_run, runs_root
    from qlora_helpers.serving.process import serve, stop_serving
    from qlora_helpers.views.data_card import data_card
    from qlora_helpers.views.file_links import KeptFiles
    from qlora_helpers.views.report import write_report
    from qlora_helpers.views.run_comparison import compare_runs
    from qlora_helpers.views.sweep import sweep
    from qlora_helpers.views.tensorboard import start_tensorboard
    from qlora_helpers.views.widgets.answers import answer_panel
    from qlora_helpers.views.widgets.form import ConfigForm
    from qlora_helpers.views.widgets.rows import row_browser
    from qlora_helpers.views.widgets.run_list import list_runs
    from qlora_helpers.views.widgets.sweep_panel import sweep_form
    from qlora_helpers.views.widgets.watch_panel import watch
    from qlora_helpers.workflow import (
        add_adapters,
        ask,
        check_reload,
        evaluate,
        evaluate_suite,
        evaluation_panel,
        export_run,
        export_to,
        load,
        load_adapter,
        playground,
        prepare_data,
        retry,
        start_evaluation,
        streaming_answers,
        train,
    )
else:

    def __getattr__(name: str) -> object:
        """Imports a public name from its room when it is first used."""
        import importlib

        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, renamed = _HOMES[name].partition(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), renamed or name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})


# bitsandbytes notes at import, on some processors, that an optional kernel is not there; transformers and peft import it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)
