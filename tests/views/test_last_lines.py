"""The end of a log as a terminal would show it."""

from __future__ import annotations

from qlora_helpers.views.follow import LINE_CHARACTERS, LOG_BYTES, LOG_LINES, last_lines


def test_a_short_log_is_shown_whole(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("first\n\nsecond\nunfinished")
    assert last_lines(path) == ("first", "second", "unfinished")
    assert last_lines(tmp_path / "missing.txt") == ()


def test_values_of_steps_push_no_message_out(tmp_path):
    path = tmp_path / "log.txt"
    step = "2026-11-30 18:03:06,101 qlora_helpers.training.callback INFO step {}: epoch 1, loss 2.1"
    path.write_text("first\nsecond\n" + "".join(f"{step.format(number)}\n" for number in range(100)))
    assert last_lines(path, 2) == ("first", "second", step.format(98), step.format(99))


def test_only_the_last_lines_are_shown(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("".join(f"line {number}\n" for number in range(100)))
    assert last_lines(path) == tuple(f"line {number}" for number in range(100 - LOG_LINES, 100))
    assert last_lines(path, 2) == ("line 98", "line 99")


def test_a_first_line_whose_beginning_is_cut_off_is_not_shown(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("x" * LOG_BYTES + " end of a long line\nsecond\nthird\n")
    assert last_lines(path) == ("second", "third")
    path.write_text("kept\n" + "y" * (LOG_BYTES - 10) + "\n")  # everything is read, so nothing is cut off
    assert last_lines(path)[0] == "kept"


def test_a_single_line_longer_than_what_is_read_is_shown_cut(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("z" * (2 * LOG_BYTES))
    (line,) = last_lines(path)
    assert line == "z" * (LINE_CHARACTERS - 1) + "…"


def test_a_bar_that_was_redrawn_is_shown_in_its_last_state(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(b"start\r\n 10%\r 50%\r100%\nend\n")
    assert last_lines(path) == ("start", "100%", "end")
