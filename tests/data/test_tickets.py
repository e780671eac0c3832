"""The embedded tickets: complete, unique, split without leaks, and labelled by the rules of TICKETS.md."""

from __future__ import annotations

import datetime
import importlib.resources
import json
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

Row = dict[str, Any]

CORPUS = importlib.resources.files("qlora_helpers.data") / "corpus"
KEYS = ["id", "split", "sent", "subject", "body", "product", "urgency", "mood", "language", "reply", "label", "fields"]
FIELDS = ["order_number", "product", "issue", "wants", "deadline"]
PRODUCTS = {"Glimm 300", "Bivvo 2", "Murmel 20", "Kessli 1", "Pfad S", "Traga 45", "none"}
URGENCIES = {"low", "normal", "high"}
MOODS = {"calm", "annoyed", "angry", "happy", "worried"}
WANTS = {"refund", "replacement", "repair", "information", "nothing"}
LANGUAGES = {"en", "de", "fr", "es", "it", "nl", "pt", "ja", "zh", "tr", "pl", "ar"}
QUEUES = {"returns", "delivery", "billing", "warranty", "technical", "account", "praise"}
ISSUE_QUEUES = {
    "defect": {"warranty", "technical"},
    "damaged": {"delivery"},
    "wrong_item": {"returns"},
    "missing_part": {"delivery"},
    "late": {"delivery"},
    "charge": {"billing"},
    "profile": {"account"},
    "change": {"returns", "delivery"},
    "question": QUEUES - {"praise"},
    "thanks": {"praise"},
}
SPLITS = {"train": 240, "eval": 30, "test": 30}
SIGNATURE = "\nNora, Fernweg Support"
RUN_WORDS = 8
CAN_WAIT = 14  # rows that are low although something is wrong, because the customer says that it can wait


def read_rows() -> list[Row]:
    text = (CORPUS / "tickets.jsonl").read_bytes().decode("utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_rows()


def days_left(row: Row) -> int | None:
    """Returns the days from the mail to the deadline, or None where there is no deadline."""
    if row["fields"]["deadline"] is None:
        return None
    deadline = datetime.date.fromisoformat(row["fields"]["deadline"])
    return (deadline - datetime.date.fromisoformat(row["sent"])).days


def digits_of(text: str) -> str:
    """Returns a text with every script's digits as ASCII, and groups of digits joined."""
    plain = "".join(str(unicodedata.digit(char, char)) for char in unicodedata.normalize("NFKC", text))
    return re.sub(r"(?<=\d)[\s.\-]+(?=\d)", "", plain)


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case; in Japanese and Chinese, its characters."""
    return re.findall(r"\w" if is_unspaced(text) else r"\w+", text.lower())


def is_unspaced(text: str) -> bool:
    return bool(re.search(r"[\u3040-\u30ff\u4e00-\u9fff]", text))


def shared_runs(texts: Iterable[str], length: int) -> list[str]:
    """Returns the runs of `length` words (twice as many characters without spaces) that occur in two of the texts."""
    owner: dict[tuple[str, ...], int] = {}
    found = []
    for number, text in enumerate(texts):
        words, needed = words_of(text), 2 * length if is_unspaced(text) else length
        for run in zip(*(words[start:] for start in range(needed)), strict=False):
            if owner.setdefault(run, number) != number:
                found.append(" ".join(run))
    return found


def similarity(first: set[str], second: set[str]) -> float:
    """Returns the share of common elements (Jaccard) of two sets of character 5-grams."""
    return len(first & second) / max(1, len(first | second))


def shingles(text: str) -> set[str]:
    joined = re.sub(r"\W+", " ", text.lower())
    return {joined[start : start + 5] for start in range(max(1, len(joined) - 4))}


def close_pairs(texts: list[str], limit: float) -> list[tuple[int, int]]:
    """Returns the pairs of texts whose 5-grams overlap by `limit` or more."""
    sets = [shingles(text) for text in texts]
    return [(i, j) for j in range(len(sets)) for i in range(j) if similarity(sets[i], sets[j]) >= limit]


def test_each_row_has_every_key_and_each_split_its_number(rows: list[Row]):
    assert Counter(row["split"] for row in rows) == SPLITS
    for row in rows:
        assert list(row) == KEYS
        assert list(row["fields"]) == FIELDS
        texts = [row["subject"], row["body"], row["reply"]]
        assert all(isinstance(text, str) and text.strip() == text != "" for text in texts)
    numbers = Counter[str]()
    for row in rows:
        assert row["id"] == f"{row['split']}-{numbers[row['split']]:03d}"
        numbers[row["split"]] += 1


def test_closed_fields_keep_to_their_vocabulary(rows: list[Row]):
    for row in rows:
        assert row["product"] in PRODUCTS
        assert row["urgency"] in URGENCIES
        assert row["mood"] in MOODS
        assert row["language"] in LANGUAGES
        assert row["label"] in QUEUES
        fields = row["fields"]
        assert fields["product"] == row["product"]
        assert fields["wants"] in WANTS
        assert fields["issue"] in ISSUE_QUEUES
        assert fields["order_number"] is None or re.fullmatch(r"FW-\d{5}", fields["order_number"])


def test_the_document_names_every_value():
    text = (CORPUS / "TICKETS.md").read_text(encoding="utf-8")
    values = {*KEYS, *FIELDS, *PRODUCTS, *URGENCIES, *MOODS, *LANGUAGES, *QUEUES, *WANTS, *ISSUE_QUEUES, *SPLITS}
    assert [value for value in sorted(values) if f"`{value}`" not in text] == []


def test_every_split_covers_every_value(rows: list[Row]):
    for split in SPLITS:
        part = [row for row in rows if row["split"] == split]
        for key, values in (
            ("product", PRODUCTS),
            ("urgency", URGENCIES),
            ("mood", MOODS),
            ("language", LANGUAGES),
            ("label", QUEUES),
        ):
            assert {row[key] for row in part} == values
        assert {row["fields"]["issue"] for row in part} == set(ISSUE_QUEUES)
        assert {row["fields"]["wants"] for row in part} == WANTS


def test_queues_are_nearly_balanced_and_most_mails_are_english(rows: list[Row]):
    queues = Counter(row["label"] for row in rows)
    assert max(queues.values()) <= 1.3 * min(queues.values())
    for split, count in SPLITS.items():
        part = Counter(row["label"] for row in rows if row["split"] == split)
        assert all(abs(part[queue] - count * queues[queue] / len(rows)) <= 2.5 for queue in QUEUES)
        english = sum(row["language"] == "en" for row in rows if row["split"] == split)
        assert 0.55 <= english / count <= 0.65
    assert min(Counter(row["urgency"] for row in rows).values()) >= 50
    assert min(Counter(row["mood"] for row in rows).values()) >= 35


def test_labels_follow_the_rules(rows: list[Row]):
    can_wait = []
    for row in rows:
        fields, left = row["fields"], days_left(row)
        issue, wants = fields["issue"], fields["wants"]
        safety = row["urgency"] == "high" and (left is None or left > 7)
        assert row["label"] in ISSUE_QUEUES[issue], row["id"]
        assert left is None or left >= 0, row["id"]
        assert left is None or left > 7 or row["urgency"] == "high", row["id"]
        assert not safety or (row["label"], issue) == ("warranty", "defect"), row["id"]
        assert (wants == "nothing") == (row["label"] == "praise") == (issue == "thanks"), row["id"]
        assert issue != "question" or wants == "information", row["id"]
        if issue == "defect":
            asks = wants == "information"
            assert row["label"] == ("technical" if asks else "warranty") or (asks and row["urgency"] == "high"), row[
                "id"
            ]
        if issue in ("question", "thanks") and left is None:
            assert row["urgency"] == "low", row["id"]
        elif row["urgency"] == "low":
            can_wait.append(row["id"])
        if row["label"] == "praise":
            assert row["mood"] == "happy", row["id"]
    assert len(can_wait) == CAN_WAIT
    assert sum((days_left(row) or 0) > 7 for row in rows) >= 15  # a deadline alone does not make a ticket urgent


def test_order_numbers_occur_in_the_mail_in_some_spelling(rows: list[Row]):
    spellings = set()
    for row in rows:
        mail = f"{row['subject']}\n{row['body']}"
        number = row["fields"]["order_number"]
        if number is None:
            assert not re.search(r"FW\W?\d", unicodedata.normalize("NFKC", mail), re.IGNORECASE), row["id"]
            continue
        assert re.search(rf"(?<!\d){number[3:]}(?!\d)", digits_of(mail)), row["id"]
        spellings.add(number in mail)
        if row["label"] not in ("technical", "praise"):
            assert number in row["reply"], row["id"]
    assert spellings == {True, False}
    numbers = [row["fields"]["order_number"] for row in rows if row["fields"]["order_number"]]
    assert len(numbers) == len(set(numbers)) >= 150


def test_deadlines_are_named_in_the_mail_and_in_the_reply(rows: list[Row]):
    dated = [row for row in rows if row["fields"]["deadline"]]
    assert len(dated) >= 50
    for row in dated:
        day = datetime.date.fromisoformat(row["fields"]["deadline"]).day
        newest = "\n".join(line for line in row["body"].splitlines() if not line.startswith(">"))
        for text in (f"{row['subject']}\n{newest}", row["reply"]):
            assert re.search(rf"(?<!\d){day}(?!\d)", digits_of(text)), row["id"]


def test_replies_keep_the_house_tone(rows: list[Row]):
    for row in rows:
        assert row["reply"].endswith(SIGNATURE), row["id"]
        greeting, _, rest = row["reply"].removesuffix(SIGNATURE).partition("\n")
        assert len(greeting) <= 60, row["id"]
        assert greeting[-1] in ",:：،様", row["id"]
        sentences = [part for part in re.split(r"(?<=[.?؟])\s+|(?<=[。？])", rest) if part.strip()]
        assert 2 <= len(sentences) <= 5, row["id"]
        assert not re.search("[!！¡]", row["reply"]), row["id"]
    replies = [row["reply"] for row in rows]
    assert len(set(replies)) == len(replies)
    assert close_pairs(replies, 0.4) == []


def test_mails_vary(rows: list[Row]):
    lengths = [len(row["body"].split()) for row in rows if row["language"] not in ("ja", "zh")]
    assert sum(length <= 30 for length in lengths) >= 20
    assert sum(length >= 250 for length in lengths) >= 10
    assert max(lengths) <= 400
    quoted = [row for row in rows if re.search("^>", row["body"], re.MULTILINE)]
    assert len(quoted) >= 30
    assert sum(row["body"].startswith(">") for row in quoted) >= 5  # the newest mail is below the earlier ones


def test_no_two_mails_are_alike(rows: list[Row]):
    bodies = [row["body"] for row in rows]
    assert len({" ".join(words_of(body)) for body in bodies}) == len(bodies)
    assert shared_runs(bodies, RUN_WORDS) == []
    assert close_pairs([f"{row['subject']}\n{row['body']}" for row in rows], 0.3) == []


def test_no_training_mail_is_held_out(rows: list[Row]):
    trained = {" ".join(words_of(row["body"])) for row in rows if row["split"] == "train"}
    held_out = [" ".join(words_of(row["body"])) for row in rows if row["split"] != "train"]
    assert len(trained) == SPLITS["train"]
    assert trained.isdisjoint(held_out)


def test_copies_would_be_found(rows: list[Row]):
    """The checks above see a copied sentence and a reworded copy, in each kind of script."""
    chinese = next(row["body"] for row in rows if row["language"] == "zh")
    for body in (rows[0]["body"], chinese):
        copied = f"Something else entirely, and then: {body}"
        assert shared_runs([body, copied], RUN_WORDS)
        assert close_pairs([body, copied], 0.3) == [(0, 1)]


def test_texts_hold_no_control_characters(rows: list[Row]):
    allowed_formats = {"\u200d"}
    for row in rows:
        for text in (row["subject"], row["body"], row["reply"]):
            strange = {char for char in text if unicodedata.category(char)[0] == "C"} - {"\n"} - allowed_formats
            assert not strange, row["id"]
            assert "\ufffd" not in text, row["id"]
            assert text == unicodedata.normalize("NFC", text), row["id"]
        assert "\n" not in row["subject"], row["id"]


def test_the_package_carries_the_tickets():
    """The patterns of pyproject.toml take the corpus and its document into the wheel, as they take the dialogues."""
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    folder = root / "qlora_helpers" / "data"
    patterns = settings["tool"]["setuptools"]["package-data"]["qlora_helpers.data"]
    carried = {path.name for pattern in patterns for path in folder.glob(pattern)}
    assert carried >= {"dialogues.jsonl", "tickets.jsonl", "TICKETS.md"}
