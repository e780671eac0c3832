"""Many greedy answers in a short time: those of `model.generate`, up to rounding, several times as fast.

Weights are unpacked once where memory allows (`form`, `weights`). Query heads that share keys attend without copies of them
(`attention`). Slots whose answer has ended take the next prompt (`decoder`, `cache`). On a GPU a step is captured as a CUDA graph
(`graphs`). Before the first answer the loaded model is asked a few random tokens both ways; where the answers differ, or a part
can't run, `NotFast` says why. Knows nothing of text, settings or scores.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from qlora_helpers.evaluation.fast_answers import memory
from qlora_helpers.evaluation.fast_answers.decoder import NotFast, Questions, SlotDecoder, unusable_cache_explained
from qlora_helpers.evaluation.fast_answers.form import AnswerForm, answering_form
from qlora_helpers.model.sharding import is_sharded
from qlora_helpers.model.wiring import windows_of

__all__ = ["AnswerForm", "NotFast", "answer_fast", "answering_form"]

SAME_LOGITS = 0.1  # largest root mean square difference from the model's own logits, as a share of their spread
MOVING_ROPE = ("dynamic", "longrope")  # its angles depend on the longest row in the batch
CAPACITY_STEP = 64  # kernels copy masks of uneven lengths


@torch.no_grad()
def answer_fast(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    pad: int,
    end: int | Collection[int],
    most: int,
    slots: int,
    form: AnswerForm | None = None,
    progress: Callable[[int], Any] | None = None,
    given: Callable[[int, list[int]], None] = lambda index, tokens: None,
) -> list[list[int]]:
    """Returns the greedy answer to each prompt as new tokens, in the order given, with the token that ended it.

    Args:
        model: in eval mode, as `answering_form` put it.
        prompts: token ids of each.
        pad: the padding token.
        end: the token, or the tokens, that end an answer.
        most: longest answer, tokens.
        slots: answers at once; fewer are taken where memory does not allow as many.
        form: gets a record of how the answers were made.
        progress: called with how many more prompts were answered.
        given: called with a prompt's place and its answer as soon as that has ended; again with the same where memory ran out.

    Raises:
        NotFast: the model can't be asked this way, or does not give the answers that it gives by itself.
    """
    if not prompts:
        return []
    questions = Questions(prompts, pad, frozenset((end,) if isinstance(end, int) else end), most)
    form = AnswerForm() if form is None else form
    refusal = _shape_refusal(model, questions.longest)
    if refusal is not None:
        raise NotFast(refusal)
    _prove(model, pad)
    capacity = -(-questions.longest // CAPACITY_STEP) * CAPACITY_STEP
    slots = _slots_that_fit(model, min(slots, len(prompts)), capacity, form)
    progress = _each_prompt_once(progress)
    while (answers := _answers_in_slots(model, questions, slots, capacity, form, progress, given)) is None:
        # Reading prompts takes memory beside the cache, which is not counted. Greedy answers are the same when begun again.
        slots = _half(slots)
        form.note(f"{slots} answers at once: more ran out of memory")
        memory.empty_cache()
    return answers


def _slots_that_fit(model: torch.nn.Module, slots: int, capacity: int, form: AnswerForm) -> int:
    usable = memory.usable_bytes(model)
    while slots > 1 and memory.cache_bytes(model, slots, capacity) > usable:
        slots = _half(slots)
        form.note(f"{slots} answers at once: a cache for more does not fit")
    return slots


def _half(slots: int) -> int:
    return -(-slots // 2)


def _answers_in_slots(
    model: torch.nn.Module,
    questions: Questions,
    slots: int,
    capacity: int,
    form: AnswerForm,
    progress: Callable[[int], None],
    given: Callable[[int, list[int]], None],
) -> list[list[int]] | None:
    """Returns the answers, or None where memory ran out and fewer at once may fit; then no memory is held any more."""
    decoder = SlotDecoder(model, slots=slots, capacity=capacity, graph_refusal=_graph_refusal(model))
    try:
        answers = decoder.answer(questions, progress=progress, given=given)
        form.slots, form.graphs, form.steps = slots, form.graphs + decoder.step.captured, form.steps + decoder.steps
        if decoder.step.refusal:
            form.note(decoder.step.refusal)
        return answers
    except torch.OutOfMemoryError:
        if slots == 1 or decoder.sharded:  # the other processes would go on with as many
            raise
        return None
    finally:
        decoder.release()


def _each_prompt_once(progress: Callable[[int], Any] | None) -> Callable[[int], None]:
    """Turns the number of prompts answered so far, which starts again when answers do, into how many more were answered."""
    reported = 0

    def report(answered: int) -> None:
        nonlocal reported
        if progress is not None and answered > reported:
            progress(answered - reported)
        reported = max(reported, answered)

    return report


def _shape_refusal(model: torch.nn.Module, longest: int) -> str | None:
    """Why a model's answers depend on more than mask and positions say, or None."""
    text = model.config.get_text_config()
    if getattr(text, "use_sliding_window", True) and any(tokens < longest for _, tokens in windows_of(text)):
        return f"the model sees a window of fewer than {longest} tokens"
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in MOVING_ROPE:
        return "the angles of the model's positions depend on the longest row"
    return None


def _graph_refusal(model: torch.nn.Module) -> str | None:
    devices = {parameter.device for parameter in model.parameters()}
    if is_sharded(model):
        return "no CUDA graph: layers are gathered from several processes"
    if any(device.type != "cuda" for device in devices):
        return "no CUDA graph: the model is not on a GPU"
    return None if len(devices) == 1 else "no CUDA graph: the model is spread over several GPUs"


def _prove(model: torch.nn.Module, pad: int) -> None:
    """Grows two prompts of different length by two tokens in slots, and compares their logits with the model's own.

    Raises:
        NotFast: they differ, or the model can't run this way.
    """
    with unusable_cache_explained():
        found, own = _logits_both_ways(model, pad)
    apart = float((found - own).square().mean().sqrt() / own.std())
    if not apart <= SAME_LOGITS:
        raise NotFast(f"answers in slots are not the model's own: their logits differ by {apart:.1%} of their spread")


def _logits_both_ways(model: torch.nn.Module, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits after two tokens in slots, and those of the model asked for each row alone, `(2, vocabulary)` each."""
    vocabulary = model.get_input_embeddings().num_embeddings
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, vocabulary, (length,), generator=draw).tolist() for length in (9, 5)]
    decoder = SlotDecoder(model, slots=2, capacity=12, graph_refusal="a proof")
    try:
        decoder.read([0, 1], rows, pad)
        for length in (10, 11):
            for row, token in zip(rows, decoder.tokens.tolist(), strict=True):
                row.append(token)
            logits = decoder.grow(2, length).float()
        alone = [model(input_ids=torch.tensor([row], device=decoder.device)).logits[0, -1].float() for row in rows]
    finally:
        decoder.release()
    return logits, torch.stack(alone)
