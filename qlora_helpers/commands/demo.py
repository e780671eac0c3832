"""`demo`: the whole job on a small model."""

from __future__ import annotations

import argparse
from typing import Any

from qlora_helpers.commands import terminal


def add(commands: Any) -> None:
    """Adds the command to the parser's own.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    demo = commands.add_parser("demo", help="do the whole job on a small model and write a report")
    demo.set_defaults(call=run_demo)
    demo.add_argument("--data", help="a data file or hub data set (default: the embedded corpus)")
    terminal.add_options(demo)


def run_demo(options: argparse.Namespace) -> int:
    """Trains, evaluates and reports on a small model."""
    from qlora_helpers.demo import demo

    with terminal.shown(quiet=options.quiet, as_json=options.json) as show:
        show.result("demo", demo(data=options.data, say=show.say), said=True)
    return 0
