"""What each model is asked in an evaluation: the held-out rows that all can be asked, and each model's prompts as tokens.

Knows nothing of models, answers or scores.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import EvaluationConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.data.duplicates import is_known, prompt_key
from qlora_helpers.data.examples import Example
from qlora_helpers.data.labels import label_row
from qlora_helpers.data.plain_templates import Template
from qlora_helpers.data.prompts import Prompt, prompt_tokens
from qlora_helpers.data.rendering import RowProblem
from qlora_helpers.data.shots import with_shots
from qlora_helpers.data.templates import make_template
from qlora_helpers.evaluation.few_shot import few_shot_prompts, no_examples
from qlora_helpers.evaluation.worth import rival_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rival:
    """Another run whose adapter lies on the same base model.

    Attributes:
        run: the run's name.
        template, max_tokens, long_rows: how its rows were written: it is asked as it was trained.
        train_keys: `duplicates.prompt_key` of every row that it was trained on; None where nobody knows.
        adapter: the adapter's name in the model.
    """

    run: str
    template: str
    max_tokens: int
    long_rows: str
    train_keys: frozenset[str] | None
    adapter: str

    @property
    def name(self) -> str:
        """Its name in an evaluation's scores and answers."""
        return rival_name(self.run)


@dataclass(frozen=True)
class Asking:
    """How rows become prompts: their template, and the tokens of the longest row and of the longest answer."""

    template: Template
    max_tokens: int
    answer_tokens: int
    long_rows: str

    def usable(self, examples: Sequence[Example]) -> tuple[list[Example], list[str]]:
        """The rows that can be asked, and a remark on those that can't."""
        found, reasons = [], Counter[str]()
        for example in examples:
            try:
                if example.is_document:
                    raise RowProblem("a document asks for no answer")
                self.template.render(example)
                self.prompt(example)
                found.append(example)
            except RowProblem as problem:
                reasons[str(problem)] += 1
        return found, [f"{count} held-out rows were not asked: {reason}" for reason, count in reasons.items()]

    def prompt(self, example: Example) -> Prompt:
        """Returns a row's prompt, cut so that the answer has room within `max_tokens`.

        Raises:
            RowProblem: the template can't write the row, or its prompt does not fit.
        """
        room = self.max_tokens - self.answer_tokens
        return prompt_tokens(example, self.template, max_tokens=room, long_rows=self.long_rows)

    def prompts(self, examples: Sequence[Example]) -> tuple[list[list[int]], int]:
        """The prompt of each row, and how many were cut."""
        found = [self.prompt(example) for example in examples]
        return [prompt.ids for prompt in found], sum(prompt.trimmed_tokens > 0 for prompt in found)

    def labelled(self, items: Sequence[Example]) -> dict[int, dict[str, Any]]:
        """Labels each row's last answer by the row's index; a row whose answer alone exceeds `max_tokens` is skipped."""
        found = {}
        for index, item in enumerate(items):
            learned = dataclasses.replace(item.messages[-1], learned=True)
            asked = dataclasses.replace(item, messages=(*item.messages[:-1], learned))
            row = label_row(
                asked, self.template, train_on="last_turn", max_tokens=self.max_tokens, long_rows=self.long_rows
            )
            if row is not None:
                found[index] = row.sequence
        return found


def asks_alike(one: Asking, other: Asking) -> bool:
    """Whether two models are asked in the same words, so that their losses can be compared."""
    return (one.template.name, one.max_tokens, one.long_rows) == (
        other.template.name,
        other.max_tokens,
        other.long_rows,
    )


def known_to_rivals(examples: Sequence[Example], trained: Collection[str], rivals: Sequence[Rival]) -> list[str]:
    """Says how many held-out rows are skipped because another run was trained on them, and of which run nobody knows."""
    remarks = []
    for rival in rivals:
        if rival.train_keys is None:
            remarks.append(f"what {rival.run} was trained on is not known: it may know some of these rows by heart")
            continue
        count = sum(is_known(item, rival.train_keys) and not is_known(item, trained) for item in examples)
        if count:
            remarks.append(f"{count} held-out rows were skipped: {rival.run} was trained on them")
    return remarks


def asked_prompts(
    items: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    asking: Asking,
    shots: Sequence[Example] | None,
    only: Collection[str],
    rivals: Sequence[tuple[Rival, Asking]] = (),
) -> tuple[dict[str, list[list[int]]], int, list[str]]:
    """The prompts of each model that is asked, how many were trimmed, and what a person should know of them."""
    prompts, trimmed = asking.prompts(items)
    asked, remarks = {"base": prompts}, []
    if config.chat_baseline and asking.template.name != "chat" and tokenizer.chat_template and "base_chat" in only:
        try:
            chat = dataclasses.replace(asking, template=make_template("chat", tokenizer))
            asked["base_chat"], _ = chat.prompts(items)
        except (ModelError, RowProblem) as error:
            reason = f"{error.problem} ({error.got})" if isinstance(error, ModelError) and error.got else str(error)
            remarks.append(f"the untuned model was not asked under its own chat template: {reason}")
    if config.few_shot and shots is not None and items and "base_few" in only:
        template = asking.template
        try:
            found = few_shot_prompts(
                items,
                shots[: config.few_shot],
                lambda item, before: prompt_tokens(with_shots(item, before), template).ids,
                asking.max_tokens - asking.answer_tokens,
            )
            remarks.append(found.remark() if found is not None else no_examples(shots))
            if found is not None:
                asked["base_few"] = found.ids
        except RowProblem as problem:
            remarks.append(f"the untuned model was not asked with examples in its prompt: {problem}")
    asked["tuned"] = prompts
    chosen = {name: questions for name, questions in asked.items() if name in only}
    return chosen | {rival.name: its.prompts(items)[0] for rival, its in rivals}, trimmed, remarks


def held_out(
    examples: Sequence[Example], trained: set[str]
) -> tuple[list[Example], list[dict[str, Any]], tuple[str, ...]]:
    """Merges rows with the same prompt into one, and returns the ids of those that were trained on separately."""
    kept: dict[str, tuple[Example, dict[str, Any]]] = {}
    skipped = []
    for item in examples:
        key = prompt_key(item)
        if is_known(item, trained):
            skipped.append(item.id)
        elif key in kept:
            kept[key][1]["references"] += [item.answer, *item.references]
        else:
            row = {
                "id": item.id,
                "dialogue": item.prompt,
                "summary": item.answer,
                "references": [item.answer, *item.references],
                "answers": {},
            }
            kept[key] = (item, row)
    return [item for item, _ in kept.values()], [row for _, row in kept.values()], tuple(skipped)
