"""Scores row by row, and what can be said of a difference: by hand where it can be, else against the exact distribution."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from qlora_helpers.data.duplicates import words_key
from qlora_helpers.evaluation.metrics.measures import measure_of
from qlora_helpers.evaluation.metrics.text import TEXT, repetition, rouge_rows
from qlora_helpers.evaluation.scorecard import (
    FEWEST_ROWS,
    compare,
    comparison_from_dict,
    interval,
    mean_loss,
    resamples,
    score_answers,
    unscored,
)
from qlora_helpers.evaluation.worth import worth


def answer(rouge_l, *, stopped=True, tokens=5, nats=None, loss_tokens=0, repeated=0.0):
    scores = {"rouge1": rouge_l, "rouge2": rouge_l / 2, "rouge_l": rouge_l, "repetition": repeated}
    losses = {} if nats is None else {"nats": nats, "loss_tokens": loss_tokens}
    return scores | losses | {"stopped": stopped, "tokens": tokens, "text": ""}


def rows_of(base, tuned, **more):
    return [
        {"id": f"r{index}", "answers": {"base": answer(one, **more), "tuned": answer(other, **more)}}
        for index, (one, other) in enumerate(zip(base, tuned, strict=True))
    ]


def test_the_best_of_several_references_counts_measure_by_measure():
    (best,) = rouge_rows(["the cat sat"], [["a dog ran", "the cat sat down", "sat the cat"]])
    (first,) = rouge_rows(["the cat sat"], [["the cat sat down"]])
    assert best["rouge1"] == 100  # the same words in another order
    assert best["rouge_l"] == first["rouge_l"] == pytest.approx(100 * 6 / 7)
    assert best["rouge2"] == first["rouge2"]
    with pytest.raises(ValueError, match="argument 2"):
        rouge_rows(["a"], [])


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0), ("a b c", 0), ("a b c d e", 0), ("a b c d A b c D", 1 / 5), ("no no no no no no no", 3 / 4)],
)
def test_repetition_by_hand(text, share):
    assert repetition(text) == pytest.approx(share)


def test_two_copies_of_a_dialogue_have_one_key():
    first = words_key("Ana: Hi, how are you?\nBo: fine")
    assert first == words_key("ana:  hi how are YOU\r\n\tBo: fine!!")
    assert first == words_key("Ana: Ｈi, how are you?\nBo: fine")  # a wide H
    assert first != words_key("Ana: Hi, how are you?\nBo: fine too")
    assert words_key("🎂") != words_key("🎁") != words_key("...")


def test_the_interval_is_that_of_all_samples():
    """Four rows: all 4^4 samples with replacement can be listed."""
    gains = [1.0, 2.0, 4.0, 11.0]
    exact = [np.mean(sample) for sample in itertools.product(gains, repeat=4)]
    found = compare(rows_of([0] * 4, gains), "base", "tuned")["rouge_l"]
    low, high = np.quantile(exact, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.26)
    assert found.difference == pytest.approx(4.5)


def test_rows_are_drawn_together_for_both_models():
    """Rows that differ widely in difficulty, and always by one point: the interval is that point."""
    base = list(np.random.default_rng(0).uniform(0, 80, 40))
    found = compare(rows_of(base, [value + 1 for value in base]), "base", "tuned")["rouge_l"]
    assert (found.low, found.high) == pytest.approx((1, 1))
    assert found.verdict == "better"


def test_the_interval_holds_the_truth_as_often_as_it_says():
    draw, held = np.random.default_rng(1), 0
    for trial in range(100):
        gains = draw.normal(0.5, 3, 60)
        found = compare(rows_of([50] * 60, list(50 + gains)), "base", "tuned", seed=trial)["rouge_l"]
        held += found.low <= 0.5 <= found.high
    assert 0.90 <= held / 100 <= 0.99


def test_the_same_rows_and_seed_give_the_same_interval():
    rows = rows_of(range(30), range(1, 60, 2))
    assert compare(rows, "base", "tuned") == compare(rows, "base", "tuned")
    assert compare(rows, "base", "tuned") != compare(rows, "base", "tuned", seed=1)


def test_loss_and_perplexity_are_weighted_by_tokens():
    rows = rows_of([1, 1], [1, 1])
    for row, (one, other, tokens) in zip(rows, [(10.0, 5.0, 10), (4.0, 2.0, 1)], strict=True):
        row["answers"]["base"] |= {"nats": one, "loss_tokens": tokens}
        row["answers"]["tuned"] |= {"nats": other, "loss_tokens": tokens}
    found = compare(rows, "base", "tuned")
    assert (found["loss"].first, found["loss"].second) == pytest.approx((14 / 11, 7 / 11))
    assert found["perplexity"].first == pytest.approx(math.exp(14 / 11))
    assert mean_loss([10.0, 4.0], [10, 1]) == pytest.approx(14 / 11)
    assert mean_loss([], []) is None
    del rows[1]["answers"]["base"]["nats"], rows[1]["answers"]["base"]["loss_tokens"]  # its summary did not fit
    assert compare(rows, "base", "tuned")["loss"].first == pytest.approx(1.0)


def test_a_huge_loss_has_a_finite_perplexity():
    """JSON has no infinity."""
    found = compare(rows_of([1, 2], [1, 2], nats=9000.0, loss_tokens=10), "base", "tuned")["perplexity"]
    assert found.first == found.second == pytest.approx(math.exp(50))


def test_a_measure_that_one_model_lacks_is_skipped():
    rows = rows_of([1, 2], [2, 3])
    for row in rows:
        row["answers"]["tuned"] |= {"nats": 1.0, "loss_tokens": 1}
    assert "loss" not in {item.measure for item in compare(rows, "base", "tuned").differences}


def test_verdicts_in_words():
    count = FEWEST_ROWS
    noise = [(-1) ** index * 3.0 for index in range(count)]
    unsure = compare(rows_of([20.0] * count, [20 + value for value in noise]), "base", "tuned")
    assert unsure["rouge_l"].verdict == "can't tell"
    assert "too few to tell the two apart in ROUGE-L" in unsure.verdict()
    few = compare(rows_of([20.0] * (count - 1), [40.0] * (count - 1)), "base", "tuned")
    assert few["rouge_l"].verdict.startswith("too few rows")
    assert "at least" in few.verdict() and not few["rouge_l"].can_tell
    worse = compare(rows_of([40.0] * count, [20.0] * count), "base", "tuned")
    assert worse["rouge_l"].verdict == "worse"
    assert "20.0 points of ROUGE-L less" in worse.verdict()
    rows = rows_of([20.0] * count, [20.0] * count)
    for row in rows:
        row["answers"]["tuned"] |= {"repetition": 0.5, "tokens": 9}
        row["answers"]["base"] |= {"stopped": False}
    said = {item.measure: item.verdict for item in compare(rows, "base", "tuned").differences}
    assert (said["repetition"], said["tokens"], said["stop_rate"]) == ("worse", "higher", "better")


def test_wins_ties_and_losses_the_clearest_first():
    found = compare(rows_of([10, 10, 10, 10, 10], [11, 30, 10, 9, 0]), "base", "tuned")
    assert (found.wins, found.ties, found.losses) == (("r1", "r0"), ("r2",), ("r4", "r3"))
    empty = compare([], "base", "tuned")
    assert empty.differences == empty.wins == ()


def test_a_comparison_is_read_back_and_shown():
    found = compare(rows_of(range(30), range(1, 60, 2), nats=3.0, loss_tokens=2), "base", "tuned")
    again = comparison_from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert again == found
    assert "ROUGE-L" in repr(found) and "95% interval" in repr(found)
    assert "<table" in found._repr_html_()


def test_many_rows_are_drawn_less_often():
    assert resamples(100).shape == (10_001, 100)
    assert resamples(20_000).shape == (1_001, 20_000)
    drawn = resamples(7)
    assert (drawn.sum(axis=1) == 7).all() and (drawn[0] == 1).all()


def test_scores_are_added_to_each_answer():
    rows = [{"summary": "Bo is late", "answers": {"base": {"text": "Bo runs"}, "tuned": {"text": "Bo is late"}}}]
    score_answers(rows)
    assert rows[0]["answers"]["tuned"]["rouge_l"] == 100
    assert rows[0]["answers"]["base"]["rouge1"] == pytest.approx(40)
    score_answers([])


def labelled(pairs):
    """Rows of (expected, untuned, tuned) labels."""
    from qlora_helpers.evaluation.metrics.labels import labels_metric

    rows = [
        {
            "id": f"r{index}",
            "references": [expected],
            "answers": {
                name: {"text": text, "tokens": 1, "stopped": True} for name, text in (("base", base), ("tuned", tuned))
            },
        }
        for index, (expected, base, tuned) in enumerate(pairs)
    ]
    metric = labels_metric()
    score_answers(rows, metric)
    return rows, metric


def test_the_interval_of_a_macro_f1_is_that_of_all_samples():
    """It is no mean of rows: of four rows, all 4^4 samples are scored anew. A label that a sample lacks is left out."""
    pairs = [("a", "a", "a"), ("a", "b", "a"), ("b", "b", "b"), ("b", "a", "a")]
    rows, metric = labelled(pairs)

    def macro_f1(sample, model):
        scores = []
        for label in sorted({expected for expected, *_ in sample}):
            right = sum(row[0] == row[model] == label for row in sample)
            count = sum(row[0] == label for row in sample) + sum(row[model] == label for row in sample)
            scores.append(2 * right / count)
        return 100 * np.mean(scores)

    exact = [macro_f1(sample, 2) - macro_f1(sample, 1) for sample in itertools.product(pairs, repeat=4)]
    found = compare(rows, "base", "tuned", metric=metric)["macro_f1"]
    assert found.difference == pytest.approx(macro_f1(pairs, 2) - macro_f1(pairs, 1))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(exact, [0.025, 0.975])), abs=1e-6)


def test_the_interval_of_a_field_f1_counts_the_fields_of_the_drawn_rows():
    from qlora_helpers.evaluation.metrics.fields import json_metric

    texts = [('{"a": 1}', '{"a": 1}'), ('{"a": 1, "b": 2, "c": 3}', '{"a": 1}'), ('{"a": 1}', "no"), ('{"a": 2}', "{}")]
    rows = [
        {
            "id": f"r{index}",
            "references": [wanted],
            "answers": {
                name: {"text": text, "tokens": 1, "stopped": True} for name, text in (("base", "no"), ("tuned", given))
            },
        }
        for index, (wanted, given) in enumerate(texts)
    ]
    score_answers(rows, json_metric())
    counts = [
        (a["fields_right"], a["fields_given"] + a["fields_wanted"]) for a in (r["answers"]["tuned"] for r in rows)
    ]
    exact = [
        200 * sum(right for right, _ in sample) / sum(all_ for _, all_ in sample)
        for sample in itertools.product(counts, repeat=4)
    ]
    found = compare(rows, "base", "tuned", metric=json_metric())
    gain = found["field_f1"]
    assert (gain.low, gain.high) == pytest.approx(tuple(np.quantile(exact, [0.025, 0.975])), abs=3)
    assert gain.second == pytest.approx(200 * 2 / (2 + 4 + 1 + 2))
    assert found.main == "field_f1" and found.gain == gain
    assert (found.wins, found.ties, found.losses) == (("r0", "r1"), ("r2", "r3"), ())


def test_rows_that_one_model_lacks_are_compared_in_neither():
    """An answer that is not a number has no error: the other model's errors in those rows don't count either."""
    from qlora_helpers.evaluation.metrics.numbers import numbers_metric

    rows = [
        {
            "id": f"r{index}",
            "references": ["100"],
            "answers": {
                "base": {"text": base, "tokens": 1, "stopped": True},
                "tuned": {"text": tuned, "tokens": 1, "stopped": True},
            },
        }
        for index, (base, tuned) in enumerate([("90", "99"), ("?", "500")])
    ]
    score_answers(rows, numbers_metric())
    found = compare(rows, "base", "tuned", metric=numbers_metric())["absolute_error"]
    assert (found.first, found.second, found.rows) == (10, 1, 1)


def test_fewer_errors_are_better_and_rows_without_words_are_counted():
    from qlora_helpers.evaluation.metrics.numbers import numbers_metric

    numbers = numbers_metric()
    rows = [
        {
            "id": f"r{index}",
            "references": [str(100 + index)],
            "answers": {
                "base": {"text": str(150 + 2 * index), "tokens": 1, "stopped": True},
                "tuned": {"text": str(100 + index), "tokens": 1, "stopped": True},
            },
        }
        for index in range(FEWEST_ROWS)
    ]
    score_answers(rows, numbers)
    found = compare(rows, "base", "tuned", metric=numbers)
    assert (found["absolute_error"].verdict, found["number_right"].verdict) == ("better", "better")
    assert "100.0 points of right number more" in found.verdict()

    smiles = [{"id": "smile", "summary": "👍", "answers": {name: {"text": "👍"} for name in ("base", "tuned")}}]
    score_answers(smiles)
    for answer in smiles[0]["answers"].values():
        answer |= {"tokens": 1, "stopped": True}
    comparison = compare(smiles, "base", "tuned")
    assert comparison.gain is None and "no row has a ROUGE-L" in comparison.verdict()
    (said,) = unscored(smiles, TEXT)
    assert said.startswith("1 of 1 rows have no ROUGE-L") and "smile" in said


def test_older_comparisons_are_read_as_those_of_rouge():
    found = compare(rows_of(range(30), range(1, 60, 2)), "base", "tuned")
    values = json.loads(json.dumps(found.to_dict()))
    assert values.pop("main") == "rouge_l"
    assert comparison_from_dict(values) == found


def test_the_interval_of_one_model():
    assert interval(measure_of("rouge_l"), [answer(50.0)] * FEWEST_ROWS) == (50, 50)
    assert interval(measure_of("rouge_l"), [answer(50.0)] * (FEWEST_ROWS - 1)) is None


# whether it was worth it


def against(base, few, tuned, rows=40):
    values = [
        {
            "id": f"r{index}",
            "answers": {
                name: answer(value + index % 3)
                for name, value in zip(("base", "base_few", "tuned"), (base, few, tuned), strict=True)
            },
        }
        for index in range(rows)
    ]
    return {name: compare(values, name, "tuned") for name in ("base", "base_few")}


def test_tuning_was_worth_it_if_it_beats_every_rival():
    said = worth(against(10.0, 20.0, 30.0))
    assert said == (
        "Tuning was worth it: by ROUGE-L, the tuned model is better than the untuned model and the untuned model with examples in "
        "its prompt."
    )
    assert "was not asked with examples" in worth({"base": against(10.0, 20.0, 30.0)["base"]})


def test_tuning_was_not_worth_it_if_a_rival_is_better():
    said = worth(against(10.0, 40.0, 30.0))
    assert said == (
        "Tuning was not worth it: by ROUGE-L, the untuned model with examples in its prompt answers better than the tuned model."
    )


def test_it_can_t_be_told_if_a_rival_is_as_good_or_rows_are_few():
    said = worth(against(10.0, 30.0, 30.0))
    assert said.startswith(
        "Whether tuning was worth it can't be told: by ROUGE-L, the tuned model is better than the untuned model,"
    )
    assert "40 rows can't tell the tuned model from the untuned model with examples in its prompt" in said
    assert "from 5 rows" in worth(against(10.0, 20.0, 30.0, rows=5))
    assert worth({}) == worth({"base": compare([], "base", "tuned")}) == ""
