"""`new`, `train` and `launch`: setting up a run, and training it in one process, in several, or on several machines."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from qlora_helpers.commands import options as shared
from qlora_helpers.commands import terminal

if TYPE_CHECKING:
    from qlora_helpers.runs.folder import Run


def add(commands: Any) -> None:
    """Adds the commands to the parser's own.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    _add_new(commands)
    _add_train(commands)
    _add_launch(commands)


def _add_new(commands: Any) -> None:
    new = commands.add_parser(
        "new",
        help="set up a run on your data: recognises it, decides the settings and says why",
        epilog="Nothing is trained yet: `train RUN` does that. Every setting can be set by hand; `train --help` lists them.",
    )
    new.set_defaults(call=new_run)
    new.add_argument("run", help="the new run's name below runs/, or a path")
    new.add_argument(
        "--model",
        help="hub id, folder, .gguf file or random:NAME (default: SmolLM2-135M-Instruct, which a laptop trains)",
    )
    new.add_argument("--data", required=True, help="a data file, a folder or pattern of several, or a hub data set")
    shared.add_settings(new)


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="start or resume a run",
        epilog="settings and their defaults:\n" + shared.settings_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.set_defaults(call=train_run)
    train.add_argument("run", help=shared.RUN)
    shared.add_profile(train)
    train.add_argument(
        "--shut-down-app", action="store_true", help="in SageMaker Studio, shut this app down afterwards"
    )
    shared.add_processes(
        train,
        "train in N processes of this machine, each with a share of the rows and a GPU, with the settings as they are "
        "(default: where several GPUs are free, as the plan finds fastest; else 1)",
        default=None,
    )
    shared.add_settings(train)
    terminal.add_options(train)


def _add_launch(commands: Any) -> None:
    launch = commands.add_parser(
        "launch",
        help="start or resume a run on several GPUs, or on several machines, in the way that the plan finds fastest",
        epilog="On several machines start it on each of them, with the same run folder or a copy of it. They meet at a port of the "
        "first one, without a password: the network between them must be private.",
    )
    launch.set_defaults(call=launch_run)
    launch.add_argument("run", help=shared.RUN)
    shared.add_profile(launch)
    launch.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs of each machine (default: all free ones); without a GPU, processes"
    )
    launch.add_argument("--share", help="auto, copies, shards, 'copies of shards', spread or one (default: the run's)")
    launch.add_argument("--nodes", type=int, default=1, metavar="N", help="how many machines (default: this one)")
    launch.add_argument("--node-rank", type=int, default=0, metavar="N", help="this machine's number, from 0")
    launch.add_argument("--address", default="", metavar="HOST", help="the first machine's name or private address")
    launch.add_argument("--port", type=int, default=29400, help="at which they meet there (default: %(default)s)")
    shared.add_settings(launch)
    terminal.add_options(launch)


@terminal.shown()
def new_run(options: argparse.Namespace) -> int:
    """Sets up a run on a person's data."""
    from qlora_helpers.beginning import new_run

    run = new_run(options.run, model=options.model, data=options.data, settings=options.settings)
    print(f"{run.name} is set up. Next: {shared.program()} train {shlex.quote(options.run)}")
    return 0


def train_run(options: argparse.Namespace) -> int:
    """Starts or resumes a run, in this process or in several."""
    from qlora_helpers.planning.starting import run_in_foreground
    from qlora_helpers.runs import launch, ranks
    from qlora_helpers.runs.opening import open_run
    from qlora_helpers.training.in_processes import several_by_plan

    run = open_run(options.run, profile=options.profile, settings=options.settings)
    more = (["--shut-down-app"] if options.shut_down_app else []) + terminal.as_options(options)
    if options.processes is None and several_by_plan(run):
        say = terminal.chosen(quiet=options.quiet, as_json=options.json).say
        code = run_in_foreground(run, options=more, say=say)
        assert code is not None, "several processes were started"
        return code
    if options.processes in (None, 1):
        return _train_here(run, options, shut_down_app=options.shut_down_app)
    launch.refuse_missing_gpus(run.config(), options.processes)
    return ranks.run_ranks(launch.train_command(run) + more, options.processes)


def launch_run(options: argparse.Namespace) -> int:
    """Starts or resumes a run on several GPUs or machines; where one process is enough, in this one."""
    from qlora_helpers.planning.starting import run_in_foreground
    from qlora_helpers.runs.nodes import Node
    from qlora_helpers.runs.opening import existing_run, open_run

    node = Node(options.nodes, options.node_rank, options.address, options.port) if options.nodes != 1 else None
    is_first = node is None or node.rank == 0  # the others read what it writes
    run = open_run(options.run, profile=options.profile) if is_first else existing_run(options.run)
    code = run_in_foreground(
        run,
        settings=options.settings,
        gpus=options.gpus,
        share=options.share,
        node=node,
        options=terminal.as_options(options),
        say=terminal.chosen(quiet=options.quiet, as_json=options.json).say,
    )
    return _train_here(run, options) if code is None else code


def _train_here(run: Run, options: argparse.Namespace, *, shut_down_app: bool = False) -> int:
    """Trains in this process, which may be one of several, and returns the exit code; the first alone prints."""
    from qlora_helpers import workflow  # after the GPU was chosen
    from qlora_helpers.runs import sigterm
    from qlora_helpers.training.processes import is_main_process

    with terminal.shown(quiet=options.quiet, as_json=options.json) as show:
        result = workflow.train(run, shut_down_app=shut_down_app, in_this_process=True, say=show.say)
        if is_main_process():
            show.result("train", result)
    return sigterm.EXIT_CODE if sigterm.received() else 130 if sigterm.interrupted() else 0
