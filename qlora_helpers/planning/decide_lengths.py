"""Decides the sequence length and the longest answer of a new run, from its rows' lengths and the model's context.

Imports no torch; reads no file.
"""

from __future__ import annotations

import math
from typing import Any

from qlora_helpers.data.lengths import RowLengths, covering
from qlora_helpers.planning.decided import Decided
from qlora_helpers.planning.step_settings import is_packed

COVERED = 0.99  # of the rows fit whole
# What lengths are rounded up to a multiple of, and up to which length
SMALL_STEP, LARGE_STEP, SMALL_LENGTHS = 64, 128, 512
FEWEST_PACKED = 256  # tokens of a packed sequence, of which shorter rows share one
MOST_FOR_EXAMPLES = 512  # tokens up to which it is longer, so that an untuned model's examples fit beside a question
CPU_MOST = 2048  # tokens of a sequence on a CPU, where time grows with the square of long rows
ASSUMED_CONTEXT = 2048  # of a model whose config.json names none
ANSWER_ROOM, ANSWER_STEP, SHORTEST_ANSWER = 1.25, 8, 16  # room for answers longer than those in the data
DOCUMENT_ANSWER = 80  # tokens
DOCUMENT_MOST = 1024  # tokens of a sequence: longer documents are split
_CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")

SEQUENCE, ANSWER = "data.seq_len_tokens", "evaluation.max_new_tokens"


def decide_lengths(decided: Decided, lengths: RowLengths, shape: dict[str, Any], *, on_cpu: bool) -> None:
    """Decides the sequence length and the longest answer.

    Args:
        decided: the settings so far; gets the decisions.
        lengths: of the training rows.
        shape: the model's `config.json`.
        on_cpu: whether the run will train on a CPU.
    """
    answer, why_answer = _longest_answer(decided, lengths, context_tokens(shape))
    length, why = _sequence_length(decided, lengths, shape, answer, on_cpu=on_cpu)
    if ANSWER in decided.by_hand and answer >= length:
        length, why = rounded(2 * answer), f"room for {ANSWER}, which was set by hand"
    if not lengths.answers:
        answer = min(answer, length // 2)
    if SEQUENCE in decided.by_hand and answer > (most := max(1, decided.value(SEQUENCE) // 2)):
        answer, why_answer = most, f"half of {SEQUENCE}, which was set by hand"
    decided.take_all({SEQUENCE: (length, why), ANSWER: (answer, why_answer)})
    length = decided.value(SEQUENCE)
    if longer := sum(total > length for total in lengths.totals):
        decided.notes.append(
            f"{longer:,} of {counted(lengths)} {'are' if longer > 1 else 'is'} longer than {length:,} tokens: data.long_rows="
            f"{decided.config.data.long_rows} says what happens to them; no answer is ever cut"
        )


def _longest_answer(decided: Decided, lengths: RowLengths, context: int) -> tuple[int, str]:
    if ANSWER in decided.by_hand:
        return decided.value(ANSWER), ""
    if not lengths.answers:
        return DOCUMENT_ANSWER, "documents have no answers to measure"
    covered = covering(lengths.answers, COVERED)
    room = max(SHORTEST_ANSWER, math.ceil(covered * ANSWER_ROOM / ANSWER_STEP) * ANSWER_STEP)
    why = f"{COVERED:.0%} of the answers have at most {covered:,} tokens; a quarter more as room"
    if room > context // 2:
        return context // 2, f"{why}, but no more than half of the model's context of {context:,}"
    return room, why


def _sequence_length(
    decided: Decided, lengths: RowLengths, shape: dict[str, Any], answer: int, *, on_cpu: bool
) -> tuple[int, str]:
    covered, prompt = covering(lengths.totals, COVERED), covering(lengths.prompts, COVERED)
    need = max(covered, prompt + answer if lengths.prompts else 0)
    why = f"{COVERED:.0%} of {counted(lengths)} have at most {covered:,} tokens (longest {lengths.totals[-1]:,})"
    why += f", {need:,} with room for any answer" if need > covered else ""
    length = rounded(need)
    examples = decided.config.evaluation.few_shot * covering(lengths.totals, 0.5) if lengths.prompts else 0
    shared = max(FEWEST_PACKED, min(MOST_FOR_EXAMPLES, rounded(prompt + answer + examples)))
    if length < shared and is_packed(decided.config, shape):
        length, why = shared, f"{why}; rows share a sequence, and examples for the untuned model fit"
    else:
        why += f"; rounded up to a multiple of {_step(need)}"
    if length > (context := context_tokens(shape)):
        length, why = context, f"{why}; limited by the model's context of {context:,}"
    if not lengths.answers and length > DOCUMENT_MOST:
        length, why = DOCUMENT_MOST, f"{why}; {DOCUMENT_MOST:,} are enough, since documents are split"
    if on_cpu and length > CPU_MOST:
        length, why = CPU_MOST, f"{why}; limited to {CPU_MOST:,} on a CPU"
    return length, why


def context_tokens(shape: dict[str, Any]) -> int:
    """Returns how many tokens a model can attend to, by its `config.json`; `ASSUMED_CONTEXT` where that names none."""
    text = shape.get("text_config")
    for config in (shape, text if isinstance(text, dict) else {}):
        for name in _CONTEXTS:
            value = config.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value >= SMALL_STEP:
                return value
    return ASSUMED_CONTEXT


def rounded(tokens: int) -> int:
    """Rounds a length up to a multiple of 64, above 512 of 128."""
    step = _step(tokens)
    return max(step, math.ceil(tokens / step) * step)


def _step(tokens: int) -> int:
    return SMALL_STEP if tokens <= SMALL_LENGTHS else LARGE_STEP


def counted(lengths: RowLengths) -> str:
    """Says which rows were measured."""
    if lengths.measured < lengths.rows:
        return f"a sample of {lengths.measured:,} training rows"
    return f"{lengths.rows:,} training rows"
