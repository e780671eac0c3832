"""Asks a run's model outside of training, in the prompt that it was trained with: for a whole answer, or for one in pieces.

One answer is given at a time, whoever asks: whether the adapters are on is a state of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.text import plain
from qlora_helpers.model.run_model import RunModel
from qlora_helpers.planning import out_of_memory
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.locks import MODEL_IN_USE

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.evaluation.generate import Answer
    from qlora_helpers.model.loading import LoadedModel


@out_of_memory.rescued
def ask(
    run: Run,
    model: PeftModel,
    loaded: LoadedModel,
    dialogue: str,
    *,
    tuned: bool = True,
    sampled: bool = False,
    seed: int = 0,
) -> Answer:
    """Has one dialogue summarised, in the prompt that the run was trained with.

    Args:
        run: the run; its evaluation settings say how long an answer may be, and how it is sampled.
        model: the tuned model.
        loaded: the base model under `model`.
        dialogue: turns, one a line; its end is cut off where it is too long for the run's `seq_len_tokens`.
        tuned: False switches the adapters off, so the base model answers.
        sampled: draw the tokens by their likelihood instead of taking the likeliest each time.
        seed: of the draw.

    Returns:
        The answer. Its text is safe to print: control characters that the model wrote are removed.
    """
    from qlora_helpers.evaluation import generate

    config = run.config()
    settings = dataclasses.replace(config.evaluation, do_sample=sampled)
    prompt = _prompt(config, loaded.tokenizer, dialogue)
    with MODEL_IN_USE, RunModel(run, model, loaded).with_adapters(tuned):
        answer = generate.generate(model, loaded.tokenizer, [prompt], settings, seed=seed)[0]
    return dataclasses.replace(answer, text=plain(answer.text))


def streaming_answers(run: Run, model: PeftModel, loaded: LoadedModel) -> Callable[..., Iterator[str]]:
    """Makes a function that answers dialogues in pieces, one at a time, as `widgets.answer_panel` takes it.

    Args:
        run: the run; its template and `seq_len_tokens` are used.
        model: the tuned model; its adapters are off while the base model answers.
        loaded: the base model under `model`.

    Returns:
        `answer(dialogue, *, tuned, temperature, top_p, max_new_tokens)`, an iterator of texts; temperature 0 takes the likeliest
        token each time. It raises ConfigError where these settings are not valid, such as an answer longer than
        `seq_len_tokens`.
    """
    from qlora_helpers.evaluation import generate

    asked = RunModel(run, model, loaded)

    def answer(dialogue: str, *, tuned: bool, temperature: float, top_p: float, max_new_tokens: int) -> Iterator[str]:
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
        )
        settings = {f"evaluation.{key}": value for key, value in sampling.items()}
        config = run.config().with_settings(settings | {"evaluation.max_new_tokens": max_new_tokens})
        prompt = _prompt(config, asked.tokenizer, dialogue)
        with MODEL_IN_USE, asked.with_adapters(tuned):
            yield from generate.stream(model, asked.tokenizer, prompt, config.evaluation)

    return answer


def _prompt(config: RunConfig, tokenizer: PreTrainedTokenizerBase, dialogue: str) -> list[int]:
    """A dialogue's prompt as tokens, trimmed so that prompt and answer together fit into `seq_len_tokens`."""
    from qlora_helpers.data.prompts import prompt_tokens

    tokens = prompt_tokens(dialogue, config.data.template, tokenizer)
    return tokens.fitted(config.data.seq_len_tokens - config.evaluation.max_new_tokens).ids
