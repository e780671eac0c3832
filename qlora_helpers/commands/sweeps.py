"""`sweep`: several values of up to two settings, planned, started, followed, stopped and resumed."""

from __future__ import annotations

import argparse
import json
from typing import Any

from qlora_helpers.base.errors import ConfigError, UserError


def add(commands: Any) -> None:
    """Adds the command to the parser's own.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    sweep = commands.add_parser(
        "sweep",
        help="train a run with several values of up to two settings, one after another under one budget",
        epilog="With --set it plans the sweep, with memory, time and price of its runs, and starts it with --start. Without "
        "--set it shows a sweep's state, and ranks its runs.",
    )
    sweep.set_defaults(call=run_sweep)
    sweep.add_argument("run", help="the run to begin with, or a sweep's name")
    sweep.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="SECTION.NAME=VALUE,VALUE", help="once or twice"
    )
    sweep.add_argument("--budget-hours", type=float, help="what all runs together may take (default: no limit)")
    sweep.add_argument(
        "--skip-too-large", action="store_true", help="leave out runs that don't fit this machine's GPUs by their plan"
    )
    what = sweep.add_mutually_exclusive_group()
    what.add_argument("--start", action="store_true", help="start or resume it in the background")
    what.add_argument("--stop", action="store_true", help="save and stop; --start goes on from there")
    what.add_argument("--foreground", action="store_true", help="start or resume it, and return when it has ended")
    sweep.add_argument("--json", action="store_true", help="print JSON (docs/terminal.md)")


def values_of(settings: list[str]) -> dict[str, list[Any]]:
    """Returns the values of each setting as they were typed.

    Raises:
        ConfigError: one is not `section.name=value,value`.
    """
    found: dict[str, list[Any]] = {}
    for text in settings:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise ConfigError([f"{text}: expected section.name=value,value, such as adapter.r=8,64"])
        found.setdefault(name.strip(), []).extend(value.strip() for value in values.split(","))
    return found


def run_sweep(options: argparse.Namespace) -> int:
    """Plans, shows, starts or stops a sweep."""
    from qlora_helpers.runs import sweep as driver
    from qlora_helpers.views.sweep import sweep

    if (options.budget_hours is not None or options.skip_too_large) and not options.settings:
        raise UserError("--budget-hours and --skip-too-large are for a plan", next_step="Give --set, too.")
    found = sweep(
        options.run,
        values_of(options.settings) or None,
        budget_hours=options.budget_hours,
        skip_too_large=options.skip_too_large,
    )
    if options.foreground:
        found.write()
        driver.run_sweep(found.folder)
    elif options.start:
        found.start()
    elif options.stop:
        found.stop()
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
        return 0
    print(found)
    if options.start:
        print(f"It goes on in the background. Its state: qlora sweep {found.folder.name}; --stop saves and stops it.")
    elif options.settings and not options.foreground and not found.too_large:
        print("Nothing is started yet: the same command with --start does that.")
    return 0
