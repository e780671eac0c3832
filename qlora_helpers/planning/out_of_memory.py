"""Handles running out of memory: says where it happened and what would fit, and frees all that the failed step held.

An error's traceback keeps the frames it went through, and they keep their tensors: the batch, every activation, the optimizer. In
a notebook IPython keeps the last error too, so the memory stays taken until the kernel is restarted. Here the frames are cleared;
what is raised instead holds nothing. The steps themselves say where they were (`base.place`); only a layer's number is looked up
in the frames. Knows nothing of how a run is trained.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar, cast

from qlora_helpers.base.errors import Interrupted, RunError
from qlora_helpers.base.place import facts_of, places_of
from qlora_helpers.base.units import gib
from qlora_helpers.planning.memory import CONTEXT_BYTES
from qlora_helpers.planning.rescue import Failure, Rescue, find_rescue
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.plan_file import add_to_plan, read_plan

Step = TypeVar("Step", bound=Callable[..., Any])
MESSAGES = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class OutOfMemory(RunError):
    """A step ran out of memory.

    Attributes:
        where: such as `forward of layer 3 of 32`, `loss`, `backward`, `optimizer`, `evaluation`.
        step: optimizer steps done by then; None outside of training.
        candidates: settings that should fit, fastest first.
    """

    def __init__(self, where: str, step: int | None, rescue: Rescue | None = None) -> None:
        rescue = rescue or Rescue()
        self.where, self.step, self.candidates = where, step, rescue.candidates
        ranked = [f"\n  {number}. {each!r}" for number, each in enumerate(rescue.candidates, start=1)]
        next_step = "Memory is free again. "
        if ranked:
            next_step += "Next, fastest first:" + "".join(ranked) + f"\n{rescue.how}"
        if ranked and rescue.other_way:
            next_step += f"\nAnother way: {rescue.other_way}"
        elif not ranked and rescue.fixes:
            next_step += "What would fit: " + "; ".join(rescue.fixes)
        elif not ranked and where.startswith("generation"):
            next_step += "Lower evaluation.batch_size or evaluation.max_new_tokens, and ask again."
        elif not ranked and where.startswith("loading"):
            next_step += (
                "Close what else holds it (notebook 00 shows it), or see what fits with `python -m qlora_helpers plan`."
            )
        elif not ranked:
            next_step += (
                "Lower train.micro_batch_size and raise train.gradient_accumulation_steps by as much, or checkpoint more "
                "layers (train.activation_checkpointing=true, train.checkpointed_layers=none); then workflow.retry(run)."
            )
        at = "" if step is None else f" after {step} steps"
        super().__init__(f"out of memory{at} ({where})", next_step=next_step)


class OutOfMemoryElsewhere(RuntimeError):
    """Another process of the same training ran out of memory; `failure` says where, as it found out itself."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(f"out of memory ({failure.where})")


def rescued(step: Step) -> Step:
    """Makes a step raise `OutOfMemory` and free its memory where it runs out of it; the run is the step's first argument.

    An interrupt becomes `Interrupted`, which a notebook shows as one line.
    """

    @functools.wraps(step)
    def wrapper(run: Run, *args: Any, **kwargs: Any) -> Any:
        try:
            return step(run, *args, **kwargs)
        except Interrupted:
            raise
        except KeyboardInterrupt:
            raise Interrupted(f"{step.__name__} was interrupted; what {run.name} had saved is intact") from None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = failure_of(error)
            release_frames(error)
        # Outside of the handler the new error has no context, and `error` is gone.
        free_memory()
        raise _out_of_memory(run, failure)

    return cast(Step, wrapper)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, is for lack of memory."""
    return any(
        isinstance(each, MemoryError)
        or (isinstance(each, RuntimeError) and any(message in str(each) for message in MESSAGES))
        for each in _chain(error)
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and each not in found:
            found.append(each)
            waiting += [each.__cause__, each.__context__]
    return found


def _frames(error: BaseException) -> list[FrameType]:
    """Returns the frames of an error and of those that caused it, outermost first."""
    return [frame for each in _chain(error) for frame, _ in traceback.walk_tb(each.__traceback__)]


def release_frames(error: BaseException) -> None:
    """Clears the frames of an error and of those that caused it, and cuts the chain, so that they keep nothing alive."""
    for each in _chain(error):
        if each.__traceback__ is not None:
            traceback.clear_frames(each.__traceback__)
        each.__traceback__ = each.__cause__ = each.__context__ = None


def free_memory() -> None:
    """Frees the last error that Python and IPython keep, what only cycles hold, and PyTorch's caches."""
    for name in ("last_exc", "last_value"):
        kept = getattr(sys, name, None)
        if isinstance(kept, BaseException) and is_out_of_memory(kept):
            release_frames(kept)
            sys.last_traceback = None
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # compiled layers and the buffers that inductor keeps for them
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # an error of the device would be raised here again
            torch.cuda.synchronize()
        torch.cuda.empty_cache()


def failure_of(error: BaseException) -> Failure:
    """Where an error happened and what the steps noted on it; of a chain of errors, the first one counts most."""
    chain = _chain(error)[::-1]
    for each in chain:
        if isinstance(each, OutOfMemoryElsewhere):
            return each.failure
    places = [place for each in chain for place in places_of(each)]
    facts: dict[str, Any] = {}
    for each in chain:
        facts = facts_of(each) | facts
    frames = _frames(error)
    where = _where(places, _layer(frames)) or f"in {frames[-1].f_code.co_name}"
    return Failure(where, **facts | {"usable_gib": _usable_gib()})


def _where(places: list[str], layer: str) -> str:
    """The places in words, outermost first.

    Args:
        places: the innermost first.
        layer: such as `layer 3 of 32`, of the forward pass that failed; empty outside of layers.
    """
    words = list(dict.fromkeys(reversed(places)))
    if layer and words[-1:] == ["backward"]:
        words.append(f"recomputation of {layer}")  # no other forward pass runs inside a backward pass
    elif layer:
        words.append(f"forward of {layer}")
    if len(words) > 1 and "forward" in words:
        words.remove("forward")
    return ", ".join(words)


def _layer(frames: list[FrameType]) -> str:
    """The innermost decoder layer that a frame belongs to, with its number (from 1); empty where none is."""
    owners = [frame.f_locals.get("self") for frame in frames]
    numbers = next(filter(None, map(_layer_numbers, owners)), {})
    inside = [numbers[id(owner)] for owner in owners if id(owner) in numbers]
    return f"layer {inside[-1]} of {len(numbers)}" if inside else ""


def _layer_numbers(owner: Any) -> dict[int, int]:
    """Each decoder layer's number by its identity, for a model or what has one as its `model`; empty for anything else."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    model = owner if isinstance(owner, torch.nn.Module) else getattr(owner, "__dict__", {}).get("model")
    if not isinstance(model, torch.nn.Module):
        return {}
    lists = [list(each) for each in model.modules() if isinstance(each, torch.nn.ModuleList)]
    longest = max(lists, key=len, default=[])
    return {id(layer): number for number, layer in enumerate(longest, start=1)}


def record_elsewhere(run: Run, error: Exception) -> None:
    """Records in a run's status and plan why another process failed, where this one can't raise the error."""
    with contextlib.suppress(RunError):
        run.set_status(state="failed", exit_reason="an error", last_error=str(error)[:2000])
    if isinstance(error, OutOfMemoryElsewhere):
        _out_of_memory(run, error.failure)


def _out_of_memory(run: Run, failure: Failure) -> OutOfMemory:
    """Returns the error for the reader, and stores what it says in the run's `plan.json` and status."""
    training = failure.step is not None or failure.where.startswith("check before training")
    rescue = find_rescue(run.config(), failure) if training and run.exists() else Rescue()
    error = OutOfMemory(failure.where, failure.step, rescue)
    if (
        os.environ.get("RANK", "0") != "0"
    ):  # of several processes the first one writes, which every failure is propagated to
        return error
    with contextlib.suppress(RunError):  # a full disk must not hide this
        ranked = [each.settings for each in rescue.candidates]
        limits = {"most_gib": rescue.most_gib, "card_gib": rescue.card_gib}
        known = limits if rescue.most_gib is not None else {}
        add_to_plan(run, out_of_memory={"where": failure.where, "step": failure.step, "next": ranked} | known)
        if run.status().state == "failed":
            run.set_status(exit_reason="out of memory", last_error=f"OutOfMemory: {error}"[:2000])
    return error


def _usable_gib() -> float | None:
    """Returns what is free for this process or its own already, GiB, its context included, on its fullest GPU; None on a CPU."""
    torch = sys.modules.get("torch")
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    mine = [torch.cuda.current_device()]  # of several processes each has one card, and the others hold theirs
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        mine = list(range(torch.cuda.device_count()))
    try:
        free = min(torch.cuda.mem_get_info(index)[0] + torch.cuda.memory_reserved(index) for index in mine)
    except RuntimeError:  # an error of the device
        return None
    return gib(free + CONTEXT_BYTES)


def next_settings(run: Run) -> list[str]:
    """Returns the fastest settings that should fit after the run was last out of memory, as `--set` takes them, or none.

    The sequence length is not one of them: the prepared data have theirs.

    Raises:
        RunError: they are for several processes, and this is none of these.
    """
    failure = read_plan(run).out_of_memory
    ranked = failure.next if failure else ()
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if ranked and alone and any(setting.startswith("train.share=") for setting in ranked[0]):
        raise RunError(
            f"{run.name!r} ran out of memory in several processes, and what would fit is for these",
            next_step="Go on with ql.start(run), or `qlora launch` in a terminal.",
        )
    return [setting for setting in ranked[0] if setting.startswith("train.")] if ranked else []
