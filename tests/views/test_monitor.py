"""Watching a run from its folder alone: curves, tables and its present state."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fake_run import add_progress, add_training, fake_run, finished_run

from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.base.text import plain
from qlora_helpers.base.units import duration
from qlora_helpers.runs.folder import Run
from qlora_helpers.views import charts
from qlora_helpers.views.charts import Chart, Panel, number_text
from qlora_helpers.views.monitor import curves, loss_curve, plan_table, watch_once

ROOT = Path(__file__).parents[2]


def contrast(one: str, other: str) -> float:
    """Contrast of two colours (WCAG 2.2), 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def image(chart: Chart) -> str:
    """The SVG inside the chart's `<img>`."""
    (data,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', chart._repr_html_())
    return base64.b64decode(data).decode()


# the loss curve


def test_loss_curve_as_text(tmp_path):
    curve = loss_curve(finished_run(tmp_path))
    assert repr(curve).splitlines() == [
        "step  training loss  evaluation loss",
        "----  -------------  ---------------",
        "   2          3.059",
        "  10          2.344            2.463",
        "  20          2.212            2.287",
        "  30          2.165            2.229",
    ]
    assert len(curve.loss) == 15
    assert [step for step, _ in curve.eval_loss] == [10, 20, 30]


def test_loss_curve_as_an_image_that_says_what_it_shows(tmp_path):
    curve = loss_curve(finished_run(tmp_path))
    root = ElementTree.fromstring(image(curve))
    texts = {element.text for element in root.iter() if element.tag.endswith("}text")}
    assert {"training loss", "evaluation loss", "optimizer step"} <= texts
    label = "training loss from 3.059 at step 2 to 2.165 at step 30; evaluation loss from 2.463 at step 10 to 2.229"
    assert label in root.get("aria-label")
    assert label in curve._repr_html_()


@pytest.mark.parametrize("background", ["#ffffff", "#111111"])
def test_every_colour_has_contrast_on_light_and_dark(tmp_path, background):
    run = finished_run(tmp_path)
    for chart in (loss_curve(run), curves(run)):
        used = set(re.findall(r"(?:fill|stroke): ?(#\w{6})", image(chart)))
        assert used <= {charts.GREY, charts.BLUE, charts.ORANGE}
        assert charts.GREY in used
        assert min(contrast(colour, background) for colour in used) > 3.5


def test_an_svg_affects_nothing_else_on_its_page(tmp_path):
    run = finished_run(tmp_path)
    for chart in (loss_curve(run), curves(run)):
        text = chart.svg("currentColor")
        assert text.startswith("<svg ")
        assert charts.GREY not in text
        assert "<style" not in text
        ids, used = re.findall(r' id="([^"]+)"', text), re.findall(r'(?:href="|url\()#(\w+)', text)
        assert len(ids) == len(set(ids))
        assert used
        assert set(used) == set(ids)


def test_equal_curves_are_equal_files_and_drawing_leaves_no_state(tmp_path):
    code = (
        "import sys, matplotlib\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from pathlib import Path\nfrom fake_run import finished_run\nfrom qlora_helpers.views.monitor import loss_curve\n"
        "before = matplotlib.rcParams.copy()\n"
        f"one, two = (loss_curve(finished_run(Path({str(tmp_path)!r}), name)) for name in ('one', 'one'))\n"
        "print(one._repr_html_() == two._repr_html_(), before == matplotlib.rcParams.copy())\n"
        "print([name for name in ('torch', 'matplotlib.pyplot') if name in sys.modules])"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert output.split("\n")[:2] == ["True True", "[]"]


def test_nothing_logged_yet(tmp_path):
    run = fake_run(tmp_path)
    for chart in (loss_curve(run), curves(run), loss_curve(Run(tmp_path / "never-made"))):
        assert "no step has been logged yet" in repr(chart)
        assert chart._repr_html_() == f"<p>{chart.name}: no step has been logged yet</p>"
        assert chart.svg() == ""


def test_a_half_written_line_is_left_out(tmp_path):
    run = fake_run(tmp_path)
    add_progress(run)
    whole = loss_curve(run).loss
    with open(run.progress_path, "ab") as file:
        file.write(b'{"step": 32, "loss": 1.')
    assert loss_curve(run).loss == whole
    run.append_progress({"step": 34, "loss": 1.5})
    assert loss_curve(run).loss == (*whole, (34, 1.5))


def test_a_resumed_run_is_one_curve(tmp_path):
    run = fake_run(tmp_path)
    add_progress(run)
    run.append_progress({"event": "start", "session": 2, "resumed_from": 20})
    run.append_progress({"step": 22, "loss": 9.0})
    steps = [step for step, _ in loss_curve(run).loss]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]
    assert loss_curve(run).loss[-1] == (22, 9.0)


def test_what_is_no_number_is_left_out(tmp_path):
    run = fake_run(tmp_path)
    run.progress_path.write_text(
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": null}\n{"step": 3, "loss": "3"}\n{"step": 4, "loss": true}\n'
        '{"step": 5, "loss": 2}\n[1]\n'
    )
    assert loss_curve(run).loss == ((5, 2.0),)
    assert re.search(f"<use [^>]*{charts.BLUE}", image(loss_curve(run))), "a single point is drawn as a dot"


# tables of long runs


def test_a_long_table_is_thinned_and_keeps_its_ends_and_its_evaluations():
    loss = tuple((step, 1.0 * step) for step in range(1, 201))
    rows = Chart("run", [Panel("loss", {"loss": loss})]).table().rows
    assert len(rows) == charts.TABLE_ROWS
    assert (rows[0][0], rows[-1][0]) == ("1", "200")
    rows = Chart("run", [Panel("loss", {"loss": loss, "eval": ((50, 3.0), (100, 2.0))})]).table().rows
    assert [row[0] for row in rows] == ["1", "50", "100", "200"]
    assert rows[1] == ["50", "50.000", "3.000"]


def test_other_curves(tmp_path):
    run = finished_run(tmp_path)
    assert [panel.title for panel in curves(run).panels] == ["learning rate", "gradient norm", "tokens/s"]
    assert "   2        9.3e-04          1.000       822" in repr(curves(run))
    bare = fake_run(tmp_path, "bare")
    bare.append_progress({"step": 1, "loss": 2.0, "grad_norm": 0.5})
    assert [panel.title for panel in curves(bare).panels] == ["gradient norm"]


# one look at a run


def test_a_running_run(tmp_path):
    run = fake_run(tmp_path)
    add_progress(run, last=20)
    run.set_status(state="running", step=20, max_steps=30, session=1, pid=os.getpid(), host=os.uname().nodename)
    watch = watch_once(run)
    assert watch.seconds_left == pytest.approx(80)  # 8 s a step
    first, readings = repr(watch).splitlines()
    assert re.fullmatch(r"demo: running, step 20 of 30, about 1 min 20 s left, last sign of life [\d.]+ s ago", first)
    assert readings.startswith(
        "loss 2.212, evaluation loss 2.287, learning rate 3.3e-04, gradient norm 0.800, tokens/s 840"
    )
    assert readings.endswith("process 1.31 GiB")


def test_a_failed_events_copy_is_shown(tmp_path):
    run = finished_run(tmp_path)
    assert "TensorBoard" not in repr(watch_once(run))
    write_json(
        run.events_dir / "upload.json",
        {"target": "s3://b/p/demo", "last_error": "NoSuchBucket: <b>", "pending_bytes": 1024},
    )
    last = repr(watch_once(run)).splitlines()[-1]
    assert last.startswith("TensorBoard: s3://b/p/demo has not accepted the events for") and "NoSuchBucket: <b>" in last
    assert "1.0 KiB wait in the run folder" in last
    assert "NoSuchBucket: &lt;b&gt;" in watch_once(run)._repr_html_()


def test_time_left_uses_the_pace_of_this_session(tmp_path):
    run = fake_run(tmp_path)
    run.start_session(30, 0)
    add_progress(run, last=20)  # 8 s a step, long ago
    run.start_session(30, 20)
    assert watch_once(run).seconds_left is None
    for step in (22, 24):
        run.append_progress({"session": 2, "step": step, "loss": 2.0, "time": 2_000_000.0 + step / 2})
    run.set_status(step=24)
    assert watch_once(run).seconds_left == pytest.approx(3)


def test_a_run_that_has_only_begun(tmp_path):
    run = fake_run(tmp_path)
    run.start_session(30, 0)
    assert watch_once(run).seconds_left is None
    assert repr(watch_once(run)).startswith("demo: running (training), step 0 of 30, last sign of life ")
    assert repr(watch_once(fake_run(tmp_path, "new"))) == "new: new"


def test_gpu_readings(tmp_path):
    run = fake_run(tmp_path)
    gpus = [{"memory_used_gib": 21.34, "load": 97.0}, {"memory_used_gib": 3.0, "load": None}]
    run.append_progress({"step": 1, "loss": 2.0, "gpus": gpus})
    assert repr(watch_once(run)).splitlines()[1] == "loss 2.000, GPU 0 21.3 GiB 97 %, GPU 1 3.0 GiB"


def test_a_dead_trainer_is_shown_as_dead_with_its_last_error(tmp_path):
    run = fake_run(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    status = {"state": "running", "step": 14, "max_steps": 30, "pid": gone.pid, "host": os.uname().nodename}
    status |= {"session": 1, "heartbeat": time.time(), "last_error": "\x1b[31mOSError: <disk>\nis full\x1b[0m"}
    write_json(run.status_path, status)
    assert repr(watch_once(run)).splitlines() == [
        "demo: dead, step 14 of 30",
        "why it ended: the trainer's process ended without reporting why",
        "last error: OSError: <disk> is full",
    ]
    assert "OSError: &lt;disk&gt; is full" in watch_once(run)._repr_html_()


# numbers and texts


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (3.26, "3.3 s"),
        (9.7, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (252, "4 min 12 s"),
        (3599.7, "1 h 00 min"),
        (3900, "1 h 05 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.0, "0"),
        (2.16549, "2.165"),
        (0.01, "0.010"),
        (2e-4, "2.0e-04"),
        (12345.6, "12,346"),
        (-3.0, "-3.000"),
    ],
)
def test_readings_have_as_many_digits_as_are_worth_reading(value, text):
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a\tb\nc 👩‍👧 é", "a\tb\nc 👩‍👧 é"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x9b2Jwiped", "wiped"),
        ("\x1b]0;a title\x07text", "text"),
        ("\x1b]8;;https://example.org\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bcreset \x1b(Bset", "reset set"),
        ("bell\x07 null\x00 del\x7f back\x08", "bell null del back"),
        ("\u202eevil\u202c \ud83d half", "evil  half"),
        ("open \x1b[", "open "),
    ],
)
def test_texts_from_elsewhere_are_plain(text, clean):
    assert plain(text) == clean


def test_predicted_values_are_beside_measured_ones(tmp_path):
    run = Run(tmp_path / "mine")
    add_training(run)
    written = read_json(run.plan_path)["measured"]
    measured = written | {"peak_gib": {"cuda:0": 65.63}, "reserved_gib": {"cuda:0": 68.68}, "tokens_per_s": 2783.0}
    predicted = {"allocated_gib": {"cuda:0": 63.2}, "reserved_gib": {"cuda:0": 66.3}, "tokens_per_s": 2800.4}
    write_json(run.plan_path, {"measured": measured, "predicted": predicted})
    assert plan_table(run).rows == [
        ["peak held by tensors, cuda:0, GiB", "63.20", "65.63"],
        ["peak reserved, cuda:0, GiB", "66.30", "68.68"],
        ["tokens/s", "2,800", "2,783"],
    ]
    write_json(
        run.plan_path, {"measured": written | {"peak_gib": {"cpu": 3.03}, "tokens_per_s": 180.0}}
    )  # a CPU has no prediction
    assert plan_table(run).rows == [["peak held by tensors, cpu, GiB", "", "3.03"], ["tokens/s", "", "180"]]
