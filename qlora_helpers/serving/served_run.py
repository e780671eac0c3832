"""One name of a server: its prompt, its settings and its answers.

A request is written by the template of the run that it names, as the run's rows were, and ends at the same tokens, so that a greedy
answer is that of `ask` token for token. Knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import EvaluationConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.data.examples import Example, Message
from qlora_helpers.data.prepared_file import read_prepared_file
from qlora_helpers.data.prompts import prompt_tokens, question
from qlora_helpers.data.rendering import Rendering, RowProblem
from qlora_helpers.data.templates import template_of
from qlora_helpers.runs.folder import Run
from qlora_helpers.serving.answered import Answered
from qlora_helpers.serving.asked import Asked
from qlora_helpers.serving.asked_tools import names_of
from qlora_helpers.serving.refusal import Refusal
from qlora_helpers.serving.text import AnswerText
from qlora_helpers.serving.tool_calls import CallForm, call_form

if TYPE_CHECKING:
    from qlora_helpers.serving.models import ServedModels


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

    @cached_property
    def _call_form(self) -> CallForm | None:
        from qlora_helpers.evaluation.generate import marks_of

        tokenizer = self.models.loaded.tokenizer
        return call_form(self._template, tokenizer, marks_of(self.models.model, tokenizer))

    def described(self, name: str) -> dict[str, Any]:
        """Returns what a client can read of it: its base, the longest conversation, and what is added to one."""
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
            Refusal: the run's template can't write it, or not with tools, or a token has no row in the model.
        """
        from qlora_helpers.model.tokenizers import refuse_tokens_without_row

        if asked.tools and self._call_form is None:
            raise Refusal(
                "This model takes no tools: its template does not show them, or writes calls in a form that is not read "
                "back here. Describe them in the conversation, and read the call from the answer's text.",
                param="tools",
                code="unsupported_value",
            )
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
            return Example("asked", "asked", (*messages, answer), tools=asked.tools)
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
        tools = asked.tools or self._pattern.tools
        return dataclasses.replace(self._pattern, messages=(*messages, answer), tools=tools)

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

        Where tools may be called, the text comes in one piece at the end, since it may be a call.

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
            held = []
            with contextlib.closing(stream_tokens(model, tokenizer, prompt, settings, seed=seed)) as tokens:
                for token in tokens:
                    if piece := text.add(token):
                        if asked.tools:
                            held.append(piece)
                        else:
                            yield piece
                    if text.ended:
                        break
            rest = "".join([*held, text.rest()])
        read = self._call_form.read(rest, names_of(asked.tools)) if asked.tools and self._call_form else None
        content, calls = read or (rest, ())
        if content:
            yield content
        finished = "tool_calls" if calls else "stop" if text.ended else "length"
        yield Answered(len(prompt), len(text.tokens), finished, calls)
