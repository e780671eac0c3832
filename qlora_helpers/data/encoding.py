"""Turns rendered texts into token ids: each text whole, as a server does, and a row's own text never into control tokens.

A control token's string that a row holds itself (somebody typed `<|im_end|>`) must stay plain text, though the template's own
beside it is one. Such rows go through a twin of the tokenizer, in which the control tokens have other strings of the same length,
made of private-use characters: the template's are written in these, and the row's mean nothing. Knows nothing of templates and
labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_helpers.base.errors import ModelError
from qlora_helpers.data.rendering import ControlTokens, Rendering, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PRIVATE_START = 0xF0000
MOST_CONTEXTS = 4096  # prompts' ends whose tokens are kept
_FEW = 20_000  # characters that are tokenised at once
_LONG_PIECE = 256  # tokens on average, from which the tokenizer's own threads are worth the wait for them


def control_strings(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Returns the strings of the tokenizer's special tokens."""
    special = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return special | set(tokenizer.all_special_tokens)


@dataclass(frozen=True)
class Bounded:
    """A text as tokens, in which the tokens of the template's control tokens were found, one for one.

    Attributes:
        ids: `(tokens,)`, int32.
        begins: how many tokens at its start are not of the text (the begin-of-text token).
        first, behind: the character at which a control token begins, and the one behind it -> its token.
    """

    ids: np.ndarray
    begins: int
    first: dict[int, int]
    behind: dict[int, int]


@dataclass(frozen=True)
class Encoded:
    """A text as tokens, which knows where in the text each token is.

    Attributes:
        ids: `(tokens,)`, int32.
        begins: how many tokens at its start are not of the text (the begin-of-text token).
        encoding: of the tokenizers library.
    """

    ids: np.ndarray
    begins: int
    encoding: Any

    def token_at(self, place: int, length: int) -> int:
        """Returns the first token that begins at or behind a character; the number of tokens behind the text's end.

        Args:
            place: a place in the text.
            length: the text's length.
        """
        while place < length:
            token = self.encoding.char_to_token(place)
            if token is not None:
                start, _ = self.encoding.token_to_chars(token)
                return self.begins + token + (start < place)
            place += 1  # white space that the tokenizer counts to no token
        return len(self.ids)

    def token_behind(self, place: int, length: int) -> int:
        """Returns how many tokens it takes until the character before `place` is written.

        Args:
            place: a place in the text.
            length: the text's length.
        """
        if place == length:
            return len(self.ids)
        while place > 0:
            token = self.encoding.char_to_token(place - 1)
            if token is not None:
                span = chars = self.encoding.token_to_chars(token)
                while chars == span:  # a character of several tokens
                    token += 1
                    chars = self.encoding.token_to_chars(token) if self.begins + token < len(self.ids) else None
                return self.begins + token
            place -= 1
        return self.begins


class Decoder:
    """Decodes trained stretches together with the token before them, control tokens included.

    Args:
        backend: of the tokenizers library.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._single: dict[int, str] = {}

    def pairs(self, pieces: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[str, str]]:
        """Decodes pieces.

        Args:
            pieces: of each, the token before it (`(1,)`, or none), and its own.

        Returns:
            Of each, what both decode to together, and the token before it alone.
        """
        wholes = [np.concatenate(piece).tolist() for piece in pieces]
        if sum(map(len, wholes)) > _LONG_PIECE * len(wholes):
            texts = self._backend.decode_batch(wholes, skip_special_tokens=False)
        else:  # the tokenizer's threads are busy with the next rows: short pieces are sooner decoded here than there
            texts = [self._backend.decode(whole, skip_special_tokens=False) for whole in wholes]
        return [(text, self._before(before)) for text, (before, _) in zip(texts, pieces, strict=True)]

    def _before(self, ids: np.ndarray) -> str:
        if not len(ids):
            return ""
        token = int(ids[0])
        if token not in self._single:
            self._single[token] = self._backend.decode([token], skip_special_tokens=False)
        return self._single[token]


class Encoder:
    """Tokenises rendered texts in batches.

    Args:
        tokenizer: one of the tokenizers library (all that transformers calls fast).
        control: the control tokens of the template in use; None takes the tokenizer's special tokens.

    Raises:
        ModelError: the tokenizer is of another kind, which does not say where in a text a token is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: ControlTokens | None = None) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} does not say where in a text its tokens are",
                expected="a tokenizer of the tokenizers library (tokenizer.json)",
                next_step="Choose another model.",
            )
        self.tokenizer, self.backend = tokenizer, backend
        self.control = control or ControlTokens(control_strings(tokenizer))
        self._control_id = {each: tokenizer.convert_tokens_to_ids(each) for each in self.control.strings}
        ids = {*self._control_id.values(), *tokenizer.all_special_ids}
        ids.discard(None)
        if tokenizer.unk_token_id not in (
            tokenizer.eos_token_id,
            tokenizer.bos_token_id,
        ):  # as they are in GPT-2 and Qwen2
            ids.discard(tokenizer.unk_token_id)  # a character without a token is none of the template's
        self._is_control = np.zeros(max([len(tokenizer), *ids]) + 1, dtype=bool)
        self._is_control[list(ids)] = True
        self._contexts: dict[tuple[str, tuple[Span, ...]], np.ndarray] = {}

    @cached_property
    def begin(self) -> list[int]:
        """The tokens that the tokenizer puts before a plain text by itself."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start]
        return []

    def encode(self, rows: Sequence[Rendering], *, places: bool = True) -> list[Encoded]:
        """Tokenises texts; those that hold the strings of control tokens themselves go through the twin.

        Args:
            rows: the texts.
            places: whether anybody asks where a token is in its text; the tokenizer is faster without.
        """
        common = [number for number, row in enumerate(rows) if not row.typed]
        found: dict[int, Encoded] = {}
        texts = [rows[i].text for i in common]
        for number, encoding in zip(common, self._batch(self.backend, texts, places), strict=True):
            found[number] = self._encoded(rows[number], encoding, np.array(encoding.ids, dtype=np.int32))
        typed = [number for number, row in enumerate(rows) if row.typed]
        if typed:
            twin, table = self._twin
            texts = [self._in_twin(rows[i]) for i in typed]
            for number, encoding in zip(typed, self._batch(twin, texts, places), strict=True):
                found[number] = self._encoded(rows[number], encoding, table[np.array(encoding.ids, dtype=np.int64)])
        return [found[number] for number in range(len(rows))]

    def bounded(self, rows: Sequence[Rendering]) -> list[Bounded | Encoded]:
        """Tokenises rows of which only the places of control tokens are asked, as their turns begin and end there.

        A row whose control tokens are not found one for one among its tokens, or that has a turn that ends in plain text before
        the row does, gets the place of every token.
        """
        found: list[Bounded | Encoded | None] = [
            self._bounded(row, encoded) for row, encoded in zip(rows, self.encode(rows, places=False), strict=True)
        ]
        open_ones = [number for number, each in enumerate(found) if each is None]
        for number, encoded in zip(open_ones, self.encode([rows[i] for i in open_ones]), strict=True):
            found[number] = encoded
        return [each for each in found if each is not None]

    def _bounded(self, row: Rendering, encoded: Encoded) -> Bounded | None:
        spans = self.control.spans(row.text, typed=row.typed)
        tokens = np.flatnonzero(self._is_control[encoded.ids[encoded.begins :]]) + encoded.begins
        written = [self._control_id[row.text[start:end]] for start, end in spans]
        if encoded.ids[tokens].tolist() != written:
            return None
        first = dict(zip((start for start, _ in spans), tokens.tolist(), strict=True))
        behind = dict(zip((end for _, end in spans), (tokens + 1).tolist(), strict=True))
        behind[len(row.text)] = len(encoded.ids)
        if any(turn.end not in behind for turn in row.turns):
            return None
        return Bounded(encoded.ids, encoded.begins, first, behind)

    def plain(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenises texts as they are, in which nothing but the template's own strings is a control token."""
        return self.encode([Rendering(text) for text in texts])

    def contexts(self, contexts: Iterable[tuple[str, tuple[Span, ...]]]) -> list[np.ndarray]:
        """Tokenises what stands before turns, `(tokens,)` each: texts and what is typed in them. Those that come again are kept."""
        wanted = list(contexts)
        if len(self._contexts) + len(wanted) > MOST_CONTEXTS:
            self._contexts.clear()
        new = [context for context in wanted if context not in self._contexts]
        for context, encoded in zip(
            new, self.encode([Rendering(text, typed=typed) for text, typed in new], places=False), strict=True
        ):
            self._contexts[context] = encoded.ids
        return [self._contexts[context] for context in wanted]

    def _encoded(self, row: Rendering, encoding: Any, ids: np.ndarray) -> Encoded:
        begin = self.begin if row.begin else []
        if begin:
            ids = np.concatenate([np.array(begin, np.int32), ids])
        return Encoded(ids.astype(np.int32, copy=False), len(begin), encoding)

    def _batch(self, backend: Any, texts: list[str], places: bool) -> list[Any]:
        if not texts:
            return []
        # transformers leaves what an earlier call has asked for. Nothing is set without need: another thread may be tokenising.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens:
            backend.encode_special_tokens = False
        if (
            sum(map(len, texts)) <= _FEW
        ):  # here: the tokenizer's own threads take them only after all that they were given before
            return [backend.encode(text, add_special_tokens=False) for text in texts]
        tokenise = backend.encode_batch if places else backend.encode_batch_fast
        return tokenise(texts, add_special_tokens=False)

    @cached_property
    def _private(self) -> dict[str, str]:
        """Control token -> its string in the twin, of the same length."""
        return {each: chr(_PRIVATE_START + number) * len(each) for number, each in enumerate(self.control.strings)}

    @cached_property
    def _twin(self) -> tuple[Any, np.ndarray]:
        """The twin, and a table from its ids to the tokenizer's."""
        from tokenizers import Tokenizer

        content = json.loads(self.backend.to_str())
        content["truncation"] = content["padding"] = None
        for token in content["added_tokens"]:
            token["content"] = self._private.get(token["content"], token["content"])
        twin = Tokenizer.from_str(json.dumps(content))
        names = {private: name for name, private in self._private.items()}
        words = twin.get_vocab(with_added_tokens=True)
        table = np.arange(max(words.values()) + 1, dtype=np.int32)
        for token in content["added_tokens"]:
            word = token["content"]
            table[words[word]] = self.tokenizer.convert_tokens_to_ids(names.get(word, word))
        return twin, table

    def _in_twin(self, row: Rendering) -> str:
        pieces, last = [], 0
        for start, end in self.control.spans(row.text, typed=row.typed):
            pieces += [row.text[last:start], self._private[row.text[start:end]]]
            last = end
        return "".join([*pieces, row.text[last:]])

    def controls(self, ids: np.ndarray) -> int:
        """Counts control tokens."""
        return int(self._is_control[ids].sum())
