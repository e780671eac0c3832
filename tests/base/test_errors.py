"""Errors that a person can fix are one line in a notebook, and all of the message."""

from __future__ import annotations

import pytest
from IPython.core.interactiveshell import InteractiveShell

from qlora_helpers.base.errors import ConfigError, Interrupted, RunError, UserError


@pytest.fixture
def shown(capsys):
    """Runs code as a cell and returns what IPython shows below it."""
    shell = InteractiveShell.instance()
    shell.push({each.__name__: each for each in (ConfigError, Interrupted, RunError, UserError)})

    def run(code: str) -> str:
        outcome = shell.run_cell(code)
        assert outcome.error_in_exec is not None
        return "".join(capsys.readouterr())

    yield run
    shell.reset()
    InteractiveShell.clear_instance()


def test_an_error_that_a_person_can_fix_is_its_message(shown):
    code = "def deep(): raise RunError('no folder', expected='a run', got='nothing', next_step='Name one.')\ndeep()"
    assert shown(code).strip() == "\x1b[0;31mRunError\x1b[0m: no folder; expected a run; got nothing. Name one."


def test_an_error_that_was_raised_from_another_is_one_line_too(shown):
    code = "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise UserError('it is zero') from error"
    assert shown(code).strip() == "\x1b[0;31mUserError\x1b[0m: it is zero."


def test_all_wrong_settings_are_listed(shown):
    assert shown("raise ConfigError(['a is wrong', 'b is wrong'])").count("\n  - ") == 2


def test_an_interrupt_is_one_line(shown):
    assert shown("raise Interrupted('train was interrupted')").strip() == "stopped: train was interrupted"


def test_a_bug_keeps_its_traceback(shown):
    assert "Traceback" in shown("1 / 0")
