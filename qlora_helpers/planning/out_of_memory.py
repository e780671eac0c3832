"""Out of memory: says where it happened and what would fit, and lets go of all that the failed step held.

An error's traceback keeps the frames it went through, and they keep their tensors: the batch, every activation, the optimizer. In
a notebook IPython keeps the last error too, so the memory stays taken until the kernel is restarted. Here the frames are read,
cleared and left behind; what is raised in their place holds nothing. Knows nothing of how a run is trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.files import read_json
from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import Hardware
from qlora_helpers.model.shapes.lookup import find_shape
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.planning import run_plan
from qlora_helpers.planning.candidates import Candidate
from qlora_helpers.planning.memory import CONTEXT_BYTES
from qlora_helpers.runs.folder import Run, add_to_plan

Step = TypeVar("Step", bound=Callable[..., Any])
SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
LESS = (
    0.9  # of what the failed settings should have held: the next ones must differ by more than the prediction's error
)


class OutOfMemory(RunError):
    """A step that did not fit.

    Attributes:
        where: such as `forward of layer 3 of 32`, `loss`, `backward`, `optimizer`, `evaluation`.
        step: optimizer steps that were done by then; None outside of training.
        candidates: settings that should fit, fastest first.
    """

    def __init__(self, where: str, step: int | None, candidates: tuple[Candidate, ...], fixes: tuple[str, ...]) -> None:
        self.where, self.step, self.candidates = where, step, candidates
        ranked = [f"\n  {number}. {each!r}" for number, each in enumerate(candidates, start=1)]
        next_step = "Memory is free again. "
        if ranked:
            next_step += "Next, fastest first:" + "".join(ranked)
            next_step += "\nworkflow.retry(run) goes on from the last checkpoint with the first of them."
        elif fixes:
            next_step += "What would fit: " + "; ".join(fixes)
        elif where.startswith("generation"):
            next_step += "Lower evaluation.batch_size or evaluation.max_new_tokens, and ask again."
        elif where.startswith("loading"):
            next_step += (
                "Close what else holds it (notebook 00 shows it), or see `python -m qlora_helpers plan` for what fits."
            )
        else:
            next_step += (
                "Lower train.micro_batch_size and raise train.gradient_accumulation_steps by as much, or recompute more "
                "layers (train.activation_checkpointing=true, train.checkpointed_layers=none); then workflow.retry(run)."
            )
        at = "" if step is None else f" after {step} steps"
        super().__init__(f"out of memory{at} ({where})", next_step=next_step)


@dataclass(frozen=True)
class Failure:
    """What the frames of an error told before they were cleared.

    Attributes:
        where: the part of the step.
        step: optimizer steps done.
        checkpointed, compiled: of the decoder layers; None where no training was open.
    """

    where: str
    step: int | None = None
    checkpointed: int | None = None
    compiled: bool = False


def rescued(step: Step) -> Step:
    """A step on a run that, where it runs out of memory, raises `OutOfMemory` and holds nothing. The run is its first argument."""

    @functools.wraps(step)
    def wrapper(run: Run, *args: Any, **kwargs: Any) -> Any:
        try:
            return step(run, *args, **kwargs)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = read_frames(error)
            release_frames(error)
        # Outside of the handler, so that the new error has no context, and `error` is gone.
        free_memory()
        told = _told(run, failure)
        raise told

    return wrapper


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is for want of memory."""
    return any(
        isinstance(each, MemoryError) or (isinstance(each, RuntimeError) and any(sign in str(each) for sign in SIGNS))
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
    """The frames of the error at the bottom of the chain, outermost first."""
    return [frame for each in _chain(error) for frame, _ in traceback.walk_tb(each.__traceback__)]


def release_frames(error: BaseException) -> None:
    """Clears the frames of an error and of those it came from, and cuts the chain: nothing hangs on them any more."""
    for each in _chain(error):
        if each.__traceback__ is not None:
            traceback.clear_frames(each.__traceback__)
        each.__traceback__ = each.__cause__ = each.__context__ = None


def free_memory() -> None:
    """Lets go of the last error that Python and IPython keep, of what only cycles hold, and of PyTorch's caches."""
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
        torch._dynamo.reset()  # compiled layers, with the buffers that inductor keeps for them
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # an error of the device itself would come up here again
            torch.cuda.synchronize()
        torch.cuda.empty_cache()


# where


def read_frames(error: BaseException) -> Failure:
    """Where an error happened, by the frames it went through: by their functions' names and the modules they belong to."""
    frames = _frames(error)
    layers = _layer_numbers(frames)
    total = len(layers)
    names = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame in frames]
    modules = [frame.f_locals.get("self") for frame in frames]
    backward = next((i for i, name in enumerate(names) if name[1] == "backward" and "torch" in name[0]), None)
    seen = [(i, layers[id(module)]) for i, module in enumerate(modules) if id(module) in layers]
    layer = f"layer {seen[-1][1]} of {total}" if seen else ""
    if any(name == "qlora_helpers.training.probes" for name, _ in names):
        where = f"check before training, forward of {layer}" if layer else "check before training"
    elif any(name in ("qlora_helpers.evaluation.evaluate", "qlora_helpers.evaluation.generate") for name, _ in names):
        where = f"generation, forward of {layer}" if layer else "generation"
    elif any(function == "evaluation_loop" for _, function in names):
        where = f"evaluation, forward of {layer}" if layer else "evaluation"
    elif backward is not None:
        again = seen and seen[-1][0] > backward
        where = f"backward, {layer} recomputed" if again else "backward"
    elif any(name == "accelerate.optimizer" and function == "step" for name, function in names):
        where = "optimizer"
    elif any("clip_grad_norm" in function for _, function in names):
        where = "clipping of the gradients"
    elif layer:
        where = f"forward of {layer}"
    elif any(name.endswith("fast_step.loss") or "loss" in name.rsplit(".", 1)[-1] for name, _ in names):
        where = "loss"
    elif any(name == "qlora_helpers.model.loading" for name, _ in names):
        where = "loading of the model"
    else:
        where = f"in {names[-1][1]}" if names else "unknown place"
    return Failure(where, *_trainer_facts(frames))


def _layer_numbers(frames: list[FrameType]) -> dict[int, int]:
    """Each decoder layer's number (from 1) by its identity, in the first model that a frame names."""
    torch = sys.modules.get("torch")
    for frame in frames if torch else []:
        for name in ("model", "self"):
            found = frame.f_locals.get(name)
            if isinstance(found, torch.nn.Module):
                lists = [list(each) for each in found.modules() if isinstance(each, torch.nn.ModuleList)]
                return {id(layer): number for number, layer in enumerate(max(lists, key=len, default=[]), start=1)}
    return {}


def _trainer_facts(frames: list[FrameType]) -> tuple[int | None, int | None, bool]:
    for frame in frames:
        trainer = frame.f_locals.get("trainer") or frame.f_locals.get("self")
        if hasattr(trainer, "fast") and hasattr(trainer, "state"):
            fast = trainer.fast
            return (
                trainer.state.global_step,
                getattr(fast, "checkpointed", None),
                bool(getattr(fast, "compiled", False)),
            )
    return None, None, False


# what next


def _told(run: Run, failure: Failure) -> OutOfMemory:
    """The error for the reader; the run's `plan.json` and status keep what it says."""
    training = failure.step is not None or failure.where.startswith("check before training")
    candidates, fixes = _next_settings(run.config(), failure) if training and run.exists() else ((), ())
    told = OutOfMemory(failure.where, failure.step, candidates, fixes)
    with contextlib.suppress(RunError):  # a full disk must not hide this
        record = {"where": failure.where, "step": failure.step, "next": [each.settings for each in candidates]}
        add_to_plan(run, out_of_memory=record)
        if run.status().state == "failed":
            run.set_status(exit_reason="out of memory", last_error=f"OutOfMemory: {told}"[:2000])
    return told


def _next_settings(config: RunConfig, failure: Failure) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
    """Settings that should fit where these did not, fastest first; where none do, what would."""
    try:
        hardware = run_plan.this_machine()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # each process has a GPU and the whole model
            hardware = dataclasses.replace(hardware, gpus=1)
        checkpointed = failure.checkpointed
        if checkpointed is None:
            layers = model_sizes(find_shape(config.model)).layers
            checkpointed = layers if config.train.activation_checkpointing else 0
        held = run_plan.predicted_step(
            config,
            hardware=hardware,
            compiled=failure.compiled,
            checkpointed=checkpointed,
            trained_share=run_plan.trained_share(config.data),
        )["reserved_gib"]
        smaller = min(_usable_gib(hardware), LESS * max(held.values()) + gib(CONTEXT_BYTES))
        smaller_cards = dataclasses.replace(hardware, usable_gib=smaller)
        plan = run_plan.plan_run(config, hardware=smaller_cards, one_process=True)
    except UserError:  # no GPU, or a shape that can't be planned
        return (), ()
    return (plan.choice, *plan.alternatives) if plan.choice else (), plan.fixes


def _usable_gib(hardware: Hardware) -> float:
    """What is really there now, our context included: other processes may hold a part of the card."""
    torch = sys.modules.get("torch")
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return hardware.usable_gib
    free = min(
        torch.cuda.mem_get_info(index)[0] + torch.cuda.memory_reserved(index)
        for index in range(torch.cuda.device_count())
    )
    return min(hardware.usable_gib, gib(free + CONTEXT_BYTES))


def next_settings(run: Run) -> list[str]:
    """The fastest settings that should fit after the run was last out of memory, as `--set` takes them; none where none are known.

    The block length is left out: prepared data have theirs.
    """
    plan = read_json(run.plan_path) if run.plan_path.exists() else {}
    ranked = plan.get("out_of_memory", {}).get("next") or [[]]
    return [setting for setting in ranked[0] if setting.startswith("train.")]
