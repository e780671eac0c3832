"""A tokenizer's splitting is proved or refused, and a SentencePiece tokenizer's scores stand for its merges."""

from __future__ import annotations

import json

import pytest
from chat_families import FAMILIES, TEMPLATES, family_tokenizer

from qlora_helpers.base.errors import ModelError
from qlora_helpers.export import gguf_vocabulary
from qlora_helpers.export.gguf_vocabulary import SPLITTINGS, splitting_name, vocabulary


def split_by(name: str):
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE(ignore_merges=name in gguf_vocabulary.IGNORES_MERGES))
    tokenizer.pre_tokenizer = gguf_vocabulary._splitter(name)
    return tokenizer


@pytest.mark.parametrize("name", SPLITTINGS)
def test_each_splitting_is_told_from_all_others(name):
    backend = split_by(name)
    assert splitting_name(json.loads(backend.to_str()), backend) == name


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (  # as Llama 3's and Qwen 2's own files write them
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+"
            "|\\s+(?!\\S)|\\s+",
            "qwen2",
        ),
        (
            "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,2}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
            None,
        ),
    ],
)
def test_a_splitting_is_known_by_what_it_does(written, name):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(written), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if name:
        assert splitting_name(json.loads(tokenizer.to_str()), tokenizer) == name
    else:
        with pytest.raises(ModelError, match="it splits text in no way that llama.cpp knows"):
            splitting_name(json.loads(tokenizer.to_str()), tokenizer)


@pytest.mark.parametrize("name", gguf_vocabulary.UNEQUAL)
def test_a_splitting_that_llama_cpp_only_resembles_is_refused(name):
    backend = split_by(name)
    with pytest.raises(ModelError, match=f"llama.cpp's {name} cuts combining marks off their letters"):
        splitting_name(json.loads(backend.to_str()), backend)


@pytest.mark.parametrize("family", [name for name in FAMILIES if not FAMILIES[name].strip_behind])
def test_tokens_have_their_kinds(family):
    from gguf import TokenType

    tokenizer = family_tokenizer(family)
    found = vocabulary(tokenizer, len(tokenizer) + 3)
    kinds = dict(zip(found.tokens, found.types, strict=True))
    for control in (*FAMILIES[family].control, FAMILIES[family].eos):
        assert kinds[control] == TokenType.CONTROL
    for plain in FAMILIES[family].plain:
        assert kinds[plain] == TokenType.USER_DEFINED
    assert found.types[-3:] == (TokenType.UNUSED,) * 3
    assert not found.strips and found.model == "gpt2" and found.pre == "gpt-2" and len(found.merges) > 100


def test_a_sentencepiece_models_scores_are_the_order_of_its_merges(tmp_path):
    tokenizer = sentencepiece_tokenizer(tmp_path)
    found = vocabulary(tokenizer, len(tokenizer))
    assert found.model == "llama" and found.space_prefix is None
    merges = [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    scores = dict(zip(found.tokens, found.scores, strict=True))
    joined = [scores["".join(pair)] for pair in merges]
    assert joined == sorted(joined, reverse=True) and len(set(joined)) > 50


def phi_3_tokenizer(folder):
    """A SentencePiece tokenizer with Phi-3's control tokens, which swallow the white space behind them."""
    from tokenizers import AddedToken

    tokenizer = sentencepiece_tokenizer(folder)
    for name in ("</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"):
        tokenizer.add_tokens([AddedToken(name, rstrip=True, normalized=False, special=True)], special_tokens=True)
    tokenizer.add_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)], special_tokens=True)
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = (TEMPLATES / "phi.jinja").read_text()
    tokenizer.save_pretrained(folder / "phi-3")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "phi-3")


def test_white_space_that_control_tokens_swallow_is_phi_3s_or_refused(tmp_path):
    tokenizer = phi_3_tokenizer(tmp_path)
    assert vocabulary(tokenizer, len(tokenizer)).strips
    with pytest.raises(ModelError, match="which llama.cpp does for Phi-3's alone"):
        vocabulary(family_tokenizer("phi"), 500)


def sentencepiece_tokenizer(folder):
    """A tokenizer of 400 pieces that the sentencepiece library trained, as Llama 2's."""
    import sentencepiece
    from chat_families import SENTENCES
    from transformers import LlamaTokenizer

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return LlamaTokenizer.from_pretrained(folder)


def test_merges_that_scores_can_not_stand_for_are_refused(tmp_path):
    model = json.loads(sentencepiece_tokenizer(tmp_path).backend_tokenizer.to_str())["model"]
    pairs = [tuple(pair) for pair in model["merges"]]
    gguf_vocabulary._scores(model["vocab"], pairs)
    several = next(pair for pair in pairs if sum("".join(each) == "".join(pair) for each in pairs) > 1)
    with pytest.raises(ModelError, match="its merges are no SentencePiece model's"):
        gguf_vocabulary._scores(model["vocab"], [pair for pair in pairs if pair != several])
    with pytest.raises(ModelError, match="its merges are no SentencePiece model's"):
        gguf_vocabulary._scores(model["vocab"], [*(pair for pair in pairs if pair != several), several])


def test_other_tokenizers_are_refused_with_what_can(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    unigram = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    )
    with pytest.raises(
        ModelError, match=r"byte-level BPE and SentencePiece, not Unigram. Use --to merged or --to vllm"
    ):
        vocabulary(unigram, 2)
    tokenizer = family_tokenizer("chatml")
    with pytest.raises(ModelError, match="tokens, and the model's embedding 400 rows"):
        vocabulary(tokenizer, 400)
