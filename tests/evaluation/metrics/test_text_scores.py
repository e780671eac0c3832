"""ROUGE, chrF and repetition in every script: values by hand, and those of the libraries where these are right."""

from __future__ import annotations

import random
import unicodedata

import pytest
from rouge_score.rouge_scorer import RougeScorer

from qlora_helpers.base.config import DataConfig
from qlora_helpers.data.sources import read_corpus
from qlora_helpers.evaluation.metrics.text import TEXT, chrf, common_length, repetition, rouge_rows
from qlora_helpers.evaluation.metrics.words import is_english, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cats' 2nd home-made cake, don't!", ["the", "cats", "2nd", "home", "made", "cake", "don", "t"]),
        ("snake_case", ["snake", "case"]),
        ("Käthe müsste die Straße", ["käthe", "müsste", "die", "strasse"]),
        (unicodedata.normalize("NFD", "Käthe"), ["käthe"]),
        ("今天 GPT4模型。", ["今", "天", "gpt4", "模", "型"]),
        ("コーヒーを２杯", ["コ", "ー", "ヒ", "ー", "を", "2", "杯"]),
        ("ﾊﾟｿｺﾝ", ["パ", "ソ", "コ", "ン"]),
        ("ภาษาไทยดี ๑๒", ["ภ", "า", "ษ", "า", "ไ", "ท", "ย", "ดี", "๑๒"]),
        ("ខ្មែរ", ["ខ្", "មែ", "រ"]),
        ("한국어 문장입니다", ["한국어", "문장입니다"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("الكـــتاب جديد", ["الكتاب", "جديد"]),
        ("می‌خواهم", ["میخواهم"]),
        ("Ελλάς ΕΛΛΆΣ", ["ελλάσ", "ελλάσ"]),
        ("co\u00adoperate", ["cooperate"]),
        ("🎂 ... —", []),
        ("", []),
    ],
)
def test_words_of_every_script(text, expected):
    assert words(text) == expected


SAME = [
    "今天下午三点开会，请带上合同。",
    "明日の会議は午後３時に始まります。",
    "الاجتماع غدا في الساعة الثالثة.",
    "Встреча завтра в три часа.",
    "Η συνάντηση είναι αύριο στις τρεις.",
    "การประชุมเริ่มบ่ายสามโมง",
    "회의는 내일 오후 세 시에 시작합니다.",
    "बैठक कल तीन बजे है।",
    "הפגישה מחר בשלוש.",
    "Die Prüfung fällt übermorgen aus.",
]


@pytest.mark.parametrize("text", SAME)
def test_the_same_answer_has_100_in_every_script(text):
    (row,) = TEXT.score([text], [[text]])
    assert row == {"rouge1": 100, "rouge2": 100, "rouge_l": 100, "chrf": pytest.approx(100)}


@pytest.mark.parametrize(
    ("answer", "reference", "rouge1"),
    [
        ("猫在 3 楼", "我们 3 点见", 100 * 2 * 1 / (4 + 5)),  # one common token, the digit, of 4 and of 5
        ("他明天来", "她明天走", 100 * 2 * 2 / (4 + 4)),  # 明 and 天
        ("Käthe müsste", "Kathe musste", 0),
        ("Emmanuel a réservé une télé", "Emmanuel a préféré une clé", 100 * 2 * 3 / (5 + 5)),
        ("Łódź wczoraj", "Łukasz zażółci", 0),
    ],
)
def test_different_answers_by_hand(answer, reference, rouge1):
    assert rouge_rows([answer], [[reference]])[0]["rouge1"] == pytest.approx(rouge1)


def test_what_nothing_can_be_counted_in_has_no_score():
    """An emoji has no words, one word has no pair; an answer without words to a reference with some has nothing of it."""
    assert rouge_rows(["👍"], [["👍"]]) == [{"rouge1": None, "rouge2": None, "rouge_l": None}]
    assert rouge_rows(["yes"], [["yes"]]) == [{"rouge1": 100, "rouge2": None, "rouge_l": 100}]
    assert rouge_rows(["👍"], [["Bo is late"]]) == [{"rouge1": 0, "rouge2": 0, "rouge_l": 0}]
    assert rouge_rows(["Bo is late"], [["👍", "Bo is late"]])[0]["rouge_l"] == 100
    assert chrf("👍", ["👍"]) == pytest.approx(100)
    assert chrf("anything", ["  "]) is None


def test_english_figures_are_those_of_the_rouge_score_package():
    corpus = read_corpus(DataConfig())
    texts = [text for item in corpus.train for text in (item.answer, item.prompt) if text.isascii()]
    draw = random.Random(0)
    answers, references = ([draw.choice(texts) for _ in range(150)] for _ in range(2))
    scorer = RougeScorer(("rouge1", "rouge2", "rougeL"), use_stemmer=True)
    names = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l"}
    for answer, reference, row in zip(answers, references, rouge_rows(answers, [[r] for r in references]), strict=True):
        found = scorer.score(reference, answer)
        assert row == {names[key]: 100 * one.fmeasure for key, one in found.items()}


def test_stems_are_english_alone():
    """Porter's rules take the end off German words too, so other languages are compared without them."""
    assert is_english(["The party is at the café.", "Zoë pays." * 40]) is False
    assert is_english(["The parties are at the café, and " + "everybody comes along with a present " * 10])
    assert rouge_rows(["Bo runs"], [["bo RUNNING"]])[0]["rouge1"] == 100
    german = [["die Häuser für Rates"], ["Übermorgen"]]
    assert rouge_rows(["die Häuser für Rate", "Übermorgen"], german)[0]["rouge1"] == pytest.approx(75)


def test_the_longest_common_subsequence_by_hand():
    assert common_length("abcbdab", "bdcaba") == 4
    assert common_length("", "abc") == common_length("abc", "") == common_length("abc", "xyz") == 0
    assert common_length("a" * 300, "a" * 200) == 200


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("abc", "abc", 100),
        ("abc", "xyz", 0),
        # 1-grams 2/3 and 2/3, 2-grams 1/2 and 1/2, 3-grams 0: means of 7/18, and F2 of equal values is that value
        ("abc", "abd", 100 * 7 / 18),
        ("今天好", "今天坏", 100 * 7 / 18),
    ],
)
def test_chrf_by_hand(answer, reference, score):
    assert chrf(answer, [reference]) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("他来了。" * 10, 1 - 4 / 37),  # the full stop is a piece: 40 pieces, 37 runs, 4 of them different
        ("วันนี้อากาศดี" * 10, 1 - 9 / 87),  # 9 letters with their marks
        ("Не знаю, что делать. " * 10, 1 - 4 / 37),
        ("今天下午三点开会", 0),
        ("好的", 0),
    ],
)
def test_repetition_in_every_script(text, share):
    assert repetition(text) == pytest.approx(share)


def test_long_answers_are_scored_in_steps_that_grow_with_their_length(monkeypatch):
    """The table of all pairs of words would be 4,000,000 steps; one step a word is enough."""
    reads = 0

    class Word(str):
        __slots__ = ()

        def __hash__(self):
            nonlocal reads
            reads += 1
            return super().__hash__()

    one, other = ([Word(f"w{(index * step) % 997}") for index in range(2000)] for step in (3, 5))
    common_length(one, other)
    assert reads <= 3 * (len(one) + len(other))
