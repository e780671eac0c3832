"""The answer panel without a browser: what it asks, shows, stops and survives. The model behind it is in test_answers_in_pieces."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.data.examples import Example, Message, one_turn
from qlora_helpers.evaluation.conversation import Begun, Ended, Note
from qlora_helpers.views.widgets import answer_panel

EXAMPLES = [
    {"id": "t1", "dialogue": "Ann: lunch?\nBo: at one", "summary": "Ann and Bo have lunch at one."},
    "Cy: <b>late</b>\nDi: ok",
]


def echo(asked, *, model, temperature, top_p, max_new_tokens, seed):
    """Says what it was asked, in pieces."""
    yield f"{model} "
    yield f"{temperature:g} {top_p:g} {max_new_tokens} {seed} "
    yield " | ".join(asked.turns).upper()


class Slow:
    """Writes a word a time until it is closed."""

    def __init__(self):
        self.closed, self.first = threading.Event(), threading.Event()

    def __call__(self, asked, **settings):
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


def shown(panel):
    return [find(panel.box, f"qlora-answer-{side}").value for side in ("left", "right")]


def asked(panel, text=None):
    if text is not None:
        find(panel.box, "qlora-dialogue").value = text
    find(panel.box, "qlora-ask").click()
    assert panel.wait(20)
    return shown(panel)


def test_both_answer_what_was_typed_with_what_was_set():
    panel = answer_panel(echo, EXAMPLES)
    controls = panel.controls
    controls.temperature.value, controls.top_p.value, controls.length.value, controls.seed.value = 0.7, 0.5, 33, 9
    left, right = asked(panel, "Ed: hi")
    assert "base 0.7 0.5 33 9 ED: HI" in left and "tuned 0.7 0.5 33 9 ED: HI" in right
    assert "temperature 0.7, top_p 0.5, seed 9, at most 33 tokens" in left
    assert {given.state for given in panel.answers.values()} == {"done"}
    assert not find(panel.box, "qlora-ask").disabled and find(panel.box, "qlora-stop").disabled
    assert find(panel.box, "qlora-dialogue").value == ""


def test_a_conversation_goes_on_with_each_model_s_own_answers():
    panel = answer_panel(echo)
    asked(panel, "one")
    left, right = asked(panel, "two")
    assert "ONE | BASE 0 0.9 80 0 ONE | TWO" in left and "ONE | TUNED 0 0.9 80 0 ONE | TWO" in right
    assert len(panel.asking.turns) == 2 and left.count("qlora-asked") == 2
    find(panel.box, "qlora-new").click()
    assert find(panel.box, "qlora-dialogue").value == "two", "the last question comes back to be changed"
    assert "ONE" not in shown(panel)[0]
    assert "base 0 0.9 80 0 THREE" in asked(panel, "three")[0]


def test_the_last_question_is_asked_again_with_other_settings_or_models():
    panel = answer_panel(echo)
    asked(panel, "one")
    asked(panel, "two")
    panel.controls.seed.value = 4
    assert "answered with other settings than are set now: greedy" in shown(panel)[0], "stale answers are marked"
    find(panel.box, "qlora-again").click()
    assert panel.wait(20)
    left = shown(panel)[0]
    assert "base 0 0.9 80 4 ONE | BASE 0 0.9 80 0 ONE | TWO" in left and "qlora-stale" not in left
    panel.controls.models["left"].value = "tuned"
    assert "answers of another model than is chosen now" in shown(panel)[0] and "stale" not in shown(panel)[1]
    find(panel.box, "qlora-again").click()
    assert panel.wait(20)
    assert "tuned 0 0.9 80 4 ONE | TUNED 0 0.9 80 4 ONE | TWO" in shown(panel)[0], "all of its conversation is its own"
    panel.controls.models["left"].value = "base"
    assert "TWO" not in asked(panel, "three")[0], "other models begin a new conversation"


def test_any_two_of_the_models_that_the_function_knows():
    def answer(asked, **settings):
        yield settings["model"]

    answer.models = {"base": "untuned", "tuned": "tuned (a)", "run:b": "run b"}
    panel = answer_panel(answer, EXAMPLES)
    find(panel.box, "qlora-model-left").value = "run:b"
    left, right = asked(panel)
    assert "<b>run b</b>" in left and "run:b" in left and "<b>tuned (a)</b>" in right


def test_a_picked_dialogue_brings_its_summary():
    panel = answer_panel(echo, EXAMPLES)
    assert find(panel.box, "qlora-dialogue").value == EXAMPLES[0]["dialogue"]
    assert "have lunch at one" in panel.controls.reference.value
    find(panel.box, "qlora-pick").value = 1
    assert find(panel.box, "qlora-dialogue").value == EXAMPLES[1] and panel.controls.reference.value == ""
    find(panel.box, "qlora-pick").value = 0
    asked(panel)
    assert "have lunch at one" in panel.controls.reference.value, "it belongs to what is shown"
    asked(panel, "and then?")
    assert panel.controls.reference.value == ""
    find(panel.box, "qlora-pick").value = 1
    assert "the next question begins a new one" in shown(panel)[0]
    assert "LUNCH" not in asked(panel)[0]
    find(panel.box, "qlora-pick").value = 0
    find(panel.box, "qlora-dialogue").value += "\nAnn: sure"
    assert find(panel.box, "qlora-pick").value == -1 and panel.controls.reference.value == "", "no longer that row"
    assert answer_panel(echo).controls.question.value == ""


def test_a_row_of_many_turns_is_asked_with_what_comes_before():
    seen = []

    def answer(asked, **settings):
        seen.append(asked)
        yield "yes"

    turns = (("system", "Be <b>"), ("user", "Hi"), ("assistant", "Ho"), ("user", "And?"), ("assistant", "x"))
    row = Example("r", "r", tuple(Message(*turn) for turn in turns))
    panel = answer_panel(answer, [row, one_turn("s", "s", "text", "answer", instruction="Do: ")])
    left, _ = asked(panel)
    assert seen[0].row is row and seen[0].turns == ("And?",)
    assert "r has 3 messages before this question" in left and "Be &lt;b&gt;" in left
    find(panel.box, "qlora-pick").value = 1
    assert "before this question" not in asked(panel)[0] and seen[-1].row.id == "s"


def test_what_is_said_beside_an_answer_is_shown():
    def answer(asked, **settings):
        yield Note("is loading the model")
        yield Begun(300, "12 tokens were cut at the middle of the text to fit: a [cut] <b>", "single questions")
        yield from ("one ", "two")
        yield Ended(80, by_itself=settings["model"] == "base")

    left, right = asked(answer_panel(answer, EXAMPLES))
    assert (
        "ended by itself after 80 tokens" in left and "cut off at 80 tokens" in right and "prompt 300 tokens" in right
    )
    assert "a [cut] &lt;b&gt;" in left and "single questions" in left


def test_what_it_does_before_the_first_token_is_shown():
    go = threading.Event()

    def answer(asked, **settings):
        yield Note("is loading the model")
        go.wait(10)
        yield "done"

    panel = answer_panel(answer, EXAMPLES)
    panel.ask()
    deadline = time.monotonic() + 10
    while "is loading the model" not in shown(panel)[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "is loading the model" in shown(panel)[0] and "is waiting for its turn" in shown(panel)[1]
    go.set()
    assert panel.wait(10)


def test_the_end_of_a_long_question_is_folded_and_nothing_of_it_is_lost():
    long = "word " * 300
    left = asked(answer_panel(lambda asked, **settings: iter(["yes"]), [long]))[0]
    assert left.count("word") == 300 and "<details><summary>the other 1,1" in left
    assert "<details>" not in asked(answer_panel(lambda asked, **settings: iter(["yes"]), ["short"]))[0]


def test_an_answer_of_white_space_says_so():
    panel = answer_panel(lambda asked, **settings: iter(["\n", "\n"]), EXAMPLES)
    assert "white space" in asked(panel)[0]


def test_it_shows_pieces_as_they_come_stops_and_asks_again():
    slow = Slow()
    others = set(threading.enumerate())  # of panels of other tests in this process
    panel = answer_panel(slow, EXAMPLES)
    panel.ask()
    assert panel.busy, "it returns before there is an answer"
    assert slow.first.wait(10)
    deadline = time.monotonic() + 10
    while "word3" not in shown(panel)[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "word3" in shown(panel)[0] and panel.busy
    panel.ask()  # a second click changes nothing
    panel.new_conversation()
    writing = [each for each in threading.enumerate() if each.name == "answers" and each not in others]
    assert len(panel.asking.turns) == 1 and len(writing) == 1
    find(panel.box, "qlora-stop").click()
    assert panel.wait(10) and slow.closed.is_set()
    assert [given.state for given in panel.answers.values()] == ["stopped", "stopped"]
    assert panel.answers["left"].text and not panel.answers["right"].text
    assert f"stopped, {panel.answers['left'].tokens} tokens" in shown(panel)[0]
    panel.asking.answer = echo
    find(panel.box, "qlora-again").click()
    assert panel.wait(20) and "ANN: LUNCH?" in shown(panel)[1]


def test_an_iterator_is_closed_although_somebody_still_holds_it():
    class Pieces:
        closed = 0

        def __iter__(self):
            return iter(["one ", "two"])

        def close(self):
            self.closed += 1

    held = Pieces()
    panel = answer_panel(lambda asked, **settings: held, EXAMPLES)
    assert "one two" in asked(panel)[1] and held.closed == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RunError("no adapter yet", next_step="Train first."), "no adapter yet. Train first."),
        (RuntimeError("CUDA out of <memory>"), "RuntimeError: CUDA out of &lt;memory&gt;"),
    ],
)
def test_an_error_is_shown_and_the_panel_lives_on(error, message):
    def broken(asked, **settings):
        yield "so far"
        raise error

    panel = answer_panel(broken, EXAMPLES)
    left, right = asked(panel)
    assert message in panel.controls.message.value
    assert "so far" in left and "failed" in left and "failed" in right
    panel.asking.answer = echo
    assert "LUNCH" in asked(panel, "lunch")[0] and panel.controls.message.value == ""


def test_an_empty_dialogue_is_one_message():
    panel = answer_panel(echo)
    find(panel.box, "qlora-ask").click()
    assert "nothing to ask" in panel.controls.message.value and not panel.answers


def test_html_is_shown_not_run():
    bad = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    panel = answer_panel(lambda asked, **settings: iter(asked.turns), [{"dialogue": bad, "summary": bad, "id": bad}])
    seen = "".join(asked(panel)) + panel.controls.reference.value + panel._repr_mimebundle_()["text/html"]
    assert "<script" not in seen and "<img" not in seen and seen.count("&lt;script&gt;") >= 4


def test_an_object_without_a_dialogue_is_refused():
    with pytest.raises(UserError, match="not a dialogue"):
        answer_panel(echo, [7])


# votes


def test_a_vote_is_kept_once_and_is_refused_for_what_can_t_be_compared():
    votes = []
    panel = answer_panel(echo, EXAMPLES, vote=lambda vote: votes.append(vote) or f"{len(votes)} votes <b>")
    left, right = (find(panel.box, f"qlora-vote-{side}") for side in ("left", "right"))
    assert left.disabled and right.disabled
    asked(panel)
    assert not right.disabled
    right.click()
    (vote,) = votes
    assert (vote.left, vote.right, vote.better, vote.blind, vote.turn) == ("base", "tuned", "right", False, 1)
    assert vote.question == EXAMPLES[0]["dialogue"] and vote.answers[1].startswith("tuned 0")
    assert vote.settings == {"temperature": 0.0, "top_p": 0.9, "max_new_tokens": 80.0, "seed": 0.0}
    assert "1 votes &lt;b&gt;" in find(panel.box, "qlora-votes").value and "voted: the right answer" in shown(panel)[0]
    assert right.disabled
    panel.vote("left")
    assert len(votes) == 1, "one vote a question"
    find(panel.box, "qlora-model-left").value = "tuned"
    asked(panel, "again")
    assert right.disabled, "one model against itself"
    assert find(answer_panel(echo).box, "qlora-vote-left") is None, "where nobody keeps votes there are none"


def test_an_answer_that_comes_at_once_leaves_its_buttons_enabled(monkeypatch):
    """It ends while the click that asked for it still sets the buttons for the time in which it is written."""
    settled = threading.Event()

    def answer(asked, **settings):
        settled.wait(20)
        yield from echo(asked, **settings)

    panel = answer_panel(answer, EXAMPLES, vote=lambda vote: "kept")
    enable = panel.controls.enable

    def slowly(**states):
        if threading.current_thread() is threading.main_thread():
            settled.set()
            panel.asking.wait(0.5)  # it ends within this time, unless it has to wait for this call
        enable(**states)

    monkeypatch.setattr(panel.controls, "enable", slowly)
    asked(panel)
    assert not find(panel.box, "qlora-vote-tie").disabled and not find(panel.box, "qlora-ask").disabled


def test_names_are_hidden_until_a_blind_vote(monkeypatch):
    from qlora_helpers.views.widgets import answers

    votes = []
    monkeypatch.setattr(answers.random, "random", lambda: 0.0)
    panel = answer_panel(
        lambda asked, **settings: iter([f"from {settings['model']}"]), EXAMPLES, vote=lambda v: votes.append(v) or ""
    )
    panel.controls.blind.value = True
    left, right = asked(panel)
    assert "<b>A</b>" in left and "<b>B</b>" in right and "untuned" not in left + right
    assert "from tuned" in left, "the sides have changed by chance"
    find(panel.box, "qlora-vote-left").click()
    assert (votes[0].left, votes[0].right, votes[0].better, votes[0].blind) == ("tuned", "base", "left", True)
    assert "<b>tuned</b>" in shown(panel)[0] and "<b>untuned</b>" in shown(panel)[1]
    panel.controls.blind.value = False
    find(panel.box, "qlora-new").click()
    assert "from base" in asked(panel)[0]


def test_a_vote_that_can_t_be_kept_is_said():
    def full(vote):
        raise RunError("the disk is full")

    panel = answer_panel(echo, EXAMPLES, vote=full)
    asked(panel)
    find(panel.box, "qlora-vote-tie").click()
    assert "the disk is full" in panel.controls.message.value and not panel.asking.turns[-1].vote


# where there are no widgets


def test_without_widgets_it_is_the_answers_so_far():
    panel = answer_panel(echo, EXAMPLES)
    assert "not asked yet" in repr(panel) and "have lunch at one" in repr(panel)
    asked(panel)
    bundle = panel._repr_mimebundle_()
    for text in (bundle["text/plain"], bundle["text/html"]):
        assert "base 0 0.9 80 0 ANN: LUNCH?" in text and "tuned 0 0.9 80 0" in text
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_asking_imports_no_torch():
    code = (
        "import sys; from qlora_helpers.views.widgets import answer_panel, row_browser\n"
        "panel = answer_panel(lambda asked, **settings: iter(['a', 'b']), ['Ann: hi']); panel.ask(); panel.wait(9)\n"
        "print(panel.answers['right'].text, sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "ab []", done.stdout + done.stderr
