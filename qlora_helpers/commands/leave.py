"""`export` and `serve`: taking a run's model to where it goes next."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.commands import options as shared
from qlora_helpers.commands import terminal

if TYPE_CHECKING:
    from qlora_helpers.runs.folder import Run


def add(commands: Any) -> None:
    """Adds the commands to the parser's own.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    export = commands.add_parser(
        "export",
        help="write the model for where it goes next: llama.cpp, Ollama, vLLM, SageMaker or the hub",
        epilog="Each folder's README.md holds the exact commands that run it. docs/leaving.md says which were tried.",
    )
    export.set_defaults(call=export_run)
    export.add_argument("run", help=shared.RUN)
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
    serve.set_defaults(call=serve_run)
    serve.add_argument("run", nargs="?", help=shared.RUN)
    serve.add_argument("--also", action="append", default=[], metavar="RUN", help="a further run on the same base")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    serve.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    serve.add_argument("--stop", action="store_true", help="stop what serves the run, or the only server there is")


@terminal.shown()
def export_run(options: argparse.Namespace) -> int:
    """Writes what leaves a run, and publishes it where that is asked for."""
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


def serve_run(options: argparse.Namespace) -> int:
    """Serves runs until Ctrl+C, or stops what serves them."""
    from qlora_helpers.runs.opening import existing_run
    from qlora_helpers.serving import process

    if options.stop:
        for stopped in process.stop_serving(existing_run(options.run) if options.run else None):
            print(f"stopped {stopped.url} ({', '.join(stopped.names)})")
        return 0
    if options.run is None:
        raise UserError("serve needs a run", next_step=f"Name it: {shared.program()} serve RUN.")
    runs = [existing_run(name) for name in (options.run, *options.also)]
    with process.serve(runs[0], also=runs[1:], host=options.host, port=options.port) as server:
        print(f"{server.url} answers for {', '.join(server.names)}; Ctrl+C stops it. A client needs its token:")
        print(f'export OPENAI_BASE_URL={server.url} OPENAI_API_KEY="$(cat {shlex.quote(str(server.token_path))})"')
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            server.wait()
    return 0
