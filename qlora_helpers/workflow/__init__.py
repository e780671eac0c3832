"""A whole run: composes the steps, and alone decides a run's state and holds its lock.

The command line, `train(run)` in a cell and every launched process enter here. Each function takes a run, reads what earlier
steps left in its folder, does one step and writes the result. The steps know nothing of each other.
"""

from qlora_helpers.evaluation.ask import ask
from qlora_helpers.export.adapter import load_adapter
from qlora_helpers.machine.environment import versions
from qlora_helpers.runs.opening import existing_run, open_run, runs_root
from qlora_helpers.workflow.asking import playground, streaming_answers
from qlora_helpers.workflow.evaluating import (
    check_reload,
    evaluate,
    evaluate_suite,
    evaluation_panel,
    start_evaluation,
)
from qlora_helpers.workflow.leaving import export_run, export_to
from qlora_helpers.workflow.preparing import add_adapters, load, prepare_data
from qlora_helpers.workflow.training import retry, train

# What a notebook calls in the course of a run, whichever module it is in
__all__ = [
    "add_adapters",
    "ask",
    "check_reload",
    "evaluate",
    "evaluate_suite",
    "evaluation_panel",
    "existing_run",
    "export_run",
    "export_to",
    "load",
    "load_adapter",
    "open_run",
    "playground",
    "prepare_data",
    "retry",
    "runs_root",
    "start_evaluation",
    "streaming_answers",
    "train",
    "versions",
]
