"""Exercises of notebook 05: clip gradients, stop in time, and find where to go on after an explosion."""

from __future__ import annotations

import random
from typing import Any

from qlora_helpers.teaching.exercise import Exercise, Wrong, call


def clipped(gradients, max_norm):
    """The solution of `clip_gradients`."""
    norm = sum(float((gradient**2).sum()) for gradient in gradients) ** 0.5
    factor = min(1.0, max_norm / norm)
    return [gradient * factor for gradient in gradients]


def _judge_clip(function: Any) -> str:
    import torch

    for size in (0.001, 3.0, 0.5, 40.0):
        gradients = [torch.randn(4, 3) * size, torch.randn(6) * 3 * size]
        total = torch.sqrt(sum((each**2).sum() for each in gradients))
        weights = [torch.nn.Parameter(torch.zeros_like(each)) for each in gradients]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        right = [weight.grad for weight in weights]
        got = call(function, [each.clone() for each in gradients], 1.0)
        if (
            not isinstance(got, list | tuple)
            or len(got) != 2
            or any(a.shape != b.shape for a, b in zip(got, right, strict=True))
        ):
            raise Wrong(message="Return a list with as many tensors, of the same shapes.")
        known = {
            "always-scales": [each / total for each in gradients],
            "each-value": [each.clamp(-1, 1) for each in gradients],
            "each-tensor": [each * min(1.0, 1 / float(each.norm())) for each in gradients],
            "sum": [each * min(1.0, 1 / float(sum(part.abs().sum() for part in gradients))) for each in gradients],
            "no-root": [each * min(1.0, 1 / float(total**2)) for each in gradients],
            "never": gradients,
        }
        if _alike(got, right):
            continue
        for code, value in known.items():
            if _alike(got, value):
                raise Wrong(code)
        raise Wrong(
            message=f"Gradients with the norm {float(total):.3g} became "
            f"{float(torch.cat([x.flatten() for x in got]).norm()):.3g}."
        )
    return "Four drawn sets agree with PyTorch: small gradients stay, and large ones keep their direction."


def _alike(one: Any, other: Any) -> bool:
    import torch

    return all(torch.allclose(a.float(), b, rtol=1e-3, atol=1e-9) for a, b in zip(one, other, strict=True))


CLIP_GRADIENTS = Exercise(
    name="clip_gradients",
    title="Clip gradients",
    kind="write",
    minutes=7,
    question="Write clipped(gradients, max_norm): a list of tensors comes back, scaled where their common norm is above "
    "max_norm.",
    judge=_judge_clip,
    misconceptions={
        "always-scales": "You also scale gradients that are small: near the end of a training every step would be as long "
        "as at its start.",
        "each-value": "You cut each number. That changes the direction of the step; clipping by norm only shortens it.",
        "each-tensor": "You clip each tensor by itself. The norm is that of all gradients together, so that their "
        "proportions stay.",
        "sum": "You took the sum of absolute values. The norm is the root of the sum of squares.",
        "no-root": "You forgot the square root.",
        "never": "These gradients were not changed, though their norm is above max_norm.",
    },
    hints=(
        "The norm of all tensors together: the square root of the sum of all squares.",
        "One factor for all: min(1, max_norm / norm).",
    ),
    solution_is=clipped,
)


def stop(losses, patience):
    """The solution of `stop_in_time`."""
    best = 0
    for place, loss in enumerate(losses):
        if loss < losses[best]:
            best = place
        elif place - best >= patience:
            return place, best
    return len(losses) - 1, best


def _judge_stop(function: Any) -> str:
    draw = random.Random()
    for number in range(12):
        patience, low = draw.choice((2, 3)), draw.randrange(2, 6)
        losses = [3.0 - 0.3 * place for place in range(low + 1)]
        if low > 2:
            losses[low - 2] = losses[low - 1] + 0.05 + 0.3  # a rise that does not last
        rising = number % 3 != 0
        losses += [losses[low] + 0.1 * place for place in range(1, patience + 3)] if rising else []
        right = stop(losses, patience)
        got = call(function, list(losses), patience)
        if not isinstance(got, tuple | list) or len(got) != 2:
            raise Wrong(message="Return two numbers: the evaluation at which training stops, and the best one.")
        got = tuple(int(each) for each in got)
        if got == right:
            continue
        rise = next((place for place in range(1, len(losses)) if losses[place] > losses[place - 1]), len(losses) - 1)
        if got[1] == got[0] != right[1]:
            raise Wrong("keeps-the-last", losses=_text(losses))
        if got[0] == len(losses) - 1 != right[0]:
            raise Wrong("never-stops")
        if got[0] == rise != right[0]:
            raise Wrong("first-rise", losses=_text(losses), patience=patience)
        if got[0] == right[0] + 1:
            raise Wrong("one-late", losses=_text(losses), patience=patience)
        raise Wrong(message=f"For {_text(losses)} and patience {patience} expected {right}; got {got}.")
    return "Twelve drawn curves agree: it stops when the best is `patience` evaluations old, and keeps the best."


def _text(losses: list[float]) -> str:
    return "[" + ", ".join(f"{loss:.2f}" for loss in losses) + "]"


STOP_IN_TIME = Exercise(
    name="stop_in_time",
    title="Stop in time",
    kind="write",
    minutes=8,
    question="Write stop(losses, patience): of evaluation losses, return where training stops (the best is `patience` "
    "evaluations old, or "
    "the list ends) and where the best one is, both counted from 0.",
    judge=_judge_stop,
    misconceptions={
        "keeps-the-last": "For {losses} you keep the adapter of the last evaluation. The best one is earlier, and is what "
        "is kept.",
        "never-stops": "You go on to the end though the best is long ago: this is overfitting, and it costs time and money.",
        "first-rise": "For {losses} you stop at the first rise. Losses jitter: wait for `patience` ({patience}) "
        "evaluations without a better "
        "one.",
        "one-late": "For {losses} and patience {patience} you stop one evaluation late.",
    },
    hints=(
        "Go through the losses and remember the place of the lowest one so far.",
        "Stop at the first place where place - best >= patience.",
    ),
    solution_is=stop,
)


def last_healthy(norms, saved):
    """The solution of `go_back`."""
    jump = next(step for step, norm in enumerate(norms, start=1) if norm > 10 * norms[0])
    return max((step for step in saved if step + 1 < jump), default=0)


def _judge_go_back(function: Any) -> str:
    draw = random.Random()
    for number in range(9):
        every = draw.choice((2, 3))
        jump = draw.randrange(2, every + 1) if number % 3 == 2 else every * draw.randrange(2, 5) + 1 + number % 3 % 2
        norms = [draw.uniform(1, 2) for _ in range(jump - 1)]
        norms += [norms[0] * 50 * 8**place for place in range(2 * every)]
        saved = list(range(every, len(norms) + 1, every))
        right = last_healthy(norms, saved)
        got = call(function, list(norms), list(saved))
        if got == right:
            continue
        before = max((step for step in saved if step < jump), default=0)
        facts = {"jump": jump, "saved": ", ".join(map(str, saved)), "right": right}
        if got == saved[-1]:
            raise Wrong("newest", **facts)
        if right == 0 and got in saved:
            raise Wrong("never-starts-over", **facts)
        if got == before:
            raise Wrong("one-late", **facts)
        if got == 0:
            raise Wrong("always-starts-over", **facts)
        raise Wrong(message="The norm jumps in step {jump}; saved were {saved}: expected {right}.".format(**facts))
    return "Nine drawn runs agree. A checkpoint can be finite and spoilt: look at the norms before you go on from it."


GO_BACK = Exercise(
    name="go_back",
    title="Where to go on after an explosion",
    kind="write",
    minutes=7,
    question="Write last_healthy(norms, saved): gradient norms of steps 1, 2, … and the steps of the checkpoints become the newest "
    "checkpoint whose own gradient is still at most ten times the first norm, or 0 to start over.",
    judge=_judge_go_back,
    misconceptions={
        "newest": "The newest checkpoint is finite, and yet spoilt: the norm had already jumped in step {jump}. From there "
        "the training can fail again even at a low learning rate.",
        "one-late": "The norm of step {jump} is that of the weights with which the step began, and these were saved after the "
        "step before. So of {saved} the answer is {right}.",
        "never-starts-over": "The norm jumps in step {jump}, before any checkpoint of {saved} can be healthy: start over.",
        "always-starts-over": "Starting over wastes healthy steps: the norm jumps in step {jump} only, so {right} is healthy.",
    },
    hints=(
        "In which step is the norm first above ten times the first one?",
        "The checkpoint of step k holds the weights whose gradient step k + 1 measures.",
        "With the jump in step j, the newest saved step with step + 1 < j; max(..., default=0).",
    ),
    solution_is=last_healthy,
)
