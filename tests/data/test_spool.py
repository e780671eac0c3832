"""Many rows are kept in a file and come back as they went in, and a large source gives the same data as a small one."""

from __future__ import annotations

import json
import os

import pytest

from qlora_helpers.base.config import DataConfig
from qlora_helpers.data import spool as spool_module
from qlora_helpers.data.examples import Example, Message
from qlora_helpers.data.prepare import prepared
from qlora_helpers.data.sources import read_corpus
from qlora_helpers.data.spool import Spool, SpooledByName, SpooledRows, rows_of


@pytest.fixture
def small_memory(monkeypatch):
    """Rows go into a file from the third on or so."""
    monkeypatch.setattr(spool_module, "CHARACTERS_IN_MEMORY", 50)
    monkeypatch.setattr(spool_module, "_WRITTEN_AT_ONCE", 300)


def a_row(number: int) -> Example:
    return Example(
        f"r{number}", f"line {number}", (Message("user", "é\ud800" * number, body=(0, 1)), Message("assistant", "a"))
    )


def test_rows_come_back_as_they_went_in(small_memory):
    spool: Spool[Example] = Spool()
    rows = [a_row(number) for number in range(40)]
    for number, row in enumerate(rows):
        assert spool.add(row, 20) == number
        assert spool[number // 2] == rows[number // 2]  # also while others are added
    assert not spool.in_memory and len(spool) == 40
    some = rows_of(spool, [7, 3, 39])
    assert isinstance(some, SpooledRows)
    assert list(some) == list(some) == [rows[7], rows[3], rows[39]]
    assert (some[-1], list(some[1:]), len(some)) == (rows[39], [rows[3], rows[39]], 3)
    with pytest.raises(IndexError):
        some[3]


def test_few_rows_stay_in_memory():
    spool: Spool[Example] = Spool()
    spool.add(a_row(1), 20)
    assert spool.in_memory and rows_of(spool, [0]) == (a_row(1),)


def test_rows_by_name(small_memory):
    named = SpooledByName[tuple[str, ...]](Spool())
    for number in range(30):
        named.add(f"r{number % 20}", ("x" * number,), number)
    assert (len(named), list(named)[:2]) == (20, ["r0", "r1"])
    assert (named["r3"], named["r13"]) == (("x" * 23,), ("x" * 13,))  # the later one of two
    with pytest.raises(KeyError):
        named["r20"]


def test_rows_in_a_file_give_the_same_data(tmp_path, tokenizer, monkeypatch):
    """Duplicates, splits, samples, labels and what is kept of the rows are those of the rows in memory."""
    rows = [
        {
            "prompt": f"What is {number % 50} plus {number % 7}, s\u2019il vous pla\u00eet?",
            "answer": f"It is {number % 50 + number % 7}.",
        }
        for number in (n % 100 for n in range(120))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(source=str(path), seq_len_tokens=128, train_rows=40, template="plain")

    def made(folder: str):
        data = prepared(config, tokenizer, tmp_path / folder, read=read_corpus)
        return data, data.train.to_list(), data.eval.to_list()

    held, *held_rows = made("held")
    monkeypatch.setattr(spool_module, "CHARACTERS_IN_MEMORY", 50)
    corpus = read_corpus(config)
    assert isinstance(corpus.train, SpooledRows) and len(corpus.train) == 40
    filed, *filed_rows = made("filed")
    assert filed_rows == held_rows
    for name in ("test", "report", "eval_report", "notes", "train_keys", "train_answers", "shots"):
        assert getattr(filed, name) == getattr(held, name), name
    assert any("a duplicate" in note for note in filed.notes)


def test_the_file_ends_with_its_rows(small_memory):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    spool: Spool[Example] = Spool()
    for number in range(20):
        spool.add(a_row(number), 20)
    assert not spool.in_memory
    del spool
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before
