"""The models behind one server: a base model in 4 bits, and the adapters of one or more runs that were trained on it.

A request is written by the template of the run that it names, as the run's rows were, and ends at the same tokens, so that a greedy
answer is that of `ask` token for token. Nothing is loaded after the start. Knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import EvaluationConfig
from qlora_helpers.base.errors import ModelError, RunError, UserError
from qlora_helpers.base.text import Say
from qlora_helpers.data.examples import Example, Message
from qlora_helpers.data.prepared_file import read_prepared_file
from qlora_helpers.data.prompts import prompt_tokens, question
from qlora_helpers.data.rendering import Rendering, RowProblem
from qlora_helpers.data.templates import template_of
from qlora_helpers.export.certificate import Certificate, require_certificate
from qlora_helpers.planning import run_plan
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.locks import MODEL_IN_USE
from qlora_helpers.serving.asked import Asked, Refusal
from qlora_helpers.serving.text import AnswerText

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_helpers.model.loading import LoadedModel

BASE = "base"
"""The name by which the untuned model is asked, in the prompt of the first run."""


def served_names(runs: Sequence[Run]) -> tuple[str, ...]:
    """Returns the names that a server of some runs answers for, `base` first.

    Raises:
        UserError: a name would be given twice.
    """
    names = (BASE, *(run.name for run in runs))
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                "two of the models would have one name",
                got=repr(name),
                next_step="Copy or rename the folder of one of the runs.",
            )
    return names


def refuse_other_bases(runs: Sequence[Run]) -> list[Certificate]:
    """Returns the certificates of runs that were all trained on one base model in one form, and refuses any other.

    Raises:
        ModelError: an adapter has no certificate that fits, or was trained on another base or in another form than the first.
    """
    found = [require_certificate(run.adapter_dir) for run in runs]
    first = runs[0]
    for run, certificate in zip(runs[1:], found[1:], strict=True):
        if certificate.base_sha256 is None or certificate.base_sha256 != found[0].base_sha256:
            raise ModelError(
                f"the runs {first.name!r} and {run.name!r} can't be served together: their base models differ",
                expected=f"{found[0].base_model} ({(found[0].base_sha256 or 'no fingerprint')[:12]})",
                got=f"{certificate.base_model} ({(certificate.base_sha256 or 'no fingerprint')[:12]})",
                next_step="Serve them one by one.",
            )
        form, other = (dataclasses.asdict(each.config().model) for each in (first, run))
        differ = [f"model.{key}={form[key]!r}, not {other[key]!r}" for key in _FORM if form[key] != other[key]]
        if differ:
            raise ModelError(
                f"the runs {first.name!r} and {run.name!r} can't be served together: they were trained on the same base "
                "in different forms",
                got="; ".join(differ),
                next_step="Serve them one by one.",
            )
    return found


_FORM = ("quantization", "double_quantization", "compute_dtype", "attention")


@dataclass(frozen=True)
class Answered:
    """How an answer ended.

    Attributes:
        prompt_tokens, tokens: of the prompt and of the answer, the token that ended it included.
        finished: `stop`, or `length` where the limit cut it.
    """

    prompt_tokens: int
    tokens: int
    finished: str


class ServedModels:
    """Loads the base model of some runs and their adapters, and answers requests, one at a time.

    Args:
        runs: the runs; the first one's settings say how the base model is loaded.
        say: called with a line on what takes long.

    Raises:
        UserError: they can't be served together, or a model can't be loaded.
    """

    def __init__(self, runs: Sequence[Run], *, say: Say = print) -> None:
        from qlora_helpers.export.adapter import load_adapter
        from qlora_helpers.model import lora
        from qlora_helpers.model.checkpoints import base_fingerprint
        from qlora_helpers.model.loading import load_model

        self.names = served_names(runs)
        certificates = refuse_other_bases(runs)
        config = runs[0].config()
        self.loaded: LoadedModel = load_model(
            config.model, spread=lambda gpus: run_plan.layers_per_gpu(config, gpus), say=say
        )
        fingerprint = base_fingerprint(self.loaded.checkpoint.folder)
        if fingerprint != certificates[0].base_sha256:
            raise ModelError(
                f"{self.loaded.checkpoint.name} is not the base model that {runs[0].name!r} was trained on",
                expected=(certificates[0].base_sha256 or "none")[:12],
                got=(fingerprint or "none")[:12],
                next_step="Get the model's files again as they were, or train the run again.",
            )
        self.model: PeftModel = load_adapter(runs[0], self.loaded)
        adapters = ["default"]
        for number, run in enumerate(runs[1:], start=2):
            adapters.append(f"adapter{number}")
            lora.load_adapter(self.model, run.adapter_dir, name=adapters[-1])
        served = [
            ServedRun(run, adapter, self, certificate.weights_sha256)
            for run, adapter, certificate in zip(runs, adapters, certificates, strict=True)
        ]
        base = ServedRun(runs[0], None, self, fingerprint or "")
        self._by_name = dict(zip(self.names, (base, *served), strict=True))

    def named(self, name: str) -> ServedRun:
        """Returns the model of a name.

        Raises:
            Refusal: none of that name is served; nothing is ever loaded for a request.
        """
        if name not in self._by_name:
            names = ", ".join(self.names)
            raise Refusal(
                f"There is no model {name[:100]!r} here, but: {names}.",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self._by_name[name]

    @contextlib.contextmanager
    def answering(self, adapter: str | None) -> Iterator[None]:
        """While open, this adapter answers, or the base model where it is None."""
        with MODEL_IN_USE:
            if adapter is None:
                with self.model.disable_adapter():
                    yield
            else:
                self.model.set_adapter(adapter)
                yield


class ServedRun:
    """One of the names: a run's adapter on the base model, or the base model in the prompt of a run.

    Args:
        run: the run, whose template and settings count.
        adapter: peft's name of its adapter; None is the base model.
        models: where it is loaded.
        fingerprint: of its weights.
    """

    def __init__(self, run: Run, adapter: str | None, models: ServedModels, fingerprint: str) -> None:
        self.run, self.adapter, self.models = run, adapter, models
        self.fingerprint = fingerprint[:12]
        self.config = run.config()
        self.most_tokens = self.config.data.seq_len_tokens
        saved = read_prepared_file(run.data_dir)
        self._pattern = question("", self.config.data, saved.test if saved else ())

    @cached_property
    def _template(self) -> Any:
        return template_of(self.config.data, self.models.loaded.tokenizer)

    def described(self, name: str) -> dict[str, Any]:
        """Returns what a client is told of it: its base, the longest conversation, and what is added to one."""
        asked, system = self._pattern.messages[-2], self._pattern.messages[:-2]
        start, end = asked.body or (0, 0)
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "qlora_helpers",
            "fingerprint": self.fingerprint,
            "max_model_len": self.most_tokens,
            "adds": {
                "system": "".join(message.content for message in system),
                "before": asked.content[:start],
                "behind": asked.content[end:],
            },
        }

    def prompt(self, asked: Asked) -> list[int]:
        """Returns a request's prompt as tokens.

        Raises:
            Refusal: the run's template can't write it, or a token has no row in the model.
        """
        from qlora_helpers.model.tokenizers import refuse_tokens_without_row

        try:
            if asked.prompt is not None:
                plain = Rendering(asked.prompt, begin=self._template.name != "chat")
                ids = self._template.encoder.encode([plain])[0].ids.tolist()
            else:
                ids = prompt_tokens(self._conversation(asked), self._template).ids
            refuse_tokens_without_row(self.models.model, self.models.loaded.tokenizer, [ids], "the prompt")
        except (RowProblem, ModelError) as problem:
            raise Refusal(f"This can't be asked: {problem}.".replace("..", "."), param="messages") from None
        if not ids:
            raise Refusal("The prompt is empty.", param="prompt")
        return ids

    def _conversation(self, asked: Asked) -> Example:
        """The conversation as a row, with what the run's rows have around a person's text where the client left it out."""
        messages, answer = asked.messages, self._pattern.messages[-1]
        if asked.as_written:
            return Example("asked", "asked", (*messages, answer))
        if all(message.role != "system" for message in messages):
            pattern = self._pattern.messages[-2]
            start, end = pattern.body or (0, 0)
            before, behind = pattern.content[:start], pattern.content[end:]
            place = next(number for number, message in enumerate(messages) if message.role == "user")
            text = messages[place].content
            if not (before or behind) or not (text.startswith(before) and text.endswith(behind)):
                written = Message("user", before + text + behind, body=(len(before), len(before) + len(text)))
                messages = (*messages[:place], written, *messages[place + 1 :])
            messages = (*self._pattern.messages[:-2], *messages)
        return dataclasses.replace(self._pattern, messages=(*messages, answer))

    def settings(self, asked: Asked, prompt: Sequence[int]) -> EvaluationConfig:
        """Returns how the answer is made: the run's evaluation settings, but for what the request sets.

        Raises:
            Refusal: prompt and answer together are longer than the run's sequences.
        """
        own = self.config.evaluation
        longest = asked.max_tokens or own.max_new_tokens
        if len(prompt) + longest > self.most_tokens:
            raise Refusal(
                f"This model was trained on sequences of {self.most_tokens} tokens, and {len(prompt)} of the prompt and "
                f"{longest} of the answer are more. Shorten the conversation, or ask for fewer tokens.",
                param="messages",
                code="context_length_exceeded",
            )
        temperature = asked.temperature
        sampled = own.do_sample if temperature is None else temperature > 0
        return dataclasses.replace(
            own,
            max_new_tokens=longest,
            do_sample=sampled,
            temperature=temperature or own.temperature,
            top_p=asked.top_p or own.top_p,
        )

    def answer(self, asked: Asked, prompt: Sequence[int], settings: EvaluationConfig) -> Iterator[str | Answered]:
        """Yields the answer in pieces, and at the end how it ended; closing the iterator ends the generation.

        Args:
            asked: the request; its stop texts and its seed count.
            prompt: of `prompt`.
            settings: of `settings`.
        """
        from qlora_helpers.evaluation.generate import marks_of, stream_tokens

        model, tokenizer = self.models.model, self.models.loaded.tokenizer
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        with self.models.answering(self.adapter):
            marks = marks_of(model, tokenizer)
            text = AnswerText(tokenizer, marks, prompt, stop=asked.stop, raw=asked.prompt is not None)
            with contextlib.closing(stream_tokens(model, tokenizer, prompt, settings, seed=seed)) as tokens:
                for token in tokens:
                    if piece := text.add(token):
                        yield piece
                    if text.ended:
                        break
            if rest := text.rest():
                yield rest
        yield Answered(len(prompt), len(text.tokens), "stop" if text.ended else "length")


def runs_to_serve(run: Run, also: Sequence[Run]) -> list[Run]:
    """Returns the runs of one server, each once.

    Raises:
        UserError: a run has no adapter with a certificate, two have one name, or their bases differ.
    """
    runs = [run, *also]
    if len({each.folder.resolve() for each in runs}) < len(runs):
        raise RunError("a run is named twice", next_step="Name each run once.")
    served_names(runs)
    refuse_other_bases(runs)
    return runs
