"""Short forms of texts, sizes and times for a person."""

from __future__ import annotations

import pytest

from qlora_helpers.base.text import brief, plain, short_name, size_text
from qlora_helpers.base.units import BYTES_IN_GIB, duration, gib


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (3600, "1 h 00 min")],
)
def test_durations_change_their_unit_at_the_limit(seconds, text):
    assert duration(seconds) == text


def test_only_the_first_line_of_an_error_is_kept():
    assert brief(ValueError("  first\x1b line. \nsecond")) == "first  line"
    assert brief(ValueError()) == "ValueError"
    assert brief(ValueError("x" * 500)) == "x" * 200


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (1024**2, "1.0 MiB"), (1.5 * BYTES_IN_GIB, "1.5 GiB")],
)
def test_sizes_change_their_unit_at_the_limit(size, text):
    assert size_text(size) == text
    assert gib(BYTES_IN_GIB) == 1


def test_terminal_codes_are_removed_and_line_ends_stay():
    assert plain("a\x1b[31mred\x1b[0m\tb\r\n\x1b]0;title\x07c\u202e") == "ared\tb\nc"


def test_names_without_the_folders_of_this_machine(tmp_path):
    assert short_name(str(tmp_path / "model.gguf"), keep_owner=True) == "model.gguf"
    assert short_name("owner/model") == "model"
    assert short_name("owner/model", keep_owner=True) == "owner/model"
