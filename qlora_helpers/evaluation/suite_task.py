"""Writes a run's held-out rows as a task of lm-eval: its prompts are those that the run was trained with, token for token.

The files are written anew each time and read from nowhere else, since a task's YAML can name code to run. Imports no lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import DataError
from qlora_helpers.base.files import write_json, write_text
from qlora_helpers.data.duplicates import prompt_key
from qlora_helpers.data.examples import Example
from qlora_helpers.data.plain_templates import Template
from qlora_helpers.data.prompts import prompt_text, prompt_tokens
from qlora_helpers.data.rendering import RowProblem
from qlora_helpers.evaluation.metrics.choose import choose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.data.packing import PreparedData

HELD_OUT = "held_out"
CACHE = ".cache"  # of the library that reads the rows, below the task's folder
CHOICES = 4  # answers to choose from, where they are texts


def write_held_out(
    new: Path,
    folder: Path,
    data: PreparedData,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    *,
    encode: Callable[[str], list[int]],
    most_new_tokens: int,
) -> list[str]:
    """Writes `held_out.yaml` and its rows into a folder.

    Where answers are labels, the model chooses among the labels; where they are texts, among the row's own answer and those of
    three other rows, by their likelihood; where they are short, it writes one, which has to be equal.

    Args:
        new: gets the two files.
        folder: where they will be when lm-eval reads them.
        data: the run's; held-out rows that are among its training rows are skipped.
        template: the run's.
        tokenizer: the model's.
        ends: tokens that end an answer.
        encode: lm-eval's way from a prompt to tokens. A row of which it makes other tokens than the run does is skipped.
        most_new_tokens: longest answer, tokens.

    Returns:
        Lines on what was skipped.

    Raises:
        DataError: no row is left.
    """
    rows, notes = _usable_rows(data, template, encode)
    if not rows:
        raise DataError(
            "no held-out row can be asked by lm-eval",
            got="; ".join(notes) or "none are held out",
            next_step="Hold rows out (data.test_rows), or name tasks of lm-eval.",
        )
    docs, kind = _docs([example for example, _ in rows], [text for _, text in rows], data.train_answers)
    stops = [tokenizer.decode([end]) for end in ends]
    write_text(new / "held_out.jsonl", "".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs))
    write_json(new / "held_out.yaml", _task(folder, kind, stops, most_new_tokens))  # JSON is YAML
    return notes


def _usable_rows(
    data: PreparedData, template: Template, encode: Callable[[str], list[int]]
) -> tuple[list[tuple[Example, str]], list[str]]:
    """Returns the held-out rows that can be asked, each with its prompt, and lines on those that are skipped."""
    rows: list[tuple[Example, str]] = []
    trained = unlike = unwritten = 0
    for example in data.test:
        if example.is_document:
            unwritten += 1
        elif prompt_key(example) in data.train_keys:
            trained += 1
        else:
            try:
                text, ids = prompt_text(example, template), prompt_tokens(example, template).ids
            except RowProblem:
                unwritten += 1
                continue
            if encode(text) == ids:
                rows.append((example, text))
            else:
                unlike += 1
    notes = [
        f"{HELD_OUT}: {count} rows {why}"
        for count, why in (
            (trained, "are also in the training set and were skipped"),
            (unlike, "were skipped, since lm-eval makes other tokens of their prompts than the run does"),
            (unwritten, "can't be asked and were skipped"),
        )
        if count
    ]
    return rows, notes


def _docs(examples: Sequence[Example], prompts: Sequence[str], trained: Sequence[str]) -> tuple[list[Any], str]:
    chosen = choose(trained).name
    answers = [example.answer for example in examples]
    if chosen == "labels":
        labels = sorted({*trained, *answers})
        return [
            {"prompt": prompt, "choices": labels, "answer": labels.index(answer)}
            for prompt, answer in zip(prompts, answers, strict=True)
        ], "multiple_choice"
    if chosen == "text" and len(set(answers)) >= CHOICES:
        docs = []
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            others = [each for each in dict.fromkeys(answers[number + 1 :] + answers[:number]) if each != answer]
            place = number % CHOICES
            choices = others[: CHOICES - 1]
            choices.insert(place, answer)
            docs.append({"prompt": prompt, "choices": choices, "answer": place})
        return docs, "multiple_choice"
    return [{"prompt": p, "answer": a.strip()} for p, a in zip(prompts, answers, strict=True)], "generate_until"


def _task(folder: Path, kind: str, stops: Sequence[str], most_new_tokens: int) -> dict[str, Any]:
    task: dict[str, Any] = {
        "task": HELD_OUT,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder.resolve() / "held_out.jsonl")},
            "cache_dir": str(folder.resolve() / CACHE),
        },
        "test_split": "test",
        "output_type": kind,
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
        "metadata": {"version": 1},
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    if kind == "multiple_choice":
        measures = [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}]
        return task | {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metric_list": measures}
    stripped = {"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
    return task | {
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": list(stops), "do_sample": False, "max_gen_toks": most_new_tokens},
        "filter_list": [stripped],
        "metric_list": [{"metric": "exact_match", **mean}],
    }
