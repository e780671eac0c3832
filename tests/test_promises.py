"""The page on what survives what names tests that exist, and no promise stands there without one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| what ")]
NAMED = sorted(set(re.findall(r"`([\w/]+\.py(?:::\w+)?)`", "\n".join(ROWS))))


def test_every_promise_names_what_shows_it():
    assert len(ROWS) >= 25
    assert [row for row in ROWS if ".py" not in row.rsplit("|", 2)[1]] == []
    assert len(NAMED) >= 40


@pytest.mark.parametrize("name", NAMED)
def test_a_test_that_is_named_exists(name):
    path, _, function = name.partition("::")
    text = (ROOT / "tests" / path).read_text(encoding="utf-8")
    assert not function or re.search(rf"^def {function}\(", text, re.MULTILINE), name
