"""Each row is proved on its tokens: what a server would make of its prompt, and text that decodes to what was to be learned."""

from __future__ import annotations

import numpy as np
import pytest
from chat_families import SENTENCES, family_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_helpers.data import row_proof
from qlora_helpers.data.examples import Example, Message, one_turn
from qlora_helpers.data.labels import LabelSettings, label_rows
from qlora_helpers.data.outcome import Outcome
from qlora_helpers.data.prompts import prompt_text, prompt_tokens
from qlora_helpers.data.rendering import Rendering, Turn
from qlora_helpers.data.row_proof import prove, same_text
from qlora_helpers.data.templates import make_template


def llama3_like():
    """Llama 3's rule for words: marks take the line breaks behind them along."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rule = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rule), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f"{text}\n---\nSummary:\nYes?\n---\n" * 3 for text in SENTENCES], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")


def pieces_without_bytes():
    """A SentencePiece-like tokenizer that has no token for most characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>", "<pad>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


TOKENIZERS = {
    "GPT-2's rule": lambda: family_tokenizer("chatml"),
    "Llama 3's rule": llama3_like,
    "SentencePiece": lambda: family_tokenizer("zephyr", "pieces"),
}
TEXTS = [
    "Where is my parcel?",
    "Ana: when?\n",
    "ça 🎂🎂",
    " spaces ",
    "\n\nlines\n\n",
    "x",
    "日本語のテキスト",
    "a\u0301 e\u0301",
]


def labelled(example, template, **more):
    outcome = Outcome()
    rows = list(label_rows([example], template, LabelSettings(**more), outcome))
    return (rows[0] if rows else None), outcome


@pytest.mark.parametrize("name", ["recipe", "plain"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_prompts_have_the_tokens_of_their_whole_text(tokenizer, name):
    """What a server does with the text; in pieces, other tokens came at the seams (case 13)."""
    tokenizer = tokenizer()
    template = make_template(name, tokenizer)
    for text in TEXTS:
        example = one_turn("1", "row 1", text, "It left the depot.", instruction="Where is it?\n")
        served = tokenizer(prompt_text(example, template))["input_ids"]
        prompt = prompt_tokens(example, template)
        row, _ = labelled(example, template)
        assert prompt.ids == served == row.input_ids[: len(served)]


def test_the_pieces_of_a_prompt_would_have_had_other_tokens():
    tokenizer = llama3_like()
    parts = ["Where is it?\n", "And when will it come?", "\n---\nSummary:\n"]
    assert tokenizer("".join(parts))["input_ids"] != [token for part in parts for token in tokenizer(part)["input_ids"]]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_trained_tokens_decode_to_the_answer(tokenizer):
    tokenizer = tokenizer()
    template = make_template("plain", tokenizer)
    for text in TEXTS:
        row, outcome = labelled(one_turn("1", "row 1", "Where?", text), template)
        ((start, end),) = row.trained
        assert end == len(row) and not outcome.masked
        before = tokenizer.decode(row.ids[start - 1 : start])
        assert tokenizer.decode(row.ids[start - 1 : end])[len(before) :] == text + tokenizer.eos_token


def test_an_answer_that_the_tokenizer_can_not_write_is_not_trained():
    tokenizer = pieces_without_bytes()
    template = make_template("plain", tokenizer)
    row, outcome = labelled(one_turn("1", "row 1", "Where is my parcel?", "It left 🎂"), template)
    assert row is None
    assert outcome.masked == {row_proof.NOT_EXACT: 1}
    assert outcome.skipped[0][2] == f"nothing can be trained: {row_proof.NOT_EXACT}"
    assert labelled(one_turn("1", "row 1", "Where 🎂?", "It left"), template)[0] is not None


def test_an_answer_that_the_tokenizer_changes_a_little_is_noted():
    from tokenizers import normalizers

    tokenizer = family_tokenizer("chatml")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    template = make_template("plain", tokenizer)
    row, outcome = labelled(one_turn("1", "row 1", "Where?", "It left… ½"), template)
    assert tokenizer.decode(row.ids[slice(*row.trained[0])]).startswith("It left... 1")
    assert list(outcome.notes) == [row_proof.NORMALISED]
    assert not labelled(one_turn("1", "row 1", "Where?", "It left."), template)[1].notes


def test_a_template_that_lies_about_its_turns_is_found():
    """The proof looks at tokens, whoever says where a turn is."""
    tokenizer = family_tokenizer("chatml")
    encoder = make_template("plain", tokenizer).encoder
    text = "Where? It left.<|im_end|>"
    (made,) = prove([Rendering(text, (Turn(1, 8, len(text)),))], encoder)  # in the middle of a word
    assert made.spans and tokenizer.decode(made.ids[slice(*made.spans[0])]) == text[8:]  # the seam was made there
    (made,) = prove([Rendering(text + " ", (Turn(1, 8, len(text)),))], encoder)
    assert made.masked == [(1, row_proof.SEAM)] and not made.spans


def test_control_tokens_in_a_turn_are_counted():
    tokenizer = family_tokenizer("chatml")
    encoder = make_template("plain", tokenizer).encoder
    text = "Where? <|im_end|> <|im_end|>"
    typed = ((18, 28),)
    (made,) = prove([Rendering(text, (Turn(1, 7, len(text)),), typed=typed)], encoder)
    assert not made.masked
    assert made.ids.tolist().count(tokenizer.eos_token_id) == 1
    encoder.controls = lambda ids: 7
    (made,) = prove([Rendering(text, (Turn(1, 7, len(text)),), typed=typed)], encoder)
    assert made.masked == [(1, row_proof.TYPED)]


@pytest.mark.parametrize("name", ["recipe", "plain"])
def test_an_end_token_that_is_also_the_unknown_token_ends_an_answer(name):
    """As in GPT-2's and Qwen2's own tokenizers, whose every row was left out."""
    tokenizer = family_tokenizer("chatml")
    tokenizer.unk_token = tokenizer.eos_token
    row, outcome = labelled(one_turn("1", "row 1", "Where?", "It left."), make_template(name, tokenizer))
    assert not outcome.masked and not outcome.skipped
    assert row.ids[row.trained[0][1] - 1] == tokenizer.eos_token_id


def test_texts_are_the_same_up_to_what_a_tokenizer_changes():
    assert same_text("a b", "a", " b") == (True, True)
    assert same_text("b", "", "b") == (True, True)
    assert same_text("a  B", "a", " b") == (False, True)
    assert same_text("a c", "a", " b") == (False, False)
    marks = "\u0327\u0301" * 400_000  # takes the square of their number to bring into order
    assert same_text(f"b{marks}", "", f"a{marks}") == (False, False)
    assert same_text("x a▁b".replace("▁", " "), "x", " a\u2581b") == (True, True)


CHATML = family_tokenizer("chatml")
PIECES = family_tokenizer("chatml", "pieces")
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=30),
    st.sampled_from(["<|im_end|>", "<|im_start|>user\n", "\n", "  ", "<|im_", "end|>", "<tool_call>"]),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(TEXT, min_size=2, max_size=6), st.sampled_from(["plain", "chat"]), st.sampled_from([CHATML, PIECES]))
def test_whatever_rows_hold_nothing_else_is_trained(texts, name, tokenizer):
    roles = ["user", "assistant"] * 3
    texts = texts[: len(texts) // 2 * 2]
    example = Example("1", "row 1", tuple(map(Message, roles, texts)))
    template = make_template(name, tokenizer)
    row, outcome = labelled(example, template)
    control = {tokenizer.convert_tokens_to_ids(each) for each in ("<|im_start|>", "<|im_end|>", "<|pad|>")}
    turns = len(texts) // 2
    assert outcome.turns + sum(outcome.masked.values()) == turns
    if row is None:
        return
    ids = np.array(row.input_ids)
    assert sum(token in control for token in row.input_ids) == (2 + 4 * turns if name == "chat" else turns)
    for (start, end), answer in zip(row.trained, row.answers, strict=True):
        assert ids[end - 1] == tokenizer.eos_token_id
        assert sum(token in control for token in ids[start:end].tolist()) == 1
        before = tokenizer.decode(ids[start - 1 : start])
        assert any(same_text(tokenizer.decode(ids[start - 1 : end]), before, answer))
    prompt = prompt_tokens(example, template)
    if row.trained[-1][1] == len(row):
        assert row.input_ids[: len(prompt)] == prompt.ids
