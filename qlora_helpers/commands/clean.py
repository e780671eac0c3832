"""`clean`: what takes space, and what may go."""

from __future__ import annotations

import argparse
from typing import Any

from qlora_helpers.base.errors import UserError


def add(commands: Any) -> None:
    """Adds the command to the parser's own.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    clean = commands.add_parser("clean", help="show what takes space, and free it with --yes")
    clean.set_defaults(call=clean_up)
    clean.add_argument(
        "run", nargs="?", help="one run, or a sweep with its runs (default: show the caches and all runs)"
    )
    clean.add_argument("--yes", action="store_true", help="delete what is shown; a run must be named")


def clean_up(options: argparse.Namespace) -> int:
    """Prints what takes space, or deletes what of a run may go."""
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
