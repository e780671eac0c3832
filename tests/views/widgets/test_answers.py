"""The answer panel without a browser: what it asks, shows, stops and survives. The model behind it is in test_answers_in_pieces."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.views.widgets import answer_panel

EXAMPLES = [
    {"id": "t1", "dialogue": "Ann: lunch?\nBo: at one", "summary": "Ann and Bo have lunch at one."},
    "Cy: <b>late</b>\nDi: ok",
]


def echo(dialogue, *, tuned, temperature, top_p, max_new_tokens):
    """Says what it was asked, in pieces."""
    yield f"{'tuned' if tuned else 'base'} "
    yield f"{temperature:g} {top_p:g} {max_new_tokens} "
    yield dialogue.upper()


class Slow:
    """Writes a word a time until it is closed."""

    def __init__(self):
        self.closed, self.first = threading.Event(), threading.Event()

    def __call__(self, dialogue, **settings):
        try:
            for number in range(2000):
                self.first.set()
                yield f"word{number} "
                time.sleep(0.01)
        finally:
            self.closed.set()


def find(widget, name):
    if name in getattr(widget, "_dom_classes", ()):
        return widget
    return next((hit for child in getattr(widget, "children", ()) if (hit := find(child, name))), None)


def asked(panel):
    find(panel.box, "qlora-ask").click()
    assert panel.wait(20)
    return [find(panel.box, f"qlora-answer-{name}").value for name in ("base", "tuned")]


def test_both_answer_what_was_typed_with_what_was_set():
    panel = answer_panel(echo, EXAMPLES)
    find(panel.box, "qlora-dialogue").value = "Ed: hi"
    panel._temperature.value, panel._top_p.value, panel._length.value = 0.7, 0.5, 33
    base, tuned = asked(panel)
    assert "base 0.7 0.5 33 ED: HI" in base and "tuned 0.7 0.5 33 ED: HI" in tuned
    assert {given.state for given in panel.answers.values()} == {"done"}
    assert not find(panel.box, "qlora-ask").disabled and find(panel.box, "qlora-stop").disabled


def test_a_picked_dialogue_brings_its_summary():
    panel = answer_panel(echo, EXAMPLES)
    assert find(panel.box, "qlora-dialogue").value == EXAMPLES[0]["dialogue"]
    assert "have lunch at one" in panel._reference.value
    find(panel.box, "qlora-pick").value = 1
    assert find(panel.box, "qlora-dialogue").value == EXAMPLES[1] and panel._reference.value == ""
    find(panel.box, "qlora-pick").value = 0
    find(panel.box, "qlora-dialogue").value += "\nAnn: sure"
    assert find(panel.box, "qlora-pick").value == -1 and panel._reference.value == "", "typed over: no longer that row"
    assert answer_panel(echo)._dialogue.value == ""


def test_an_answer_of_white_space_says_so():
    panel = answer_panel(lambda dialogue, **settings: iter(["\n", "\n"]), EXAMPLES)
    assert "white space" in asked(panel)[0]


def test_it_shows_pieces_as_they_come_stops_and_asks_again():
    slow = Slow()
    panel = answer_panel(slow, EXAMPLES)
    started = time.monotonic()
    panel.ask()
    assert time.monotonic() - started < 1, "the kernel is free"
    assert slow.first.wait(10)
    deadline = time.monotonic() + 10
    while "word3" not in find(panel.box, "qlora-answer-base").value and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "word3" in find(panel.box, "qlora-answer-base").value and panel.busy
    panel.ask()  # a second click changes nothing
    assert threading.active_count() and sum(each.name == "answers" for each in threading.enumerate()) == 1
    find(panel.box, "qlora-stop").click()
    assert panel.wait(10) and slow.closed.is_set()
    assert [given.state for given in panel.answers.values()] == ["stopped", "stopped"]
    assert panel.answers["base"].text and not panel.answers["tuned"].text
    panel.asking.answer = echo
    assert "ANN: LUNCH?" in asked(panel)[1]


def test_an_iterator_is_closed_although_somebody_still_holds_it():
    class Pieces:
        closed = 0

        def __iter__(self):
            return iter(["one ", "two"])

        def close(self):
            self.closed += 1

    held = Pieces()
    panel = answer_panel(lambda dialogue, **settings: held, EXAMPLES)
    assert "one two" in asked(panel)[1] and held.closed == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RunError("no adapter yet", next_step="Train first."), "no adapter yet. Train first."),
        (RuntimeError("CUDA out of <memory>"), "RuntimeError: CUDA out of &lt;memory&gt;"),
    ],
)
def test_an_error_is_shown_and_the_panel_lives_on(error, message):
    def broken(dialogue, **settings):
        yield "so far"
        raise error

    panel = answer_panel(broken, EXAMPLES)
    base, tuned = asked(panel)
    assert message in panel._message.value
    assert "so far" in base and "failed" in base and "failed" in tuned
    panel.asking.answer = echo
    assert "LUNCH" in asked(panel)[0] and panel._message.value == ""


def test_an_empty_dialogue_is_one_message():
    panel = answer_panel(echo)
    find(panel.box, "qlora-ask").click()
    assert "nothing to ask" in panel._message.value and not panel.answers


def test_html_is_shown_not_run():
    bad = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    panel = answer_panel(lambda dialogue, **settings: iter([dialogue]), [{"dialogue": bad, "summary": bad, "id": bad}])
    shown = "".join(asked(panel)) + panel._reference.value + panel._repr_mimebundle_()["text/html"]
    assert "<script" not in shown and "<img" not in shown and shown.count("&lt;script&gt;") >= 4


def test_an_object_without_a_dialogue_is_refused():
    with pytest.raises(UserError, match="not a dialogue"):
        answer_panel(echo, [7])


def test_without_widgets_it_is_the_answers_so_far():
    panel = answer_panel(echo, EXAMPLES)
    assert "not asked yet" in repr(panel) and "have lunch at one" in repr(panel)
    asked(panel)
    bundle = panel._repr_mimebundle_()
    for text in (bundle["text/plain"], bundle["text/html"]):
        assert "base 0 0.9 80 ANN: LUNCH?" in text and "tuned 0 0.9 80" in text
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_asking_imports_no_torch():
    code = (
        "import sys; from qlora_helpers.views.widgets import answer_panel, row_browser\n"
        "panel = answer_panel(lambda dialogue, **settings: iter(['a', 'b']), ['Ann: hi']); panel.ask(); panel.wait(9)\n"
        "print(panel.answers['tuned'].text, sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "ab []", done.stdout + done.stderr
