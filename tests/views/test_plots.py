"""The geometry of plots: scales, ticks, smoothing, and the picture that a stored notebook keeps."""

from __future__ import annotations

import base64
import math
import re
import xml.etree.ElementTree

import pytest

from qlora_helpers.views.plots import Line, Mark, Plot, axis_end, drawn, log_ticks, smoothed, thinned, written
from qlora_helpers.views.still_picture import still_picture

FALLING = tuple((step, 4.0 / step) for step in range(1, 41))


@pytest.mark.parametrize(
    ("step", "last", "end"),
    [(0, 0, 10), (0, 60, 10), (7, 60, 10), (30, 60, 40), (50, 60, 60), (70, 60, 70), (900, 0, 1500)],
)
def test_the_axis_grows_in_round_steps_to_the_end_of_the_run(step, last, end):
    assert axis_end(step, last) == end


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0, 100, ["0", "20", "40", "60", "80", "100"]),
        (1.93, 3.1, ["2.0", "2.2", "2.4", "2.6", "2.8", "3.0"]),
        (2.105, 2.195, ["2.12", "2.14", "2.16", "2.18"]),
        (0, 1.06e-3, ["0", "2e-4", "4e-4", "6e-4", "8e-4", "1e-3"]),
        (9.93e-4, 1e-3, ["9.94e-4", "9.96e-4", "9.98e-4", "1.00e-3"]),
        (0.705, 0.7061, ["0.7050", "0.7052", "0.7054", "0.7056", "0.7058", "0.7060"]),
        (0, 31_000, ["0", "10k", "20k", "30k"]),
        (20_100, 20_900, ["20.2k", "20.4k", "20.6k", "20.8k"]),
        (100_010, 100_060, ["100010", "100020", "100030", "100040", "100050", "100060"]),
    ],
)
def test_ticks_are_round_numbers_whose_texts_differ(low, high, texts):
    found = written(low, high, 6)
    assert [text for _, text in found] == texts
    assert all(low <= tick <= high + 1e-9 for tick, _ in found)


def test_ticks_of_steps_are_whole():
    assert [text for _, text in written(3, 5, 6, whole=True)] == ["3", "4", "5"]


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [(0.4, 9, ["0.5", "1", "2", "5"]), (1e-4, 90, ["0.0001", "0.001", "0.01", "0.1", "1", "10"]), (2.1, 2.4, [])],
)
def test_ticks_of_a_logarithmic_axis(low, high, texts):
    assert [text for _, text in log_ticks(low, high)] == texts


@pytest.mark.parametrize("value", [2.0, 0.0, -3.0])
def test_a_constant_curve_has_room_above_and_below(value):
    drawing = drawn(Plot("loss", (Line("loss", ((1, value), (2, value))),)), (0, 10))
    assert drawing.up[0] < value < drawing.up[1]
    assert drawing.place(5, value) == (0.5, pytest.approx(0.5))


def test_an_axis_of_percent_ends_at_a_hundred():
    line = Line("load", ((1, 97.0), (2, 97.0)))
    assert drawn(Plot("GPU load, %", (line,), ceiling=100.0), (0, 10)).up == (pytest.approx(87.3), 100.0)
    assert drawn(Plot("CPU load, %", (line,)), (0, 10)).up[1] > 100


def test_a_logarithmic_axis_gives_equal_factors_equal_heights():
    drawing = drawn(Plot("loss", (Line("loss", (*FALLING, (41, 0.0), (42, -1.0))),), log=True), (0, 50))
    heights = [drawing.place(0, value)[1] for value in (0.5, 1.0, 2.0)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1])
    assert drawing.shown[0] == FALLING, "what has no logarithm is not drawn"


def test_only_the_chosen_steps_are_drawn_and_scaled():
    plot = Plot("loss", (Line("loss", FALLING),), marks=(Mark("saved", 5), Mark("saved", 30)))
    drawing = drawn(plot, (20, 40))
    assert drawing.shown[0] == FALLING[19:]
    assert drawing.up[1] < 0.25
    assert [mark.step for mark in drawing.marks()] == [30]
    assert drawing.paths[0][1].startswith("M0 ") and drawing.paths[0][1].count("L") == 20
    assert drawn(plot, (90, 99)).is_empty


def test_smoothing_is_a_corrected_moving_average_over_the_raw_line():
    assert smoothed(FALLING, 0.0) == FALLING
    found = smoothed(((1, 1.0), (2, 2.0), (3, 4.0)), 0.5)
    assert found == ((1, 1.0), (2, pytest.approx(5 / 3)), (3, pytest.approx((1 / 8 + 2 / 4 + 4 / 2) / (7 / 8))))
    drawing = drawn(Plot("loss", (Line("loss", found, raw=((1, 1.0), (2, 2.0), (3, 4.0))),)), (0, 4))
    assert drawing.paths[0][0] and drawing.paths[0][0] != drawing.paths[0][1]
    assert drawing.up[1] > 4.0, "the raw line has its place, too"


def test_thinned_curves_keep_their_ends_and_extremes():
    points = tuple((step, float(step % 7)) for step in range(10_000))
    points = (*points[:5000], (5000, 99.0), *points[5001:])
    shown = thinned(points)
    assert len(shown) <= 400
    assert shown[0] == points[0] and shown[-1] == points[-1] and (5000, 99.0) in shown
    assert [step for step, _ in shown] == sorted(step for step, _ in shown)
    assert thinned(points[:400]) == points[:400]


def test_a_single_point_is_a_dot():
    assert drawn(Plot("loss", (Line("loss", ((3, 1.0),)),)), (0, 10)).paths[0][1:] == ("", "M300 500h0")


def test_the_still_picture_is_an_image_of_its_own_and_says_what_it_shows():
    plots = [Plot("loss, <nats>", (Line("training & loss", FALLING),)), Plot("empty", (Line("nothing", ()),))]
    found = still_picture([drawn(plot, (0, 40)) for plot in plots], "demo")
    assert "training &amp; loss from 4.000 at step 1 to 0.100 at step 40" in found and "empty" not in found
    svg = base64.b64decode(re.search(r"base64,([^\"]*)", found)[1]).decode()
    xml.etree.ElementTree.fromstring(svg)  # it is valid, whatever the names hold
    assert "<style" not in svg and "script" not in svg
    assert still_picture([drawn(plots[1], (0, 40))], "demo") == ""


def test_places_are_finite_for_every_scale():
    for low, high in ((1e-300, 1e300), (-1e300, 1e300), (1.0, 1.0 + 1e-15)):
        drawing = drawn(Plot("loss", (Line("loss", ((1, low), (2, high))),)), (0, 3))
        assert all(math.isfinite(place) for place, _ in drawing.values)
