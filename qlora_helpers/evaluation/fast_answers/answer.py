"""Many greedy answers in a short time: what `model.generate` would say, up to rounding, at a multiple of its speed.

Four parts. Weights are unpacked once where memory allows (`weights`). Heads that share keys share them in fact (`attention`).
Slots whose answer has ended take the next prompt (`decoder`, `cache`). On a GPU a step is recorded as a CUDA graph (`graphs`).
Before the first answer the loaded model is asked a few random tokens both ways; where the answers differ, or a part can't run,
`NotFast` says why. Knows nothing of text, settings or scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_helpers.base.units import gib
from qlora_helpers.evaluation.fast_answers.attention import keys_shared
from qlora_helpers.evaluation.fast_answers.decoder import SlotDecoder
from qlora_helpers.evaluation.fast_answers.weights import adapters_in_model_type, dense_bytes, dense_weights
from qlora_helpers.model.host_embedding import restore_embedding
from qlora_helpers.planning.step_settings import SINGLE

__all__ = ["AnswerForm", "NotFast", "answer_fast", "answering_form"]

SAME_LOGITS = 0.1  # largest root mean square difference from the model's own logits, as a share of their spread
MOVING_ROPE = ("dynamic", "longrope")  # its angles depend on the longest row in the batch
PLACES_STEP = 64  # kernels copy masks of uneven lengths
SPARE_SHARE = 0.1  # of the free memory that stays free


class NotFast(Exception):
    """The fast way can't be taken with this model; the message says why."""


@dataclass
class AnswerForm:
    """In which form the model answers.

    Attributes:
        dense: whether 4-bit layers multiply by unpacked copies.
        dense_gib: what the copies take.
        dtype: of the copies and the cache.
        slots: answers that grow at once; None before the first was given.
        graphs: CUDA graphs recorded.
        steps: tokens steps taken, each for all slots.
        reasons: why a part is off.
    """

    dense: bool = False
    dense_gib: float = 0.0
    dtype: str = ""
    slots: int | None = None
    graphs: int = 0
    steps: int = 0
    reasons: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        weights = (
            f"{self.dtype} copies of the 4-bit weights ({self.dense_gib:.2f} GiB)"
            if self.dense
            else "weights as loaded"
        )
        graphs = f", {self.graphs} CUDA graphs" if self.graphs else ""
        slots = "" if self.slots is None else f"{self.slots} answers at once, "
        return "\n".join([f"{slots}{weights}, adapters apart{graphs}", *(f"({reason})" for reason in self.reasons)])

    def note(self, reason: str) -> None:
        """Keeps a reason once."""
        if reason not in self.reasons:
            self.reasons.append(reason)


@contextmanager
def answering_form(
    model: torch.nn.Module, *, rows: int, tokens: int, dense: bool | None = None
) -> Iterator[AnswerForm]:
    """Puts the model into the fastest form that fits while it answers, and leaves it as it was.

    Args:
        model: with or without adapters; nothing is trained while this is open.
        rows: answers at once.
        tokens: of the longest prompt with its answer.
        dense: whether to unpack 4-bit layers; None where memory allows.
    """
    with suppress(torch.OutOfMemoryError):  # an embedding that a failed training left on the host
        restore_embedding(model.get_input_embeddings())
    form = AnswerForm(dtype=str(model.dtype).removeprefix("torch."))
    needed, free = dense_bytes(model), free_bytes(model)
    if needed and dense is None:
        dense = needed + cache_bytes(model, rows, tokens) <= (1 - SPARE_SHARE) * free
        if not dense:
            form.note(f"unpacked weights take {gib(needed):.1f} GiB beside the cache, and {gib(free):.1f} GiB are free")
    with ExitStack() as parts:
        if needed and dense:
            try:
                parts.enter_context(dense_weights(model))
                form.dense, form.dense_gib = True, gib(needed)
            except torch.OutOfMemoryError:  # in pieces too small for one of them, or taken by another process meanwhile
                form.note(f"unpacked weights of {gib(needed):.1f} GiB did not fit after all")
            if not form.dense:
                _empty_cache()
        parts.enter_context(adapters_in_model_type(model))
        parts.enter_context(keys_shared(model))
        yield form


def free_bytes(model: torch.nn.Module) -> int:
    """Memory that is free where the model is: on its fullest GPU, or of the machine."""
    devices = {parameter.device for parameter in model.parameters()}
    if any(device.type == "cpu" for device in devices):
        import psutil

        return psutil.virtual_memory().available
    free = []
    for device in devices:
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free.append(torch.cuda.mem_get_info(device)[0] + unused)
    return min(free) * len(free)  # layers, and with them copies and cache, are spread evenly


def cache_bytes(model: torch.nn.Module, rows: int, tokens: int) -> int:
    """Bytes of keys and values, and of a step's logits."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    copied = getattr(text, "new_decoder_architecture", False) and text._attn_implementation == "eager"
    stored = heads if copied else _kv_heads(text)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return answering_bytes(
        layers=text.num_hidden_layers,
        cached_values=2 * stored * width,
        rows=rows,
        tokens=tokens,
        vocab=text.vocab_size,
        value_bytes=model.dtype.itemsize,
    )


def _kv_heads(text: Any) -> int:
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    return getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or text.num_attention_heads


@torch.no_grad()
def answer_fast(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    pad: int,
    end: int,
    most: int,
    slots: int,
    form: AnswerForm | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[list[int]]:
    """The greedy answer to each prompt as new tokens, in the order given; an answer that ended keeps its end-of-text token.

    Args:
        model: in eval mode, as `answering_form` put it.
        prompts: token ids of each.
        pad, end: the padding and the end-of-text token.
        most: longest answer, tokens.
        slots: answers at once; fewer where memory does not allow them, by arithmetic or as it turns out.
        form: is told how the answers were made.
        progress: told how many prompts were answered.

    Raises:
        NotFast: the model can't be asked this way, or does not give the answers that it gives by itself.
    """
    if not prompts:
        return []
    form = AnswerForm() if form is None else form
    capacity = -(-(max(map(len, prompts)) + most) // PLACES_STEP) * PLACES_STEP
    refusal = _shape_refusal(model, max(map(len, prompts)) + most)
    if refusal is not None:
        raise NotFast(refusal)
    _prove(model, pad)
    slots = min(slots, len(prompts))
    free = (1 - SPARE_SHARE) * free_bytes(model)
    while slots > 1 and cache_bytes(model, slots, capacity) > free:
        slots = -(-slots // 2)
        form.note(f"{slots} answers at once: a cache for more does not fit")
    progress = _once(progress)
    while (answers := _answered(model, prompts, pad, end, most, slots, capacity, form, progress)) is None:
        # What reading prompts takes beside the cache is not counted above. The answers are greedy: they begin anew as they were.
        slots = -(-slots // 2)
        form.note(f"{slots} answers at once: more ran out of memory")
        _empty_cache()
    return answers


def _answered(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    pad: int,
    end: int,
    most: int,
    slots: int,
    capacity: int,
    form: AnswerForm,
    progress: Callable[[int], None],
) -> list[list[int]] | None:
    """The answers, or None where memory ran out and fewer at once may fit; nothing is held then."""
    decoder = SlotDecoder(model, slots=slots, capacity=capacity, graph_refusal=_graph_refusal(model))
    done = 0

    def count(answered: int) -> None:
        nonlocal done
        done += answered
        progress(done)

    try:
        answers = decoder.answer(prompts, pad=pad, end=end, most=most, progress=count)
        form.slots, form.graphs, form.steps = slots, form.graphs + decoder.step.recorded, form.steps + decoder.steps
        if decoder.step.refusal:
            form.note(decoder.step.refusal)
        return answers
    except torch.OutOfMemoryError:
        if slots == 1:
            raise
        return None
    finally:
        decoder.release()


def _once(progress: Callable[[int], Any] | None) -> Callable[[int], None]:
    """Tells of each answer once, also where they begin anew: takes how many there are by now."""
    told = 0

    def tell(done: int) -> None:
        nonlocal told
        if progress is not None and done > told:
            progress(done - told)
        told = max(told, done)

    return tell


def _empty_cache() -> None:
    """Gives memory that PyTorch keeps for later back to the GPU, so that it can be cut anew."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _shape_refusal(model: torch.nn.Module, capacity: int) -> str | None:
    """Why a model's answers depend on more than a mask and positions say, or None."""
    text = model.config.get_text_config()
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if getattr(text, "use_sliding_window", True) and any(window and window < capacity for window in windows):
        return f"the model sees a window of fewer than {capacity} tokens"
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in MOVING_ROPE:
        return "the angles of the model's positions depend on the longest row"
    return None


def _graph_refusal(model: torch.nn.Module) -> str | None:
    devices = {parameter.device for parameter in model.parameters()}
    if any(device.type != "cuda" for device in devices):
        return "no CUDA graph: the model is not on a GPU"
    return None if len(devices) == 1 else "no CUDA graph: the model is spread over several GPUs"


def _prove(model: torch.nn.Module, pad: int) -> None:
    """Two prompts of unlike length grow by two tokens in slots, and must give the logits that the model gives them alone."""
    vocabulary = model.get_input_embeddings().num_embeddings
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, vocabulary, (length,), generator=draw).tolist() for length in (9, 5)]
    decoder = SlotDecoder(model, slots=2, capacity=12, graph_refusal="a proof")
    try:
        decoder.read([0, 1], prompts, pad)
        for length in (10, 11):
            before = decoder.tokens.tolist()
            for row, token in zip(prompts, before, strict=True):
                row.append(token)
            logits = decoder.grow(2, length).float()
        alone = [model(input_ids=torch.tensor([row], device=decoder.device)).logits[0, -1].float() for row in prompts]
    except torch.cuda.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, IndexError, KeyError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise NotFast(f"the model takes no cache of ours ({type(error).__name__}: {reason})") from error
    found, own = logits, torch.stack(alone)
    decoder.release()
    apart = float((found - own).square().mean().sqrt() / own.std())
    if not apart <= SAME_LOGITS:
        raise NotFast(f"answers in slots are not the model's own: their logits differ by {apart:.1%} of their spread")


def answering_bytes(*, layers: int, cached_values: int, rows: int, tokens: int, vocab: int, value_bytes: int) -> int:
    """What answering holds beside the weights: keys and values of every token, and one step's logits, also in 32 bits.

    Args:
        layers: decoder layers.
        cached_values: keys and values that a layer stores for a token.
        rows: answers at once.
        tokens: of the longest prompt with its answer.
        vocab: tokens in the vocabulary.
        value_bytes: of one value.
    """
    return rows * (layers * cached_values * tokens * value_bytes + vocab * (value_bytes + SINGLE))
