"""Options that several commands share, so that one option has one name and one text everywhere."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qlora_helpers.base.config import SECTIONS, describe
from qlora_helpers.base.profiles import PROFILES

RUN = "the run's name below runs/, or a path"


def program() -> str:
    """Returns how this command line was called: `qlora`, or `python -m qlora_helpers`."""
    return "qlora" if Path(sys.argv[0]).stem == "qlora" else "python -m qlora_helpers"


def add_settings(command: argparse.ArgumentParser) -> None:
    """Adds `--set`."""
    command.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="change a setting; may be given several times (`train --help` lists the settings)",
    )


def add_profile(command: argparse.ArgumentParser) -> None:
    """Adds `--profile`, for a command that makes a run where there is none."""
    command.add_argument("--profile", choices=sorted(PROFILES), help="the profile that a new run starts from")


def add_processes(command: argparse.ArgumentParser, text: str, *, default: int | None = 1) -> None:
    """Adds `--processes`, of which a command says itself what they share."""
    command.add_argument("--processes", type=int, default=default, metavar="N", help=text)


def settings_text() -> str:
    """Returns every setting with its default and its text."""
    return "\n".join(
        f"  {section}.{row['name']}={row['value']}\n      {row['text']}"
        for section, kind in SECTIONS.items()
        for row in describe(kind)
    )
