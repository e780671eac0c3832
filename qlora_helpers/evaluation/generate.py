"""Asks a model: whole answers to many prompts, or one answer in pieces as it is written.

Works on a loaded model and token ids. Knows nothing of prompts, scores, adapters or runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlora_helpers.base.config import EvaluationConfig
from qlora_helpers.base.place import at
from qlora_helpers.data.templates import AnswerMarks, answer_marks
from qlora_helpers.evaluation.fast_answers.answer import AnswerForm, NotFast, answer_fast
from qlora_helpers.model.sharding import is_sharded
from qlora_helpers.model.tokenizers import refuse_tokens_without_row
from qlora_helpers.model.wiring import in_eval_mode

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def marks_of(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> AnswerMarks:
    """Returns the tokens around an answer, whoever gives it: the untuned model may end otherwise than it is trained to.

    An answer ends at the tokenizer's end of text, the chat template's end of turn, and at what the checkpoint's
    generation_config.json names, as far as the model has a token of that number.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, list | tuple) else [named]
    most = model.get_input_embeddings().weight.shape[0]
    named = [end for end in named if isinstance(end, int) and not isinstance(end, bool) and 0 <= end < most]
    marks = answer_marks(tokenizer)
    return dataclasses.replace(marks, ends=tuple(sorted({*marks.ends, *named})))


def generation_settings(
    tokenizer: PreTrainedTokenizerBase, config: EvaluationConfig, ends: Sequence[int] | None = None
) -> GenerationConfig:
    """The settings of `model.generate`. It takes from the checkpoint what is not set here, so all that matters is set.

    Args:
        tokenizer: the model's.
        config: longest answer, sampling.
        ends: the tokens that end an answer (`marks_of`); None takes the tokenizer's end of text.
    """
    from transformers import GenerationConfig

    sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.do_sample else {}
    # Some checkpoints come with a repetition penalty.
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=config.do_sample,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(ends) if ends else tokenizer.eos_token_id,
        use_cache=True,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        **sampling,
    )


def stream(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    config: EvaluationConfig,
    *,
    seed: int = 0,
) -> Generator[str, None, Answer]:
    """Yields one answer in pieces of text, as they come; closing the iterator ends the generation after the current token.

    Args:
        model: with or without adapters.
        tokenizer: the model's.
        prompt: token ids.
        config: longest answer, sampling.
        seed: of the sampling; the process's own random numbers are left as they were.

    Yields:
        A text for each token, empty where it completes no character; the last may be followed by the rest of a broken one.

    Returns:
        The whole answer, as `generate` would return it.

    Raises:
        ModelError: the prompt holds a token that has no row in the embedding.
    """
    seen: list[int] = []
    with contextlib.closing(stream_tokens(model, tokenizer, prompt, config, seed=seed)) as tokens:
        yield from _texts(_kept(tokens, seen), tokenizer)
    return answer_of(seen, tokenizer, marks_of(model, tokenizer))


def _kept(tokens: Iterable[int], seen: list[int]) -> Iterator[int]:
    for token in tokens:
        seen.append(token)
        yield token


def stream_tokens(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    config: EvaluationConfig,
    *,
    seed: int = 0,
) -> Generator[int, None, None]:
    """Yields one answer's new tokens as they come, with the one that ends it; closing it ends the generation.

    Args:
        model, tokenizer, prompt, config: as for `stream`.
        seed: of the sampling; the process's own random numbers are left as they were.

    Raises:
        ModelError: the prompt holds a token that has no row in the embedding.
    """
    from transformers import StoppingCriteriaList

    refuse_tokens_without_row(model, tokenizer, [prompt], "the prompt")
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([list(prompt)], device=device)
    settings = generation_settings(tokenizer, config, marks_of(model, tokenizer).ends)
    tokens = _Tokens()
    ended, errors = threading.Event(), []

    def asked_to_end(input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), ended.is_set(), dtype=torch.bool, device=input_ids.device)

    def work() -> None:
        try:
            devices = [device] if device.type == "cuda" else []
            # A thread has its own gradient mode.
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=tokens,
                    generation_config=settings,
                    stopping_criteria=StoppingCriteriaList([asked_to_end]),
                )
        except BaseException as error:
            errors.append(error)
        finally:
            tokens.end()

    with in_eval_mode(model):
        thread = threading.Thread(target=work, name="generate", daemon=True)
        thread.start()
        try:
            yield from tokens
        finally:
            ended.set()
            thread.join()
    if errors:
        with at("generation"):
            raise errors[0]


class _Tokens:
    """A streamer for `model.generate`: passes each new token on and skips the prompt."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._queue.put(int(value.reshape(-1)[-1]))
        self._prompt_seen = True

    def end(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[int]:
        return iter(self._queue.get, None)


def _texts(tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yields the text that each token adds, which is empty while a character is not whole."""
    ids, sent = [], ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        piece, sent = ("", sent) if text.endswith("\ufffd") else (text[len(sent) :], text)
        yield piece
    if rest := tokenizer.decode(ids, skip_special_tokens=True)[len(sent) :]:
        yield rest


@dataclass(frozen=True)
class Answer:
    """A model's answer to one prompt.

    Attributes:
        text: the answer without control tokens, and without what a reasoning model thought before it.
        tokens: new tokens, including the one that ends the answer.
        stopped: whether the answer ended by itself, before the limit.
    """

    text: str
    tokens: int
    stopped: bool


@at("generation")
@torch.no_grad()
def generate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: EvaluationConfig,
    *,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
    given: Callable[[int, Answer], Any] | None = None,
    form: AnswerForm | None = None,
) -> list[Answer]:
    """Answers prompts in batches of similar length, greedily or by sampling.

    Args:
        model: with or without adapters.
        tokenizer: the model's.
        prompts: token ids of each.
        config: batch size, longest answer, sampling.
        seed: of the sampling.
        progress: called with how many more prompts were answered.
        given: called with a prompt's place and its answer as soon as there is one.
        form: what `fast_answers.answering_form` opened. Greedy answers then come from `answer_fast`, which notes in it how they
            were made; None takes `model.generate`.

    Returns:
        An answer for each prompt, in the order given.

    Raises:
        ModelError: a prompt holds a token that has no row in the embedding.
    """
    refuse_tokens_without_row(model, tokenizer, prompts, "a prompt")
    marks = marks_of(model, tokenizer)

    def hand_over(index: int, tokens: list[int]) -> None:
        if given is not None:
            given(index, answer_of(tokens, tokenizer, marks))

    with in_eval_mode(model):
        if form is not None and not config.do_sample:
            try:
                lines = answer_fast(
                    model,
                    prompts,
                    pad=tokenizer.pad_token_id,
                    end=marks.ends,
                    most=config.max_new_tokens,
                    slots=config.batch_size,
                    form=form,
                    progress=progress,
                    given=hand_over,
                )
                return [answer_of(line, tokenizer, marks) for line in lines]
            except NotFast as reason:
                form.note(f"answers by model.generate: {reason}")
        return _generate_plainly(model, tokenizer, prompts, config, seed, progress, hand_over, marks)


def _generate_plainly(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: EvaluationConfig,
    seed: int,
    progress: Callable[[int], Any] | None,
    given: Callable[[int, list[int]], None],
    marks: AnswerMarks,
) -> list[Answer]:
    settings = generation_settings(tokenizer, config, marks.ends)
    device = model.get_input_embeddings().weight.device
    together = {"synced_gpus": True} if is_sharded(model) else {}  # processes that share the model take as many steps
    torch.manual_seed(seed)
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), config.batch_size):
        group = order[start : start + config.batch_size]
        ids, mask = _left_padded([prompts[index] for index in group], tokenizer.pad_token_id, device)
        produced = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **together)
        for index, line in zip(group, produced[:, ids.shape[1] :].tolist(), strict=True):
            answers[index] = answer_of(line, tokenizer, marks)
            given(index, line)
        if progress is not None:
            progress(len(group))
    return [answers[index] for index in range(len(prompts))]


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def answer_of(tokens: list[int], tokenizer: PreTrainedTokenizerBase, marks: AnswerMarks) -> Answer:
    """Returns new tokens, up to the first that ends an answer, as an answer."""
    place = next((index for index, token in enumerate(tokens) if token in marks.ends), None)
    if place is not None:
        tokens = tokens[: place + 1]
    text = tokenizer.decode(behind_lead(tokens, marks.lead), skip_special_tokens=True)
    return Answer(text.rpartition("</think>")[2].strip(), len(tokens), place is not None)


def behind_lead(tokens: list[int], lead: Sequence[int]) -> list[int]:
    """Returns the tokens behind the last occurrence of `lead`; all where it does not occur."""
    for start in range(len(tokens) - len(lead), -1, -1) if lead else ():
        if tokens[start : start + len(lead)] == list(lead):
            return tokens[start + len(lead) :]
    return tokens
