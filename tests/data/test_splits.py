"""From rows to splits: skipped rows are named, no dialogue is in two splits, a seed gives the same rows."""

from __future__ import annotations

import json

import pytest

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.data.rows import Row
from qlora_helpers.data.sources import read_corpus
from qlora_helpers.data.splits import named_splits


def row(number: int, **changes) -> dict:
    return {"id": f"r{number}", "dialogue": f"Ana: number {number}?", "summary": f"Ana asks for {number}."} | changes


@pytest.fixture
def read(tmp_path):
    def read(values, **settings):
        path = tmp_path / ("s.json" if isinstance(values, dict) else "s.jsonl")
        path.write_text(
            json.dumps(values) if isinstance(values, dict) else "".join(json.dumps(value) + "\n" for value in values)
        )
        return read_corpus(DataConfig(source=str(path), **settings))

    return read


def sizes(corpus) -> tuple[int, int, int]:
    return len(corpus.train), len(corpus.eval), len(corpus.test)


def everything(corpus) -> list:
    return [*corpus.train, *corpus.eval, *corpus.test]


# skipped rows


@pytest.mark.parametrize(
    ("bad", "note"),
    [
        (row(99, dialogue=""), "its dialogue is empty"),
        (row(99, summary=" \n\t"), "its summary is empty"),
        (row(99, summary=None), "its summary is missing"),
        ({"dialogue": "Ana: hi"}, "its summary is missing"),
        (row(99, dialogue={"turn": "Ana: hi"}), "its dialogue is not text but an object with 'turn'"),
        (row(99, dialogue=[1, 2]), "its dialogue is not text but list"),
        (row(99, dialogue=7), "its dialogue is not text but int"),
        (row(99, summary="nan"), "its summary is 'nan', which stands for a missing value"),
        (row(99, summary=float("nan")), "its summary is empty"),
        (row(99, dialogue="\u200b\u2060 \ufeff"), "its dialogue is empty"),
        (row(99, dialogue="\x00\x1b"), "its dialogue is empty"),
        (row(99, summary="Ana laughs \ud83d"), "its summary holds half a character (an unpaired surrogate)"),
        ("a text", "not an object with columns but str"),
        (None, "not an object with columns but NoneType"),
        (row(2), "a duplicate of s.jsonl line 3"),
        (row(2, dialogue=" Ana:  number 2?\n", id="other"), "a duplicate of s.jsonl line 3"),
    ],
)
def test_a_skipped_row_is_named_with_its_line(read, bad, note):
    corpus = read([*(row(number) for number in range(12)), bad])
    assert f"s.jsonl line 13: skipped, {note}" in corpus.notes
    assert {item.id for item in everything(corpus)} == {f"r{number}" for number in range(12)}


def test_twenty_rows_are_named_and_the_rest_counted(read):
    bad = [row(99, summary="")] * 18 + [row(99, dialogue=None)] * 30 + [3] * 2
    corpus = read([*(row(number) for number in range(12)), *bad])
    assert sum("skipped" in note for note in corpus.notes) == 21
    assert corpus.notes[-1] == (
        "and 30 more rows skipped: 28 x its dialogue is missing; 2 x not an object with columns"
    )


def test_too_few_rows_say_why_the_others_were_skipped(read):
    with pytest.raises(DataError) as caught:
        read([row(1), row(2), *[row(3, summary="")] * 8])
    assert "got 2" in str(caught.value)
    assert "s.jsonl line 3: skipped, its summary is empty" in str(caught.value)
    assert "and 3 more rows skipped: 3 x its summary is empty" in str(caught.value)


# texts and ids


def test_control_characters_are_removed_and_counted(read):
    dialogue = "Ana:\t\x1b[31mred\x1b[0m\r\nBo: \x07ok\rAna: 👍\x7f \x9b31m\u202eyap\u202c \u2066me\u2069 שלום\u200f"
    changed = row(0, dialogue=dialogue, summary="Ana \x00paints\x85.", summary2="Ana \x9d\u202dpaints.")
    corpus = read([changed, *(row(number) for number in range(1, 12))])
    mended = next(item for item in everything(corpus) if item.id == "r0")
    assert (
        mended.prompt == "Ana:\t[31mred[0m\nBo: ok\nAna: 👍 31myap me שלום\u200f"
    )  # marks that Hebrew is written with stay
    assert mended.answer == "Ana paints."
    assert mended.references == ("Ana paints.",)
    assert "s.jsonl: removed 13 control characters (rows touched: 1)" in corpus.notes


def test_ids_are_unique_and_fit_for_a_screen(read):
    ids = ["a", "a", 7, "7", None, True, "\x1b[2J", "x" * 101, " b ", 1.5]
    corpus = read([row(number, id=value) for number, value in enumerate(ids)])
    by_line = {int(item.where.split()[-1]): item.id for item in everything(corpus)}
    assert len(set(by_line.values())) == len(ids)
    assert [by_line[line] for line in (1, 3, 9)] == ["a", "7", "b"]
    for line in (2, 4, 5, 6, 7, 8, 10):
        assert by_line[line] == f"s.jsonl line {line}"


# splits


@pytest.mark.parametrize(
    ("count", "settings", "expected"),
    [
        (100, {"eval_rows": None, "test_rows": None}, (80, 10, 10)),
        (100, {}, (50, 25, 25)),
        (1000, {}, (940, 30, 30)),
        (100, {"eval_rows": 40, "test_rows": 10}, (50, 40, 10)),
        (100, {"eval_rows": 90, "test_rows": 10}, (50, 45, 5)),
        (100, {"eval_rows": 5, "test_rows": 7, "train_rows": 20}, (20, 5, 7)),
        (3, {}, (1, 1, 1)),
        (5, {"eval_rows": None, "test_rows": None}, (3, 1, 1)),
    ],
)
def test_a_file_without_splits_is_cut(read, count, settings, expected):
    corpus = read([row(number) for number in range(count)], **settings)
    assert sizes(corpus) == expected
    assert any("no eval or test split" in note for note in corpus.notes)
    asked = settings.get("eval_rows", 30), settings.get("test_rows", 30)
    scaled = None not in asked and sum(asked) > count // 2
    assert any("scaled down" in note for note in corpus.notes) == scaled


def test_the_cut_depends_only_on_the_seed(read):
    values = [row(number) for number in range(60)]
    one, same, other = (read(values, eval_rows=5, test_rows=5, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.test != other.test
    assert [item.id for item in one.test] != [f"r{number}" for number in range(5)]  # shuffled, not the first ones
    lines = [int(item.where.split()[-1]) for item in one.train]
    assert lines == sorted(lines)


def test_a_smaller_sample_is_part_of_a_larger_one(read):
    values = [row(number) for number in range(60)]
    small, large = (read(values, eval_rows=5, test_rows=5, train_rows=count) for count in (10, 20))
    assert set(small.train) < set(large.train)
    assert (small.eval, small.test) == (large.eval, large.test)
    assert [item for item in large.train if item in small.train] == list(small.train)  # in the order of the file
    lines = [int(item.where.split()[-1]) for item in large.train]
    assert lines == sorted(lines)


SPLIT = {
    "train": [row(number) for number in range(40)],
    "val": [row(number) for number in range(40, 60)],
    "test": [row(number) for number in range(60, 80)],
}


@pytest.mark.parametrize(
    ("present", "expected", "donor"),
    [
        ("train", (30, 5, 5), "train"),
        ("train val", (35, 20, 5), "train"),
        ("train test", (35, 5, 20), "train"),
        ("val test", (15, 5, 20), "eval"),
        ("val", (10, 5, 5), "eval"),
        ("test", (10, 5, 5), "test"),
    ],
)
def test_a_source_s_splits_are_kept_and_missing_ones_are_cut(read, present, expected, donor):
    values = {name: SPLIT[name] for name in present.split()}
    whole = read(values | {"version": []}, eval_rows=5, test_rows=5)
    assert sizes(whole) == tuple(min(count, limit) for count, limit in zip(expected, (40, 5, 5), strict=True))
    assert any(f"so its {donor} rows were cut" in note for note in whole.notes)
    for name, split in (("val", "eval"), ("test", "test"), ("train", "train")):
        if name in values and split != donor:
            assert {item.id for item in getattr(whole, split)} <= {item["id"] for item in values[name]}
    assert len({item.id for item in everything(whole)}) == len(everything(whole))


def test_an_empty_split_counts_as_missing(read):
    corpus = read(SPLIT | {"test": [], "val": [row(50, summary="")]}, eval_rows=5, test_rows=5)
    assert sizes(corpus) == (30, 5, 5)
    assert any("no eval or test split" in note for note in corpus.notes)


def test_split_names_are_mapped_and_unknown_ones_named():
    one, two = [Row("one", {})], [Row("two", {})]
    assert named_splits("d", {"Train": one, "valid": two}) == ({"train": one, "eval": two}, [])
    assert named_splits("d", {"val": one, "dev": two}) == ({"eval": one + two}, [])
    assert named_splits("d", {"test": one, "more": two}) == (
        {"test": one},
        ["d: skipped 'more', which is not train, val or test"],
    )
    splits, notes = named_splits("d", {"train_sft": one, "test_sft": two})
    assert splits == {"train": one + two} and "'train_sft', 'test_sft' are cut anew" in notes[0]


def test_no_dialogue_is_in_two_splits(read):
    values = {
        "train": [*SPLIT["train"], row(60), row(41, summary="Another one."), row(5, summary="A second view of 5.")],
        "val": [*SPLIT["val"], row(61, dialogue="Ana:  number\n61?", summary="Spaced.")],
        "test": SPLIT["test"],
    }
    corpus = read(values, eval_rows=None, test_rows=None)
    assert sizes(corpus) == (41, 20, 20)  # the second summary of r5 stays: both are in train
    assert "s.json train row 41: skipped, its prompt is in test too (s.json test row 1)" in corpus.notes
    assert "s.json train row 42: skipped, its prompt is in eval too (s.json val row 2)" in corpus.notes
    assert "s.json val row 21: skipped, its prompt is in test too (s.json test row 2)" in corpus.notes


def test_a_cut_never_divides_one_dialogue_over_splits(read):
    values = [row(number // 2, id=None, summary=f"View {number}.") for number in range(80)]
    corpus = read(values, eval_rows=10, test_rows=10)
    train, evaluation, test = ({item.prompt for item in part} for part in (corpus.train, corpus.eval, corpus.test))
    assert not (train & evaluation or train & test or evaluation & test)
    assert len(everything(corpus)) + sum("skipped" in note for note in corpus.notes) == 80


def test_a_split_that_ends_up_empty_is_an_error(read):
    with pytest.raises(DataError) as caught:
        read({"train": [row(1), row(2)], "val": [row(1), row(2)], "test": [row(3), row(4)]})
    assert "0 train, 2 eval, 2 test" in str(caught.value)
    assert "s.json train row 1: skipped, its prompt is in eval too" in str(caught.value)


@pytest.mark.parametrize("profile", ["demo", "tiny", "falcon-40b"])
def test_a_thousand_rows_of_a_user_are_a_thousand_rows(read, profile, tmp_path):
    """Whatever the profile's limits for its own corpus are."""
    from qlora_helpers.base.profiles import profile_config
    from qlora_helpers.data.sources import read_corpus

    path = tmp_path / "tickets.csv"
    path.write_text("subject;body;label\n" + "".join(f"Bill {n};Too high;{n % 3}\n" for n in range(1000)))
    settings = {"data.source": str(path), "data.prompt": "{subject}\n{body}", "data.answer": "{label}"}
    config = profile_config(profile).with_settings(settings)
    corpus = read_corpus(config.data)
    assert sizes(corpus) == (940, 30, 30)
    assert sizes(read_corpus(config.with_settings(["data.train_rows=7"]).data)) == (7, 30, 30)
