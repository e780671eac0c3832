"""Which tests run in one process when several share the work: those of a file that makes a fixture once for all of its tests.

xdist has groups of its own, but 3.8 writes a group into a test's name where pytest 9.2 no longer reads it: every process then made
every such fixture again. So the files themselves say it here, and `test_groups` runs two processes to see that it holds.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest

_NAMED = re.compile(r"xdist_group\(\"(\w+)\"\)")
_ONCE_A_FILE = 'scope="module"'


@functools.cache
def group_of(file: Path) -> str | None:
    """Returns the group that a file's tests run in: one that it names, its own, or None where each may run anywhere."""
    text = file.read_text(encoding="utf-8")
    named = _NAMED.search(text)
    return named[1] if named else file.stem if _ONCE_A_FILE in text else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands a group to a process as a whole, and every other test by itself."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(config.rootpath / nodeid.partition("::")[0]) or nodeid

    return ByGroup(config, log)
