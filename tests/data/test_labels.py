"""Which tokens are trained: the answer and its end, and a report that fails where that is not so."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_helpers.data.examples import SUMMARIZE, Example, Message, one_turn
from qlora_helpers.data.label_report import LabelReport, label_report
from qlora_helpers.data.labels import IGNORED, LabelSettings, label_row, label_rows
from qlora_helpers.data.outcome import Outcome, outcome_notes
from qlora_helpers.data.templates import make_template
from qlora_helpers.model.checkpoints import corpus_tokenizer
from qlora_helpers.views.tokens import TokenView

TOKENIZER = corpus_tokenizer()
RECIPE = make_template("recipe", TOKENIZER)
DIALOGUE = "Ana: are you coming?\nBo: no, I'm at work until ten tonight"
SUMMARY = "Bo works until ten."


def example(dialogue=DIALOGUE, summary=SUMMARY, row_id="r1"):
    return one_turn(row_id, "rows.jsonl line 1", dialogue, summary, instruction=SUMMARIZE)


def row(dialogue=DIALOGUE, summary=SUMMARY, **settings):
    return label_row(example(dialogue, summary), RECIPE, **settings)


def trained(labelled) -> str:
    return TOKENIZER.decode([label for label in labelled.labels if label != IGNORED])


def test_the_answer_and_its_end_are_trained():
    labelled = row()
    assert trained(labelled) == SUMMARY + "<|endoftext|>"
    assert TOKENIZER.decode(labelled.input_ids) == (
        f"Summarize the chat dialogue:\n{DIALOGUE}\n---\nSummary:\n{SUMMARY}<|endoftext|>"
    )
    assert all(label in (IGNORED, token) for token, label in zip(labelled.input_ids, labelled.labels, strict=True))
    assert (labelled.trimmed_tokens, len(labelled)) == (0, len(labelled.labels))
    assert labelled.answers == (SUMMARY + "<|endoftext|>",)


def test_loss_on_all_trains_every_token():
    """All but the first token, which nothing predicts."""
    labelled = row(loss_on="all")
    assert labelled.labels == [IGNORED, *labelled.input_ids[1:]]


@settings(max_examples=150, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=120),
    st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=60),
    st.integers(16, 120),
    st.sampled_from(["answer", "all"]),
    st.sampled_from(["trim_start", "trim_middle", "trim_end"]),
)
def test_rows_fit_or_are_none_and_keep_answer_and_prompt(dialogue, summary, limit, loss_on, long_rows):
    whole = row(dialogue, summary, loss_on=loss_on)
    labelled = row(dialogue, summary, loss_on=loss_on, max_tokens=limit, long_rows=long_rows)
    frame = len(row("", summary))
    if labelled is None:
        assert frame > limit - 3  # a cut text may end in the middle of what was one token
        return
    assert len(labelled) == len(labelled.labels) <= limit
    assert labelled.trimmed_tokens == len(whole) - len(labelled)
    text = TOKENIZER.decode(labelled.input_ids)
    assert text.startswith(SUMMARIZE) and text.endswith(f"\n---\nSummary:\n{summary}<|endoftext|>")
    if loss_on == "answer":
        assert trained(labelled) == summary + "<|endoftext|>"
    else:
        assert labelled.labels == [IGNORED, *labelled.input_ids[1:]]
    kept = text.removeprefix(SUMMARIZE).removesuffix(f"\n---\nSummary:\n{summary}<|endoftext|>")
    assert {"trim_start": dialogue.endswith(kept), "trim_end": dialogue.startswith(kept)}.get(long_rows, True)


def test_rows_are_labelled_alike_one_by_one_and_together():
    texts = [f"Ana: {word} <|endoftext|> {word}?" * count for word, count in (("so", 1), ("yes", 30), ("no", 5))]
    rows = [example(text, f"{SUMMARY} {number}", f"r{number}") for number, text in enumerate(texts)]
    together = list(label_rows(rows, RECIPE, LabelSettings(max_tokens=96), Outcome()))
    apart = [label_row(each, RECIPE, max_tokens=96) for each in rows]
    assert [(each.id, each.input_ids, each.labels) for each in together] == [
        (each.id, each.input_ids, each.labels) for each in apart
    ]


def test_what_happened_to_rows_is_said_once_and_counted():
    """Twenty rows of a kind by their place, the rest in one line."""
    long = [example("Ana: so?\n" * 60, row_id=f"l{number}") for number in range(23)]
    refused = [Example(f"c{n}", f"chat {n}", (Message("user", "a"), Message("assistant", "b")) * 2) for n in range(22)]
    outcome = Outcome()
    rows = list(label_rows([*long, *refused], RECIPE, LabelSettings(max_tokens=64), outcome))
    notes = outcome_notes(outcome)
    assert (len(rows), len(outcome.trimmed), len(outcome.skipped)) == (23, 23, 22)
    assert len(notes) == 42
    assert "and 3 more prompts were cut, " in notes[20]
    assert notes[41].startswith("and 2 more rows skipped: 2 x the recipe's prompt takes one instruction")


# the report


def block(*rows, ids=None) -> dict:
    return {
        "input_ids": [token for each in rows for token in each.input_ids],
        "labels": [label for each in rows for label in each.labels],
        "segment_ids": [number for number, each in enumerate(rows, start=1) for _ in each.input_ids],
        "row_ids": ids or [each.id for each in rows],
    }


def report(blocks, **settings) -> LabelReport:
    answers = {"r1": (SUMMARY + "<|endoftext|>",), "r2": ("Ana asks.<|endoftext|>",)}
    return label_report(blocks, TOKENIZER, **{"answers": answers} | settings)


def two_rows(**settings):
    return row(**settings), label_row(example("Ana: so?", "Ana asks.", "r2"), RECIPE, **settings)


def test_a_good_sequence_passes():
    rows = two_rows()
    found = report([block(*rows)])
    assert found.passed
    assert found.problems == ()
    assert (found.rows, found.sequences, found.tokens) == (2, 1, sum(map(len, rows)))
    assert found.trained_tokens == sum(label != IGNORED for each in rows for label in each.labels)
    assert (found.ends_trained, found.prompt_masked, found.answers_whole) == (2, 2, 2)
    assert repr(found).splitlines()[-1] == "verdict        PASS"
    assert found.to_dict()["passed"] is True
    assert report([block(each) for each in rows]).tokens == found.tokens


def test_padding_is_not_counted():
    rows = two_rows()
    padded = block(*rows)
    for name, value in (("input_ids", 1), ("labels", IGNORED), ("segment_ids", 0)):
        padded[name] = padded[name] + [value] * 9
    assert report([padded]) == report([block(*rows)])


def test_the_labels_of_the_2023_recipe_fail(torch):
    """transformers' collator masks every padding token, and with pad = eos the end of text is one."""
    from transformers import DataCollatorForLanguageModeling

    recipe = corpus_tokenizer()
    recipe.pad_token = recipe.eos_token
    rows = two_rows()
    batch = DataCollatorForLanguageModeling(recipe, mlm=False)([{"input_ids": each.input_ids} for each in rows])
    blocks = [
        {
            "input_ids": each.input_ids,
            "labels": labels[: len(each)],
            "segment_ids": [1] * len(each),
            "row_ids": [each.id],
        }
        for each, labels in zip(rows, batch["labels"].tolist(), strict=True)
    ]
    found = report(blocks)
    assert not found.passed
    assert found.ends_trained == 0
    assert found.problems == (
        "2 rows don't train their end: the model would not learn to stop",
        "2 rows train their prompt: loss is spent on what the user wrote",
    )
    assert repr(found).splitlines()[-1].startswith("verdict        FAIL: 2 rows don't train their end")


def test_loss_on_all_passes_its_report():
    rows = two_rows(loss_on="all")
    assert report([block(*rows)], loss_on="all").passed
    assert report([block(*rows)]).problems == ("2 rows train their prompt: loss is spent on what the user wrote",)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda b: b["labels"].__setitem__(-1, IGNORED), "1 rows don't train their end"),
        (lambda b: b["labels"].__setitem__(-3, IGNORED), "1 rows don't train their whole answer"),
        (lambda b: b["labels"].__setitem__(-3, 7), "1 rows don't train their whole answer"),
        (lambda b: b["labels"].__setitem__(4, b["input_ids"][4]), "1 rows train their prompt"),
        (lambda b: [b[name].pop() for name in ("labels", "input_ids", "segment_ids")], "1 rows don't train their end"),
        (
            lambda b: [b[name].clear() for name in ("labels", "input_ids", "segment_ids")],
            "1 rows don't train their end",
        ),
    ],
)
def test_each_fault_is_found(spoil, problem):
    spoilt = block(row())
    spoil(spoilt)
    assert any(found.startswith(problem) for found in report([spoilt]).problems)


def test_an_answer_of_another_row_is_found():
    assert report([block(row(), ids=["r2"])]).problems


def test_nothing_to_train_on():
    assert report([]).problems == ("there is nothing to train on",)
    assert "rows           0 in 0 sequences" in repr(report([]))


def test_trimmed_and_skipped_rows_are_named():
    found = report([block(row())], trimmed=["r1"], skipped=[f"x{number}" for number in range(7)])
    lines = dict(found.lines())
    assert lines["trimmed"] == "1: r1"
    assert lines["skipped"] == "7: x0, x1, x2, x3, x4 and 2 more"


# what a reader sees


def test_tokens_in_brackets():
    view = TokenView(block(*two_rows()), TOKENIZER)
    text = repr(view)
    assert text.count("[") == text.count("]") == 2
    assert f"Summary:\n[{SUMMARY}END]" in text
    assert "\n| Summarize" in text
    assert repr(TokenView({"input_ids": row().input_ids, "labels": row().labels}, TOKENIZER)) == text.split("\n| ")[0]


def test_long_sequences_are_cut():
    view = TokenView(block(row()), TOKENIZER, most=5)
    assert len(view.tokens) == 5
    assert repr(view).endswith(f" ... and {len(row()) - 5} more tokens")
    assert f"and {len(row()) - 5} more tokens" in view._repr_html_()


def test_html_in_a_dialogue_is_shown_and_not_run():
    nasty = "Ana: <script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\""
    page = TokenView(block(row(dialogue=nasty, summary="<b>bold</b>")), TOKENIZER)._repr_html_()
    for tag in ("<script", "<img", "<b>bold", "</script"):
        assert tag not in page
    assert "&lt;" in page
    assert page.count("<span") == page.count("</span>")
    assert "title='trained'" in page
    assert "title='end'" in page
    assert "title='masked'" in page


def test_terminal_codes_and_turned_directions_are_not_shown():
    view = TokenView(block(row(dialogue="Ana: \x1b[31m\u202eyap\x9b1m", summary="So\u2066 be\x07 it\x85.")), TOKENIZER)
    assert "Ana: [31myap1m\n---" in repr(view) and "So be it." in repr(view)
    for text in (repr(view), view._repr_html_()):
        assert all(char.isprintable() or char == "\n" for char in text)


def test_padding_is_shown_as_such():
    padded = {
        "input_ids": [*row().input_ids, 1],
        "labels": [*row().labels, IGNORED],
        "segment_ids": [1] * len(row()) + [0],
    }
    assert repr(TokenView(padded, TOKENIZER)).endswith("END]\n| .")
    assert "title='padding'" in TokenView(padded, TOKENIZER)._repr_html_()
