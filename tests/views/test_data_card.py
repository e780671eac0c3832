"""The data card: its figures are counted on the prepared rows themselves."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import qlora_helpers as ql
from qlora_helpers.base.errors import RunError
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.data.examples import Example, Message
from qlora_helpers.data.prepare import prepared
from qlora_helpers.data.prepared_file import prepared_path
from qlora_helpers.data.scripts import ScriptSample, counted, script_of
from qlora_helpers.data.sources import read_corpus
from qlora_helpers.data.stored_lengths import stored_lengths


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def made(request, run, tokenizer, tmp_path):
    """A run with data of different lengths: a row twice, one without an answer, one that must be cut, some in Cyrillic."""
    rows = [{"prompt": f"question {number} " * (number + 1), "completion": f"answer {number}"} for number in range(30)]
    rows += [{"prompt": f"вопрос {number} и ещё слова", "completion": "ответ на него"} for number in range(10)]
    rows += [rows[3], {"prompt": "no answer", "completion": ""}, {"prompt": "long " * 400, "completion": "short"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = {"data.source": str(path), "data.packing": request.param, "data.seq_len_tokens": 256}
    run.save_config(profile_config("tiny").with_settings(settings | {"data.eval_rows": 4, "data.test_rows": 4}))
    data = prepared(run.config().data, tokenizer, run.data_dir, read=read_corpus)
    again = prepared(run.config().data, tokenizer, run.data_dir, read=lambda config: pytest.fail("it is on the disk"))
    assert data.config == again.config == run.config().data and again.scripts == data.scripts
    return run, data


def test_the_card_says_what_the_rows_are(made):
    run, data = made
    card = ql.data_card(run)
    lengths = sorted(
        sum(segment == number for segment in sequence["segment_ids"])
        for sequence in data.train
        for number in range(1, len(sequence["row_ids"]) + 1)
    )
    assert list(card.lengths) == lengths and len(lengths) == data.report.rows == card.rows[0]
    assert stored_lengths(run.data_dir / "train").tolist() == lengths
    assert sum(lengths) == data.report.tokens
    assert sum(count for *_, count in card.bars()) == len(lengths)
    first, last, count = max(card.bars(), key=lambda bar: bar[2])
    assert count == sum(first <= length <= last for length in lengths)
    assert card.bars()[-1][1] == 256
    assert card.left_out == {"a duplicate": 1, next(kind for kind in card.left_out if "answer" in kind): 1}
    assert set(card.scripts) == {"Latin", "Cyrillic"} and sum(card.scripts.values()) == data.report.rows
    median = int(np.sort(lengths)[len(lengths) // 2])
    assert f"half of the rows have at most {median} tokens" in card.length_text()


def test_it_shows_as_text_and_as_html(made):
    run, data = made
    card = ql.data_card(run)
    page = card._repr_html_()
    assert "label report: PASS" in repr(card) and "labels: PASS" in page and "a duplicate" in repr(card)
    assert re.search(r'role="img" aria-label="Histogram: half of the rows have at most \d+ tokens', page)
    assert "Cyrillic" in page and "<script" not in page and "<svg" not in page
    report = ql.write_report(run).read_text()
    assert "Labels: PASS" in report and 'aria-label="Histogram: half' in report and "1 x a duplicate" in report


def test_a_failed_label_report_gives_its_reasons(made):
    run, _ = made
    path = prepared_path(run.data_dir)
    values = json.loads(path.read_text())
    values["report"]["ends_trained"] -= 2
    path.write_text(json.dumps(values))
    assert "labels: FAIL" in ql.data_card(run)._repr_html_()
    assert (
        "2 rows don't train their end" in repr(ql.data_card(run)) and "Labels: FAIL" in ql.write_report(run).read_text()
    )


def test_data_of_an_earlier_version_and_a_run_without_its_sequences(made):
    run, _ = made
    path = prepared_path(run.data_dir)
    values = json.loads(path.read_text())
    del values["scripts"]
    path.write_text(json.dumps(values))
    assert "in the 4 held-out rows" in repr(ql.data_card(run))
    for file in (run.data_dir / "train").iterdir():
        file.unlink()
    (run.data_dir / "train").rmdir()
    assert ql.data_card(run).lengths == () and "not known" in repr(ql.data_card(run))
    assert "Histogram" not in ql.write_report(run).read_text()


def test_without_data_it_says_what_prepares_them(run):
    run.save_config(profile_config("tiny"))
    with pytest.raises(RunError, match="not prepared yet"):
        ql.data_card(run)


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Grüße aus Köln", "Latin"),
        ("Привет, мир", "Cyrillic"),
        ("你好,世界", "Chinese characters"),
        ("今日は、東京で会議があります", "Japanese"),
        ("안녕하세요", "Korean"),
        ("مرحبا بالعالم", "Arabic"),
        ("नमस्ते दुनिया", "Devanagari"),
        ("1234 !? 🎂", "no letters"),
        ("", "no letters"),
    ],
)
def test_scripts(text, script):
    asked = Example("a", "here", (Message("user", text), Message("assistant", text)))
    assert script_of(asked) == script_of(Example("b", "here", text=text)) == script


def test_scripts_of_many_rows_are_sampled_evenly():
    rows = [Example(str(n), "here", text="a" if n < 5000 else "б") for n in range(10000)]
    sample = ScriptSample(rows)
    assert list(sample.passing(rows)) == rows
    assert sample.counts == {"Latin": 500, "Cyrillic": 500} and counted(rows[4999:5001]) == {"Latin": 1, "Cyrillic": 1}
