"""The command line: parses its arguments, calls a command of `commands/` and maps exit codes.

It exits with 0 on success, with 2 and one clear message on what the user can fix, with 141 where
its output is no longer read, and with 1 on a bug in this package.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from qlora_helpers.base.addresses import redacted
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.files import NEXT_STEPS
from qlora_helpers.commands import board, clean, demo, evaluate, leave, plan, side_by_side, sweeps, terminal, train
from qlora_helpers.commands.options import program

COMMANDS = (plan, train, sweeps, evaluate, side_by_side, board, leave, clean, demo)
"""The modules of the commands, in the order in which the help lists them."""
INSTALL = "Install what is missing: pip install -r requirements.txt (`doctor` lists it)."


def parser() -> argparse.ArgumentParser:
    """Builds the argument parser; each command's module adds its own arguments, and the function that runs it as `call`."""
    top = argparse.ArgumentParser(
        prog=program(), description="QLoRA fine-tuning, from a data file to a model that is served."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = parser().parse_args(arguments)
    try:
        code = int(options.call(options))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output has seen enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 128 + signal.SIGPIPE
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
