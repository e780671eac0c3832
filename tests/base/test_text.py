"""Texts for a terminal or a page: short, in one line, without control characters."""

from __future__ import annotations

import pytest

from qlora_helpers.base.text import brief, short_name, size_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1024**2, "1.0 MiB"),
        (1024**3 - 1, "1024.0 MiB"),
        (1024**3, "1.0 GiB"),
    ],
)
def test_sizes_take_the_largest_unit_that_fits(size, text):
    assert size_text(size) == text


def test_an_error_is_cut_to_one_short_line():
    assert brief(ValueError("  the first line. \nthe second")) == "the first line"
    assert brief(ValueError("a\x1b[31mb\u202ec")) == "a [31mb c"
    assert brief(ValueError("x" * 500)) == "x" * 200
    assert brief(KeyError()) == "KeyError"


def test_names_lose_their_folders_and_keep_their_owner_on_request(tmp_path):
    assert short_name(str(tmp_path / "mine"), keep_owner=True) == "mine"
    assert short_name("tiiuae/falcon-7b") == "falcon-7b"
    assert short_name("tiiuae/falcon-7b", keep_owner=True) == "tiiuae/falcon-7b"
