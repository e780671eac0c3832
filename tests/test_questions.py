"""Every notebook has ten questions in docs/questions.md, each with what a right answer contains."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUESTION = re.compile(r"^(\d+)\. (.+[?.])\n {3,4}(\S.+)$", re.MULTILINE)


def sections() -> dict[str, str]:
    """The text below each heading of the page."""
    page = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
    _, *pieces = re.split(r"^## ", page, flags=re.MULTILINE)
    return {piece.partition("\n")[0]: piece.partition("\n")[2] for piece in pieces}


def test_every_notebook_has_ten_questions_with_answers():
    found = sections()
    notebooks = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} - {"start"}  # which teaches nothing
    assert len(notebooks) >= 10
    assert not notebooks - set(found), "write ten questions for it in docs/questions.md"
    for name, text in found.items():
        questions = QUESTION.findall(text)
        assert [int(number) for number, *_ in questions] == list(range(1, 11)), name
        assert text.strip().count("\n") == 19, f"{name}: something is neither a question nor an answer"


def test_no_question_is_asked_twice():
    asked = [question for text in sections().values() for _, question, _ in QUESTION.findall(text)]
    assert len(asked) == len(set(asked))
