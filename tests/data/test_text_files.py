"""Plain text and Markdown are documents of whole paragraphs, also in a folder; beside data files they are not read."""

from __future__ import annotations

import pytest

from qlora_helpers.base.config import DataConfig
from qlora_helpers.data.sources import read_corpus


def rows_of(corpus):
    found = [*corpus.train, *corpus.eval, *corpus.test]
    return sorted(found, key=lambda row: (row.where.split()[0], int(row.where.split()[-1])))


@pytest.mark.parametrize("name", ["prose.txt", "prose.md"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_every_paragraph_is_in_one_document_in_its_order(tmp_path, name, ends):
    paragraphs = [
        f"Paragraph {number}, first line.{ends}Its second line, {'words ' * (number % 70)}end." for number in range(200)
    ]
    paragraphs[7] = "long " * 3_000 + "end"
    path = tmp_path / name
    path.write_bytes(f"{ends}{ends}".join(paragraphs).encode())
    corpus = read_corpus(DataConfig(source=str(path)))
    rows = rows_of(corpus)
    assert corpus.form == "text" and all(row.is_document for row in rows)
    together = "\n\n".join(row.text for row in rows)
    assert together.split("\n\n") == [each.replace("\r\n", "\n") for each in paragraphs]
    lengths = [len(row.text) for row in rows]
    assert 20 <= len(rows) <= 60 and sorted(lengths)[-2] < 2_500 < 15_000 < max(lengths)  # the long paragraph is whole
    assert rows[1].where.startswith(f"{name} line ") and any("whole paragraphs" in note for note in corpus.notes)
    second = int(rows[1].where.split()[-1])
    assert path.read_bytes().decode().split("\n")[second - 1].strip() == rows[1].text.split("\n")[0]


def test_a_folder_of_texts_is_read_and_a_readme_beside_data_is_not(tmp_path):
    for number in range(6):
        (tmp_path / f"page{number}.md").write_text(f"# Page {number}\n\nSome text.", encoding="utf-8")
    assert len(rows_of(read_corpus(DataConfig(source=str(tmp_path))))) == 6
    lines = "".join(f'{{"question": "q{number}", "answer": "a"}}\n' for number in range(8))
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    corpus = read_corpus(DataConfig(source=str(tmp_path), eval_rows=1, test_rows=1))
    assert corpus.form == "question_answer" and len(rows_of(corpus)) == 8
