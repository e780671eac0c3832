"""`evaluate` and `suite`: asking the base and the tuned model the run's held-out rows, or the tasks of a harness."""

from __future__ import annotations

import argparse
import signal
from typing import Any

from qlora_helpers.commands import options as shared
from qlora_helpers.commands import terminal


def add(commands: Any) -> None:
    """Adds the commands to the parser's own.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    evaluate = commands.add_parser("evaluate", help="compare the base and the tuned model on the run's held-out rows")
    evaluate.set_defaults(call=evaluate_run)
    evaluate.add_argument("run", help=shared.RUN)
    evaluate.add_argument(
        "--rival",
        action="append",
        default=[],
        metavar="RUN",
        help="another run on the same base model that answers the same rows; may be given several times",
    )
    evaluate.add_argument("--again", action="store_true", help="ask again what is answered already")
    shared.add_processes(
        evaluate, "share the layers out over N processes that ask the model together, for a run with train.share=shards"
    )
    terminal.add_options(evaluate)

    suite = commands.add_parser(
        "suite",
        help="ask the base and the tuned model tasks of lm-eval, EleutherAI's evaluation harness",
        epilog="The report shows the scores. lm-eval is installed apart; without it the command that installs it is printed.",
    )
    suite.set_defaults(call=evaluate_suite)
    suite.add_argument("run", help=shared.RUN)
    suite.add_argument(
        "--tasks", required=True, help="names of lm-eval or YAML files, with commas; held_out: the run's held-out rows"
    )
    suite.add_argument("--limit", type=int, help="ask the first so many rows of each task alone")
    suite.add_argument("--shots", type=int, help="examples before each question (default: as the task says)")
    suite.add_argument("--batch-size", type=int, help="rows at once (default: the run's)")
    suite.add_argument("--chat", action="store_true", help="put the tasks' questions into the chat template")


def evaluate_run(options: argparse.Namespace) -> int:
    """Asks both models the run's held-out rows, in this process or in several that share the layers."""
    from qlora_helpers import workflow
    from qlora_helpers.base.python import python_command
    from qlora_helpers.runs import launch, ranks
    from qlora_helpers.training.processes import is_main_process

    # A shell's background job ignores it; `stop_evaluation` sends it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rivals = [workflow.existing_run(rival) for rival in options.rival]
    run = workflow.existing_run(options.run)
    if options.processes != 1:
        launch.refuse_missing_gpus(run.config(), options.processes)
        command = python_command("qlora_helpers", "evaluate", options.run, *terminal.as_options(options))
        command += [part for rival in options.rival for part in ("--rival", rival)]
        command += ["--again"] if options.again else []
        return ranks.run_ranks(command, options.processes)
    with terminal.shown(quiet=options.quiet, as_json=options.json) as show:
        result = workflow.evaluate(run, rivals=rivals, again=options.again, say=show.say)
        if is_main_process():
            show.result("evaluate", result)
    return 0


def evaluate_suite(options: argparse.Namespace) -> int:
    """Asks both models tasks of lm-eval."""
    from qlora_helpers import workflow

    run = workflow.existing_run(options.run)
    more = {name: getattr(options, name) for name in ("limit", "shots", "batch_size", "chat")}
    print(workflow.evaluate_suite(run, options.tasks, **more))
    return 0
