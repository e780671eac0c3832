"""`list`, `compare` and `report`: runs side by side, as a notebook shows them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import UserError


def add(commands: Any) -> None:
    """Adds the commands to the parser's own.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    listed = commands.add_parser("list", help="show all runs: what was changed, how well they did, what they cost")
    listed.set_defaults(call=list_runs)
    listed.add_argument("--sort", metavar="COLUMN", help="such as score, date, size or 'best loss' (default: by name)")
    listed.add_argument("--reverse", action="store_true", help="the other way round")
    listed.add_argument(
        "--where", metavar="WORDS", default="", help="only runs with all of these words, such as 'finished r=8'"
    )
    listed.add_argument("--json", action="store_true", help="print JSON (docs/terminal.md)")

    compared = commands.add_parser("compare", help="put two runs or more side by side: settings, scores, losses")
    compared.set_defaults(call=compare_runs)
    compared.add_argument("run", nargs="+", help="names below runs/, or paths")
    compared.add_argument("--json", action="store_true", help="print JSON (docs/terminal.md)")

    report = commands.add_parser("report", help="write a run's report.html, or one page about several runs")
    report.set_defaults(call=write_report)
    report.add_argument("run", nargs="+", help="names below runs/, or paths")
    report.add_argument("--out", help="where to write the page (default: in the run's folder, or beside the runs)")


def list_runs(options: argparse.Namespace) -> int:
    """Prints the list of runs."""
    from qlora_helpers.views.run_list import read_runs, total_line

    runs = read_runs()
    if options.sort or options.reverse:
        runs = runs.sorted_by(options.sort or "run")
        runs = runs.reversed() if options.reverse else runs
    runs = runs.where(options.where)
    if options.json:
        print(json.dumps({"runs": [row.to_dict() for row in runs]}, indent=2))
        return 0
    print(runs)
    if runs.rows:
        print(total_line(runs))
    return 0


def compare_runs(options: argparse.Namespace) -> int:
    """Prints a comparison of runs."""
    from qlora_helpers.views.run_comparison import compare_runs

    found = compare_runs(*options.run)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return 0


def write_report(options: argparse.Namespace) -> int:
    """Writes a report of one run or of several, and prints its path."""
    from qlora_helpers.runs.opening import existing_run

    if len(options.run) > 1:
        from qlora_helpers.views.run_comparison import compare_runs
        from qlora_helpers.views.runs_report import write_runs_report

        print(write_runs_report(compare_runs(*options.run), Path(options.out) if options.out else None))
        return 0
    if options.out:
        raise UserError(
            "--out is for a report about several runs", next_step="Leave it out: the page is in the run's folder."
        )
    from qlora_helpers.views import report

    print(report.write_report(existing_run(options.run[0])))
    return 0
