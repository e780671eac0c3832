"""Asks a run's model outside of training, in the prompt that it was trained with: for a whole answer, or for one in pieces.

One answer is given at a time, whoever asks: which adapter is on is a state of the model.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import DataError, UserError
from qlora_helpers.base.text import plain
from qlora_helpers.data.examples import Example
from qlora_helpers.data.prepared_file import read_prepared_file
from qlora_helpers.data.prompts import Prompt, prompt_tokens
from qlora_helpers.evaluation.conversation import (
    Begun,
    Conversation,
    Ended,
    Note,
    Piece,
    as_conversation,
    as_row,
    remark_on,
    trimmed_text,
)
from qlora_helpers.evaluation.worth import MODELS, model_name, rival_name
from qlora_helpers.model.several import add_saved_adapter, answering_as, refuse_other_base
from qlora_helpers.planning import out_of_memory
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.locks import MODEL_IN_USE

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.model.loading import LoadedModel

Asked = str | Example | Conversation | Sequence[Mapping[str, Any]]
LOADING = "is loading the model"


@dataclass(frozen=True)
class Reply:
    """An answer to a question that a person asked.

    Attributes:
        text: the answer, safe to print: control characters that the model wrote are removed.
        tokens: of the answer, including the one that ends it.
        stopped: whether it ended by itself, before the limit.
        prompt_tokens: of the prompt.
        trimmed: what was cut from the question to fit, in a sentence; empty where nothing was.
    """

    text: str
    tokens: int
    stopped: bool
    prompt_tokens: int
    trimmed: str = ""


@out_of_memory.rescued
def ask(
    run: Run,
    model: PeftModel,
    loaded: LoadedModel,
    dialogue: Asked,
    *,
    tuned: bool = True,
    sampled: bool = False,
    seed: int = 0,
) -> Reply:
    """Asks one question, in the prompt that the run was trained with.

    Args:
        run: the run; its evaluation settings say how long an answer may be, and how it is sampled.
        model: the tuned model.
        loaded: the base model under `model`.
        dialogue: a text, which gets the instruction and the system's message of the run's rows; messages as OpenAI writes them, the
            user's last; or a row that ends with a turn of the assistant, whose text does not count. What is too long is cut as rows
            are.
        tuned: False switches the adapters off, so the base model answers.
        sampled: draw the tokens by their likelihood instead of taking the likeliest each time.
        seed: of the draw.
    """
    from qlora_helpers.evaluation import generate

    config = run.config()
    settings = dataclasses.replace(config.evaluation, do_sample=sampled)
    prompt, _ = _prompt(run, config, loaded.tokenizer, dialogue)
    with MODEL_IN_USE, answering_as(model, model.active_adapters[0] if tuned else None):
        answer = generate.generate(model, loaded.tokenizer, [prompt.ids], settings, seed=seed)[0]
    return Reply(plain(answer.text), answer.tokens, answer.stopped, len(prompt), trimmed_text(prompt))


class Answers:
    """A function that answers conversations in pieces, as the untuned model, as a run, or as another run on the same base model.

    `widgets.answer_panel` takes it. The model is loaded when the first question comes.

    Args:
        run: the run.
        others: further runs; each is asked in the prompt that it was trained with.
        opened: returns the tuned model and its base model.

    Attributes:
        models: who can be asked: the name, and what people read.

    Raises:
        UserError: two runs have one name, one has no adapter, or was trained on another base model.
    """

    def __init__(self, run: Run, others: Sequence[Run], opened: Callable[[], tuple[PeftModel, LoadedModel]]) -> None:
        self.run, self._opened = run, opened
        self._runs = {"base": run, "tuned": run} | {rival_name(other.name): other for other in others}
        if len(self._runs) < 2 + len(others) or any(other.name == run.name for other in others):
            raise UserError(
                "two of these runs have one name",
                next_step="Copy one of the folders under another name, or leave it out.",
            )
        for other in others:
            refuse_other_base(run, other)
        self.models = {"base": MODELS["base"], "tuned": f"tuned ({run.name})"} | {
            name: model_name(name) for name in self._runs if name not in MODELS
        }
        self._adapters: dict[str, str | None] = {}
        self._held: tuple[PeftModel, LoadedModel] | None = None
        self._loading = threading.Lock()

    @property
    def runs(self) -> dict[str, Run]:
        """The run behind each name but that of the untuned model."""
        return {name: run for name, run in self._runs.items() if name != "base"}

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._held is not None

    def __call__(
        self,
        asked: Asked,
        *,
        model: str = "tuned",
        temperature: float = 0.0,
        top_p: float = 0.9,
        max_new_tokens: int = 80,
        seed: int = 0,
    ) -> Iterator[Piece]:
        """Yields an answer in pieces: what goes on before, the prompt's length, a text for each token, and how it ended.

        Args:
            asked: as for `ask`.
            model: a name of `models`.
            temperature: of the sampling; 0 takes the likeliest token each time.
            top_p: sample from the likeliest tokens that make up this share.
            max_new_tokens: the length of the longest answer, in tokens.
            seed: of the sampling.

        Raises:
            ConfigError: a setting is not valid, such as an answer longer than `seq_len_tokens`.
            DataError: the run's template can't write this conversation.
        """
        from qlora_helpers.evaluation import generate

        run = self._runs[model]
        sampling: dict[str, Any] = {"do_sample": bool(temperature)}
        sampling |= {"temperature": temperature, "top_p": top_p} if temperature else {}
        settings = {f"evaluation.{key}": value for key, value in sampling.items()}
        config = run.config().with_settings(settings | {"evaluation.max_new_tokens": max_new_tokens})
        if not self.loaded:
            yield Note(LOADING)
        live, loaded = self.open()
        prompt, remark = _prompt(run, config, loaded.tokenizer, asked)
        yield Begun(len(prompt), trimmed_text(prompt), remark)
        with MODEL_IN_USE, answering_as(live, self._adapters[model]):
            answer = yield from generate.stream(live, loaded.tokenizer, prompt.ids, config.evaluation, seed=seed)
        yield Ended(answer.tokens, answer.stopped)

    def open(self) -> tuple[PeftModel, LoadedModel]:
        """Loads the model with all adapters, unless it is there; returns it with its base model."""
        with self._loading:
            if self._held is None:
                model, loaded = self._opened()
                for other in (each for each in self._runs.values() if each is not self.run):
                    refuse_other_base(self.run, other, loaded.checkpoint)
                with MODEL_IN_USE:
                    self._adapters = {"base": None, "tuned": model.active_adapters[0]} | {
                        name: add_saved_adapter(model, other)
                        for name, other in self._runs.items()
                        if name not in MODELS
                    }
                self._held = model, loaded
            return self._held


def _prompt(run: Run, config: RunConfig, tokenizer: PreTrainedTokenizerBase, asked: Asked) -> tuple[Prompt, str]:
    """A question's prompt, cut so that prompt and answer together fit into `seq_len_tokens`, and a remark on it.

    Raises:
        DataError: the run's template can't write this conversation.
    """
    from qlora_helpers.data.rendering import RowProblem
    from qlora_helpers.data.templates import template_of

    saved = read_prepared_file(run.data_dir)
    like = saved.test if saved else ()
    talk = as_conversation(asked)
    room = config.data.seq_len_tokens - config.evaluation.max_new_tokens
    template = template_of(config.data, tokenizer)
    try:
        row = as_row(talk, config.data, like)
        return prompt_tokens(row, template, max_tokens=room, long_rows=config.data.long_rows), remark_on(talk, like)
    except RowProblem as problem:
        raise DataError(
            "this can't be asked", got=str(problem), next_step="Shorten it, or ask in the form of the data."
        ) from problem
