"""The command line: parses its arguments, calls `workflow` and maps exit codes.

It exits with 0 on success, with 2 and one clear message on what the user can fix, and with 1 on a bug in this package.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.addresses import redacted
from qlora_helpers.base.config import SECTIONS, describe
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.files import NEXT_STEPS
from qlora_helpers.base.profiles import PROFILES, profile_config
from qlora_helpers.commands import board, side_by_side, sweeps, terminal

if TYPE_CHECKING:
    from qlora_helpers.runs.folder import Run

INSTALL = "Install what is missing: pip install -r requirements.txt (`doctor` lists it)."


def parser() -> argparse.ArgumentParser:
    """Builds the argument parser; the help lists the settings with their own texts."""
    settings = "\n".join(
        f"  {section}.{row['name']}={row['value']}\n      {row['text']}"
        for section, kind in SECTIONS.items()
        for row in describe(kind)
    )
    prog = "qlora" if Path(sys.argv[0]).stem == "qlora" else "python -m qlora_helpers"
    top = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="check this machine: packages, GPUs, disk, notebook")
    doctor.add_argument("--json", action="store_true", help="print JSON")

    plan = commands.add_parser(
        "plan", help="predict what fits, how fast and at what price, before anything is downloaded"
    )
    plan.add_argument(
        "--model", help="hub id, folder with a config.json, or random:NAME (default: the profile's model)"
    )
    plan.add_argument(
        "--gpus",
        help="such as 4x24GiB, H100, 2xL4 or ml.g5.12xlarge (default: this machine's; without one, --model lists all that fit)",
    )
    plan.add_argument(
        "--price", type=float, help="USD an hour for all of the hardware (default: the catalogue's price)"
    )
    plan.add_argument(
        "--tokens", type=int, help="tokens of the training data, for time and price (default: looked up or counted)"
    )
    plan.add_argument(
        "--profile",
        choices=sorted(PROFILES),
        default="falcon-40b",
        help="the profile whose settings the plan starts from",
    )
    plan.add_argument("--set", dest="settings", action="append", default=[], metavar="SECTION.NAME=VALUE")
    plan.add_argument("--json", action="store_true", help="print JSON")

    new = commands.add_parser(
        "new",
        help="set up a run on your data: recognises it, decides the settings and says why",
        epilog="Nothing is trained yet: `train RUN` does that. Every setting can be set by hand; `train --help` lists them.",
    )
    new.add_argument("run", help="the new run's name below runs/, or a path")
    new.add_argument(
        "--model",
        help="hub id, folder, .gguf file or random:NAME (default: SmolLM2-135M-Instruct, which a laptop trains)",
    )
    new.add_argument("--data", required=True, help="a data file, a folder or pattern of several, or a hub data set")
    new.add_argument("--set", dest="settings", action="append", default=[], metavar="SECTION.NAME=VALUE")

    train = commands.add_parser(
        "train",
        help="start or resume a run",
        epilog="settings and their defaults:\n" + settings,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("run", help="the run's name below runs/, or a path")
    train.add_argument("--profile", choices=sorted(PROFILES), help="the profile that a new run starts from")
    train.add_argument(
        "--shut-down-app", action="store_true", help="in SageMaker Studio, shut this app down afterwards"
    )
    train.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="train in N processes of this machine, each with a share of the rows; with GPUs, one for each GPU",
    )
    train.add_argument("--set", dest="settings", action="append", default=[], metavar="SECTION.NAME=VALUE")
    terminal.add_options(train)

    launch = commands.add_parser(
        "launch",
        help="start or resume a run on several GPUs, or on several machines, in the way that the plan finds fastest",
        epilog="On several machines start it on each of them, with the same run folder or a copy of it. They meet at a port of the "
        "first one, without a password: the network between them must be private.",
    )
    launch.add_argument("run", help="the run's name below runs/, or a path")
    launch.add_argument("--profile", choices=sorted(PROFILES), help="the profile that a new run starts from")
    launch.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs of each machine (default: all free ones); without a GPU, processes"
    )
    launch.add_argument("--share", help="auto, copies, shards, 'copies of shards', spread or one (default: the run's)")
    launch.add_argument("--nodes", type=int, default=1, metavar="N", help="how many machines (default: this one)")
    launch.add_argument("--node-rank", type=int, default=0, metavar="N", help="this machine's number, from 0")
    launch.add_argument("--address", default="", metavar="HOST", help="the first machine's name or private address")
    launch.add_argument("--port", type=int, default=29400, help="at which they meet there (default: %(default)s)")
    launch.add_argument("--set", dest="settings", action="append", default=[], metavar="SECTION.NAME=VALUE")

    evaluate = commands.add_parser("evaluate", help="compare the base and the tuned model on the run's held-out rows")
    evaluate.add_argument("run")
    evaluate.add_argument(
        "--rival",
        action="append",
        default=[],
        metavar="RUN",
        help="another run on the same base model that answers the same rows; may be given several times",
    )
    evaluate.add_argument("--again", action="store_true", help="ask again what is answered already")
    terminal.add_options(evaluate)
    side_by_side.add_commands(commands)
    sweeps.add_commands(commands)
    evaluate.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="share the layers out over N processes that ask the model together, for a run with train.share=shards",
    )
    suite = commands.add_parser(
        "suite",
        help="ask the base and the tuned model tasks of lm-eval, EleutherAI's evaluation harness",
        epilog="The report shows the scores. lm-eval is installed apart; without it the command that installs it is printed.",
    )
    suite.add_argument("run")
    suite.add_argument(
        "--tasks", required=True, help="names of lm-eval or YAML files, with commas; held_out: the run's held-out rows"
    )
    suite.add_argument("--limit", type=int, help="ask the first so many rows of each task alone")
    suite.add_argument("--shots", type=int, help="examples before each question (default: as the task says)")
    suite.add_argument("--batch-size", type=int, help="rows at once (default: the run's)")
    suite.add_argument("--chat", action="store_true", help="put the tasks' questions into the chat template")
    board.add_commands(commands)
    export = commands.add_parser(
        "export",
        help="write the model for where it goes next: llama.cpp, Ollama, vLLM, SageMaker or the hub",
        epilog="Each folder's README.md holds the exact commands that run it. docs/leaving.md says which were tried.",
    )
    export.add_argument("run")
    export.add_argument(
        "--to",
        choices=("adapter", "merged", "gguf", "ollama", "vllm", "lmi", "hub"),
        help="one target alone, in a folder of its own (default: adapter and merged model, with their drift)",
    )
    export.add_argument(
        "--quantize",
        metavar="TYPE",
        help="type of a GGUF file's values: f16 (default), bf16, f32, q8_0, q5_1, q5_0, q4_1, q4_0, or with llama-cpp-python "
        "q2_k to q6_k, such as q4_k_m",
    )
    export.add_argument(
        "--out", help="the folder to write to (default: export/ in the run's folder, or export-TARGET/ with --to)"
    )
    export.add_argument("--no-merge", action="store_true", help="write only the adapter")
    export.add_argument("--no-drift", action="store_true", help="do not load the merged model to measure its drift")
    export.add_argument(
        "--publish",
        metavar="OWNER/NAME",
        help="upload to the hub: the merged model, or the adapter with --no-merge (with --to hub, or without --to)",
    )
    export.add_argument("--public", action="store_true", help="make a new repository public")
    serve = commands.add_parser(
        "serve",
        help="serve the base and the tuned model to OpenAI clients on this machine",
        epilog="It serves until Ctrl+C, or until `serve --stop RUN` in another terminal.",
    )
    serve.add_argument("run", nargs="?", help="the run's name below runs/, or a path")
    serve.add_argument("--also", action="append", default=[], metavar="RUN", help="a further run on the same base")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    serve.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    serve.add_argument("--stop", action="store_true", help="stop what serves the run, or the only server there is")
    clean = commands.add_parser("clean", help="show what takes space, and free it with --yes")
    clean.add_argument(
        "run", nargs="?", help="one run, or a sweep with its runs (default: show the caches and all runs)"
    )
    clean.add_argument("--yes", action="store_true", help="delete what is shown; a run must be named")
    demo = commands.add_parser("demo", help="do the whole job on a small model and write a report")
    demo.add_argument("--data", help="a data file or hub data set (default: the embedded corpus)")
    terminal.add_options(demo)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except UserError as error:
        if getattr(options, "json", False) and hasattr(options, "quiet"):
            terminal.JsonShow().error(error)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in NEXT_STEPS:
            raise
        name = f": {str(error.filename)[:200]}" if error.filename else ""
        print(f"error: {error.strerror}{name}. {NEXT_STEPS[error.errno]}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        missing = _missing_package(error)
        if missing == __package__:
            raise
        print(f"error: the package {missing} is not installed. {INSTALL}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was saved is intact", file=sys.stderr)
        return 130


def _missing_package(error: ModuleNotFoundError) -> str:
    """The package that could not be imported; transformers' own error names it in its cause alone."""
    name = None
    seen: BaseException | None = error
    while seen is not None:
        name = getattr(seen, "name", None) or name
        seen = seen.__cause__
    return (name or "that transformers needs").partition(".")[0]


def _doctor(options: argparse.Namespace) -> int:
    from qlora_helpers.machine.environment import check_machine

    report = check_machine()
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return 2 if report.level == "failure" else 0


def _plan(options: argparse.Namespace) -> int:
    from qlora_helpers.planning.offers import find_offers
    from qlora_helpers.planning.run_plan import has_gpu, plan_run

    model = {"model.name": options.model} if options.model else {}
    config = profile_config(options.profile).with_settings(model).with_settings(options.settings)
    if options.model and not options.gpus and options.price is None and not has_gpu():
        found: Any = find_offers(config, tokens=options.tokens)
    else:
        found = plan_run(config, gpus=options.gpus, price=options.price, tokens=options.tokens)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return 0


@terminal.shown()
def _new(options: argparse.Namespace) -> int:
    from qlora_helpers.beginning import new_run

    run = new_run(options.run, model=options.model, data=options.data, settings=options.settings)
    print(f"{run.name} is set up. Next: {parser().prog} train {shlex.quote(options.run)}")
    return 0


def _train(options: argparse.Namespace) -> int:
    from qlora_helpers import workflow
    from qlora_helpers.runs import launch, ranks, sigterm
    from qlora_helpers.training.processes import is_main_process

    run = workflow.open_run(options.run, profile=options.profile, settings=options.settings)
    if options.processes != 1:
        launch.refuse_missing_gpus(run.config(), options.processes)
        command = launch.train_command(run) + (["--shut-down-app"] if options.shut_down_app else [])
        command += terminal.as_options(options)
        return ranks.run_ranks(command, options.processes)
    with terminal.shown(quiet=options.quiet, as_json=options.json) as show:
        result = workflow.train(run, shut_down_app=options.shut_down_app, say=show.say)
        if is_main_process():
            show.result("train", result)
    return sigterm.EXIT_CODE if sigterm.received() else 130 if sigterm.interrupted() else 0


def _launch(options: argparse.Namespace) -> int:
    from qlora_helpers.planning.starting import run_in_foreground
    from qlora_helpers.runs import sigterm
    from qlora_helpers.runs.nodes import Node
    from qlora_helpers.runs.opening import existing_run, open_run

    node = Node(options.nodes, options.node_rank, options.address, options.port) if options.nodes != 1 else None
    is_first = node is None or node.rank == 0  # the others read what it writes
    run = open_run(options.run, profile=options.profile) if is_first else existing_run(options.run)
    code = run_in_foreground(run, settings=options.settings, gpus=options.gpus, share=options.share, node=node)
    if code is not None:
        return code
    from qlora_helpers import workflow  # after the GPU was chosen

    print(workflow.train(run))
    return sigterm.EXIT_CODE if sigterm.received() else 0


def _evaluate(options: argparse.Namespace) -> int:
    from qlora_helpers import workflow
    from qlora_helpers.base.python import python_command
    from qlora_helpers.runs import launch, ranks
    from qlora_helpers.training.processes import is_main_process

    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it; `stop_evaluation` sends it
    rivals = [workflow.existing_run(rival) for rival in options.rival]
    run = workflow.existing_run(options.run)
    if options.processes != 1:
        launch.refuse_missing_gpus(run.config(), options.processes)
        command = python_command("qlora_helpers", "evaluate", options.run, *terminal.as_options(options))
        command += [part for rival in options.rival for part in ("--rival", rival)]
        return ranks.run_ranks(command, options.processes)
    with terminal.shown(quiet=options.quiet, as_json=options.json) as show:
        result = workflow.evaluate(run, rivals=rivals, again=options.again, say=show.say)
        if is_main_process():
            show.result("evaluate", result)
    return 0


def _suite(options: argparse.Namespace) -> int:
    from qlora_helpers import workflow

    run = workflow.existing_run(options.run)
    more = {name: getattr(options, name) for name in ("limit", "shots", "batch_size", "chat")}
    print(workflow.evaluate_suite(run, options.tasks, **more))
    return 0


@terminal.shown()
def _export(options: argparse.Namespace) -> int:
    from qlora_helpers import workflow
    from qlora_helpers.export.publish import publish
    from qlora_helpers.model.hub import check_repository
    from qlora_helpers.runs.opening import existing_run

    run = existing_run(options.run)
    if options.publish:
        check_repository(options.publish)
    elif options.public:
        raise UserError("--public needs a repository", next_step="Name it with --publish OWNER/NAME.")
    out = Path(options.out) if options.out else None
    if options.to:
        return _export_to(run, options, out)
    if options.quantize:
        raise UserError("--quantize is for GGUF files", next_step="Add --to gguf or --to ollama.")
    report = workflow.export_run(run, out=out, merged=not options.no_merge, drift=not options.no_drift)
    print(report)
    if options.publish:
        part = "adapter" if options.no_merge else "merged"
        publish(report.folder / part, options.publish, private=not options.public)
    return 0


def _export_to(run: Run, options: argparse.Namespace, out: Path | None) -> int:
    from qlora_helpers import workflow
    from qlora_helpers.export.publish import publish

    if (options.to == "hub") != bool(options.publish):
        raise UserError(
            "--to hub and --publish go together", next_step="Name the repository: --to hub --publish OWNER/NAME."
        )
    left = workflow.export_to(run, options.to, quantize=options.quantize, out=out, merged=not options.no_merge)
    print(left)
    if options.publish:
        publish(left.folder, options.publish, private=not options.public)
    return 0


def _serve(options: argparse.Namespace) -> int:
    from qlora_helpers.runs.opening import existing_run
    from qlora_helpers.serving import process

    if options.stop:
        for stopped in process.stop_serving(existing_run(options.run) if options.run else None):
            print(f"stopped {stopped.url} ({', '.join(stopped.names)})")
        return 0
    if options.run is None:
        raise UserError("serve needs a run", next_step=f"Name it: {parser().prog} serve RUN.")
    runs = [existing_run(name) for name in (options.run, *options.also)]
    with process.serve(runs[0], also=runs[1:], host=options.host, port=options.port) as server:
        print(f"{server.url} answers for {', '.join(server.names)}; Ctrl+C stops it. A client needs its token:")
        print(f'export OPENAI_BASE_URL={server.url} OPENAI_API_KEY="$(cat {shlex.quote(str(server.token_path))})"')
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            server.wait()
    return 0


def _clean(options: argparse.Namespace) -> int:
    from qlora_helpers.runs import cleanup
    from qlora_helpers.runs.opening import runs_root

    space = cleanup.find_space(runs_root())
    if options.run is None:
        if options.yes:
            raise UserError("nothing is deleted unless a run is named", next_step="Name the run: clean RUN --yes.")
        print(space)
    else:
        cleanup.free(space.of_run(options.run), confirm=options.yes)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from qlora_helpers.demo import demo

    with terminal.shown(quiet=options.quiet, as_json=options.json) as show:
        show.result("demo", demo(data=options.data, say=show.say), said=True)
    return 0


_COMMANDS = {
    "doctor": _doctor,
    "plan": _plan,
    "new": _new,
    "train": _train,
    "launch": _launch,
    "evaluate": _evaluate,
    "suite": _suite,
    "export": _export,
    "serve": _serve,
    "clean": _clean,
    "demo": _demo,
    **side_by_side.COMMANDS,
    **sweeps.COMMANDS,
    **board.COMMANDS,
}


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _without_working_folder() -> None:
    """Imports nothing from here on from the folder that `python -m` was started in, unless this package lies there."""
    package = Path(__file__).resolve().parents[1]
    if sys.path and not sys.flags.safe_path and Path(sys.path[0] or ".").resolve() == Path.cwd() != package:
        del sys.path[0]


if __name__ == "__main__":
    _without_working_folder()
    sys.excepthook = _print_redacted  # a background process's errors are in the run's log
    sys.exit(main())
