"""A tokenizer as GGUF: its tokens with their kinds, its merges or scores, and the name by which llama.cpp splits text.

llama.cpp has its own tokenizers. It knows how a byte-level BPE tokenizer splits text by a name alone, so the name is proved: the
splitting that goes by it must cut test texts as the model's own does. Of a SentencePiece tokenizer it needs scores, which are the
order of its merges; that holds only where no merge is missing. What fails a proof is refused. Source of the splittings:
llama.cpp's `llm_tokenizer_bpe` in `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

INSTEAD = "Use --to merged or --to vllm: both take the tokenizer as it is."
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CASED = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = _CASED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_MIXED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# llama.cpp's name -> the expressions by which it splits, each within the pieces of the one before
SPLITTINGS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "llama-bpe": (_WORDS % r"\p{N}{1,3}",),
    "qwen2": (_WORDS % r"\p{N}",),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
# llama.cpp's own expressions for these cut combining marks off their letters, as in Hindi: it reads such a text in other tokens
UNEQUAL: dict[str, tuple[str, ...]] = {
    "tekken": ((_MIXED % ("", "")) + r"|\p{N}|" + _REST,),
    "gpt-4o": ((_MIXED % (f"{_CASED}?", f"{_CASED}?")) + r"|\p{N}{1,3}|" + _REST,),
}
IGNORES_MERGES = {"llama-bpe", "tekken"}  # whole words that are tokens stay tokens
TEXTS = (
    "Hello world! It's 12345 o'clock, we'LL see; they'Ve 7 cats.\n\n\tdef f(x): return x**2  # tab and spaces   \r\n",
    "Straße, naïve café, ΑΒΓ αβγ, Привет мир, 你好世界。 こんにちは カタカナ 안녕하세요 مرحبا नमस्ते ไทย 🎂🎉 ½ ² Ⅷ ٣٤٥",
    "camelCase HTTPServer XMLHttpRequest iPhone15Pro $100.50 <b>&amp;</b> `code` a/b\\c |pipe| ^~= +++ --- ... ?!",
    " leading, trailing \n \n\n   \n x  y   z\t\tend 1 22 333 4444 55555 3.14159 1,000,000 'quoted' \"double\" can't CAN'T",
    "### System:\nYou are brief.\n\n### User:\nSummarise:\nAna: are you coming?\nBo: can't :(\n---\nSummary:\n",
)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in GGUF's terms.

    Attributes:
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
        pre: llama.cpp's name of its splitting; `default` for SentencePiece.
        tokens: `(vocabulary,)`, filled up to the rows of the model's embedding.
        types: of each, GGUF's kind of token.
        merges: of byte-level BPE.
        scores: of SentencePiece.
        space_prefix: whether a space is put before texts, at the start and behind control tokens; None: at the start alone.
        strips: whether white space behind control tokens belongs to them, as Phi-3's do.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    space_prefix: bool | None = False
    strips: bool = False


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """Reads a tokenizer into GGUF's terms, and proves how it splits text.

    Args:
        tokenizer: one of the tokenizers library.
        rows: of the model's embedding.

    Raises:
        ModelError: llama.cpp has no such tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _refused(f"llama.cpp's kinds of tokenizer are byte-level BPE and SentencePiece, not {model['type']}")
    if len(tokenizer) > rows:
        raise _refused(f"the tokenizer has {len(tokenizer):,} tokens, and the model's embedding {rows:,} rows")
    added = {token["id"]: token for token in content["added_tokens"]}
    if model.get("byte_fallback"):
        return _sentencepiece(content, added, rows)
    pre = splitting_name(content, backend)
    tokens, types = _tokens(content, added, rows, pieces=False)
    merges = tuple(" ".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"])
    if any(merge.count(" ") != 1 for merge in merges):
        raise _refused("one of its merges holds a space")
    return Vocabulary("gpt2", pre, tokens, types, merges, strips=_strips(added))


def splitting_name(content: dict[str, Any], backend: Any) -> str:
    """Returns llama.cpp's name of a byte-level tokenizer's splitting: the one that cuts all test texts as the tokenizer does.

    Args:
        content: the tokenizer's JSON.
        backend: the tokenizer, of the tokenizers library.

    Raises:
        ModelError: it is none that llama.cpp knows.
    """
    splitter = backend.pre_tokenizer
    if splitter is None or "ByteLevel" not in json.dumps(content.get("pre_tokenizer")):
        raise _refused("it splits text in no way that llama.cpp knows")
    own = [_pieces(splitter, text) for text in TEXTS]
    ignores = bool(content["model"].get("ignore_merges"))
    for name in (*SPLITTINGS, *UNEQUAL):
        if ignores == (name in IGNORES_MERGES) and [_pieces(_splitter(name), text) for text in TEXTS] == own:
            if name in UNEQUAL:
                raise _refused(f"llama.cpp's {name} cuts combining marks off their letters, as in Hindi")
            return name
    raise _refused("it splits text in no way that llama.cpp knows", got=f"{len(own[0])} pieces of a test text")


def _pieces(splitter: Any, text: str) -> list[str]:
    return [piece for piece, _ in splitter.pre_tokenize_str(text)]


def _splitter(name: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(each), behavior="isolated") for each in (SPLITTINGS | UNEQUAL)[name]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _tokens(
    content: dict[str, Any], added: dict[int, dict[str, Any]], rows: int, *, pieces: bool
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Returns all tokens with their kinds, filled up with unused ones."""
    from gguf import TokenType

    names = {number: token for token, number in content["model"]["vocab"].items()}
    names |= {number: token["content"] for number, token in added.items()}
    tokens, types = [], []
    for number in range(rows):
        name = names.get(number)
        if name is None:
            name, kind = f"[PAD{number}]", TokenType.UNUSED
        elif pieces and name == content["model"].get("unk_token"):
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
            name = name.replace("▁", " ") if pieces and not added[number]["special"] else name
        elif pieces and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(name)
        types.append(int(kind))
    return tuple(tokens), tuple(types)


def _sentencepiece(content: dict[str, Any], added: dict[int, dict[str, Any]], rows: int) -> Vocabulary:
    model = content["model"]
    vocab: dict[str, int] = model["vocab"]
    tokens, types = _tokens(content, added, rows, pieces=True)
    scores = _scores(vocab, [tuple(p) if isinstance(p, list) else tuple(p.split(" ")) for p in model["merges"]])
    return Vocabulary(
        "llama",
        "default",
        tokens,
        types,
        scores=tuple(scores.get(token, 0.0) for token in tokens),
        space_prefix=_space_prefix(content),
        strips=_strips(added),
    )


def _scores(vocab: dict[str, int], merges: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """Returns a piece's score by the place of its first merge, after a check that scores can stand for the merges.

    SentencePiece joins any two neighbours whose text is a token, best score first; a list of merges can do the same only where
    it holds all pairs that make a token, one token after the other.

    Raises:
        ModelError: it does not.
    """
    places: dict[str, list[int]] = {}
    for place, pair in enumerate(merges):
        places.setdefault("".join(pair), []).append(place)
    pairs = set(merges)
    for token, found in places.items():
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        possible = [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]
        if found[-1] - found[0] + 1 != len(found) or any(pair not in pairs for pair in possible):
            raise _refused(f"its merges are no SentencePiece model's (see the token {token!r})")
    return {token: -float(found[0] + 1) for token, found in places.items()}


def _space_prefix(content: dict[str, Any]) -> bool | None:
    """Whether a space is put before each stretch of text, as llama.cpp does it; None where it is put at the start alone.

    Raises:
        ModelError: the tokenizer changes its texts in another way.
    """
    normalizer, splitter = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [step["type"] for step in steps]
    if kinds == ["Prepend", "Replace"] and not splitter:
        return True
    if splitter.get("type") == "Metaspace" and not splitter.get("split", True) and not kinds:
        return {"always": True, "never": False}.get(splitter.get("prepend_scheme", "always"))
    # Gemma's splits at spaces that its normalizer has replaced, so at none
    if kinds == ["Replace"] and (not splitter or splitter.get("type") == "Split"):
        return False
    raise _refused(f"it changes texts by {', '.join(kinds) or splitter.get('type') or 'nothing'}")


_PHI_3 = {"<unk>": False, "<s>": False, "<|endoftext|>": False, "</s>": True}  # of which llama.cpp knows who strips


def _strips(added: dict[int, dict[str, Any]]) -> bool:
    """Whether white space behind control tokens belongs to them; llama.cpp knows that of Phi-3 alone, whose rule is checked.

    Raises:
        ModelError: it belongs to others than Phi-3's, or white space before a control token does.
    """
    control = {token["content"]: token for token in added.values() if token["special"]}
    if any(token["lstrip"] for name, token in control.items() if name != "<mask>"):
        raise _refused("its control tokens swallow the white space before them")
    strips = {name: token["rstrip"] for name, token in control.items()}
    if not any(strips.values()):
        return False
    if not strips.keys() >= _PHI_3.keys() or any(found != _PHI_3.get(name, True) for name, found in strips.items()):
        raise _refused("its control tokens swallow the white space behind them, which llama.cpp does for Phi-3's alone")
    return True


def write_vocabulary(
    writer: GGUFWriter, found: Vocabulary, tokenizer: PreTrainedTokenizerBase, *, end: str, prompt: str
) -> None:
    """Writes a tokenizer into a GGUF file.

    Args:
        writer: of the file.
        found: the tokenizer in GGUF's terms.
        tokenizer: the run's.
        end: the string that ends a turn.
        prompt: what a server renders: whether it begins with the begin-of-text token, or another, decides what is added.
    """
    begins = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    control = any(prompt.startswith(str(token)) for token in tokenizer.added_tokens_decoder.values())
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.model == "gpt2":
        writer.add_token_merges(found.merges)
    else:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(not control if found.space_prefix is None else found.space_prefix)
    numbers = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "eot": tokenizer.convert_tokens_to_ids(end),
        "unk": tokenizer.unk_token_id if found.model == "llama" else None,
    }
    for name, number in numbers.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(False)


def _refused(what: str, *, got: str = "") -> ModelError:
    return ModelError(f"this tokenizer can't be written as GGUF: {what}", got=got, next_step=INSTEAD)
