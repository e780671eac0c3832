"""Asks a run's model outside of training, in the prompt that it was trained with: for a whole answer, or for one in pieces.

One answer is given at a time, whoever asks: whether the adapters are on is a state of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.base.text import plain
from qlora_helpers.data.examples import Example
from qlora_helpers.data.prepared_file import read_prepared_file
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
    dialogue: str | Example,
    *,
    tuned: bool = True,
    sampled: bool = False,
    seed: int = 0,
) -> Answer:
    """Asks one question, in the prompt that the run was trained with.

    Args:
        run: the run; its evaluation settings say how long an answer may be, and how it is sampled.
        model: the tuned model.
        loaded: the base model under `model`.
        dialogue: a text, which gets the instruction and the system's message of the run's rows, or a whole conversation that ends
            with a turn of the assistant, whose text does not count; it is cut as rows are where it is too long.
        tuned: False switches the adapters off, so the base model answers.
        sampled: draw the tokens by their likelihood instead of taking the likeliest each time.
        seed: of the draw.

    Returns:
        The answer. Its text is safe to print: control characters that the model wrote are removed.
    """
    from qlora_helpers.evaluation import generate

    config = run.config()
    settings = dataclasses.replace(config.evaluation, do_sample=sampled)
    prompt = _prompt(run, config, loaded.tokenizer, dialogue)
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

    def answer(
        dialogue: str | Example, *, tuned: bool, temperature: float, top_p: float, max_new_tokens: int
    ) -> Iterator[str]:
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
        )
        settings = {f"evaluation.{key}": value for key, value in sampling.items()}
        config = run.config().with_settings(settings | {"evaluation.max_new_tokens": max_new_tokens})
        prompt = _prompt(run, config, asked.tokenizer, dialogue)
        with MODEL_IN_USE, asked.with_adapters(tuned):
            yield from generate.stream(model, asked.tokenizer, prompt, config.evaluation)

    return answer


def _prompt(run: Run, config: RunConfig, tokenizer: PreTrainedTokenizerBase, asked: str | Example) -> list[int]:
    """A question's prompt as tokens, cut so that prompt and answer together fit into `seq_len_tokens`.

    Raises:
        DataError: the run's template can't write this conversation.
    """
    from qlora_helpers.data.prompts import prompt_tokens, question
    from qlora_helpers.data.rendering import RowProblem
    from qlora_helpers.data.templates import template_of

    if isinstance(asked, str):
        saved = read_prepared_file(run.data_dir)
        asked = question(asked, config.data, saved.test if saved else ())
    room = config.data.seq_len_tokens - config.evaluation.max_new_tokens
    template = template_of(config.data, tokenizer)
    try:
        return prompt_tokens(asked, template, max_tokens=room, long_rows=config.data.long_rows).ids
    except RowProblem as problem:
        raise DataError(
            "this can't be asked", got=str(problem), next_step="Shorten it, or ask in the form of the data."
        ) from problem
