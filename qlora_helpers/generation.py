"""How a model is asked: the settings of `generate`, and an answer in pieces as it is written.

Works on a loaded model and token ids. Knows nothing of prompts, scores, adapters or runs.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from qlora_helpers.config import EvaluationConfig

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def generation_settings(tokenizer: PreTrainedTokenizerBase, config: EvaluationConfig) -> GenerationConfig:
    """What `generate` is told: all that matters, since it takes from the checkpoint what is not set here.

    Args:
        tokenizer: the model's.
        config: longest answer, sampling.
    """
    from transformers import GenerationConfig

    sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.do_sample else {}
    # Some checkpoints come with a repetition penalty.
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens, do_sample=config.do_sample, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, use_cache=True, repetition_penalty=1.0, no_repeat_ngram_size=0, **sampling,
    )  # fmt: skip


def stream(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], config: EvaluationConfig
) -> Iterator[str]:
    """One answer in pieces of text, as they come; closing the iterator ends the generation after the token in hand.

    Args:
        model: with or without adapters.
        tokenizer: the model's.
        prompt: token ids.
        config: longest answer, sampling.
    """
    import torch
    from transformers import StoppingCriteriaList

    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([list(prompt)], device=device)
    tokens = _Tokens()
    ended, errors = threading.Event(), []

    def asked_to_end(input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), ended.is_set(), dtype=torch.bool, device=input_ids.device)

    def work() -> None:
        try:
            with torch.no_grad():  # a thread has its own gradient mode
                model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), streamer=tokens,
                    generation_config=generation_settings(tokenizer, config),
                    stopping_criteria=StoppingCriteriaList([asked_to_end]),
                )  # fmt: skip
        except BaseException as error:
            errors.append(error)
        finally:
            tokens.end()

    was_training = model.training
    model.eval()
    thread = threading.Thread(target=work, name="generate", daemon=True)
    thread.start()
    try:
        yield from _texts(tokens, tokenizer)
    finally:
        ended.set()
        thread.join()
        model.train(was_training)
    if errors:
        raise errors[0]


class _Tokens:
    """What `generate` calls a streamer: hands each new token on, and leaves the prompt out."""

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
    """The text that each token adds; half a character waits for the rest of it."""
    ids, sent = [], ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[len(sent) :]
            sent = text
    if rest := tokenizer.decode(ids, skip_special_tokens=True)[len(sent) :]:
        yield rest
