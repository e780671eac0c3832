"""Exercises of the primer: a loss and a step, by hand."""

from __future__ import annotations

import math
import random
from typing import Any

from qlora_helpers.teaching.exercise import Exercise, Wrong, call, number_of


def _softmax(scores: list[float]) -> list[float]:
    largest = max(scores)
    parts = [math.exp(score - largest) for score in scores]
    return [part / sum(parts) for part in parts]


def loss(scores, token):
    """The solution of `write_a_loss`."""
    total = sum(math.exp(score) for score in scores)
    return -math.log(math.exp(scores[token]) / total)


def _judge_loss(function: Any) -> str:
    draw = random.Random()
    for _ in range(8):
        scores = [draw.uniform(-3, 3) for _ in range(7)]
        token = draw.randrange(7)
        got = number_of(call(function, list(scores), token), "the loss")
        probability = _softmax(scores)[token]
        known = {
            "probability": probability,
            "sign": math.log(probability),
            "score": -scores[token],
            "base-2": -math.log2(probability),
            "base-10": -math.log10(probability),
            "mean": -math.log(probability) / 7,
        }
        if math.isclose(got, -math.log(probability), rel_tol=1e-4, abs_tol=1e-6):
            continue
        for code, value in known.items():
            if math.isclose(got, value, rel_tol=1e-4, abs_tol=1e-6):
                raise Wrong(code, got=f"{got:.3f}", probability=f"{probability:.3f}")
        right = -math.log(probability)
        raise Wrong(
            message=f"For scores whose right token has probability {probability:.3f}, the loss is {right:.3f}; got {got:.3f}."
        )
    return "Eight drawn sets of scores agree: the loss is minus the logarithm of the right token's probability."


WRITE_A_LOSS = Exercise(
    name="write_a_loss",
    title="The loss of one token",
    kind="write",
    minutes=6,
    question="Write loss(scores, token): a list of scores and the number of the right token become one number.",
    judge=_judge_loss,
    misconceptions={
        "probability": "{got} is the probability of the right token. A loss is small when the model is right: take minus "
        "its logarithm.",
        "sign": "{got} is below zero: a logarithm of a probability always is. The loss is minus that.",
        "score": "You took the score itself. Only the softmax over all scores makes a probability of it.",
        "base-2": "That is the loss in bits (log2). Here and in PyTorch it is the natural logarithm.",
        "base-10": "That is a logarithm to base 10. Here and in PyTorch it is the natural logarithm.",
        "mean": "You divided by the number of tokens in the vocabulary. Only one token is right, so nothing is averaged here.",
    },
    hints=(
        "Two steps: scores become probabilities (softmax), and the right token's probability becomes a loss.",
        "The softmax of a score is math.exp(score) divided by the sum of math.exp over all scores.",
        "A probability of 1 must give a loss of 0, and a small probability a large loss: −ln does both.",
    ),
    solution_is=loss,
)


def step(weight, gradient, learning_rate):
    """The solution of `one_step`."""
    return weight - learning_rate * gradient


def _judge_step(function: Any) -> str:
    draw = random.Random()
    for _ in range(6):
        weight, gradient, rate = (
            draw.uniform(-2, 2),
            draw.uniform(0.5, 3) * draw.choice((-1, 1)),
            draw.uniform(0.01, 0.5),
        )
        got = number_of(call(function, weight, gradient, rate), "the new weight")
        known = {
            "uphill": weight + rate * gradient,
            "no-rate": weight - gradient,
            "sign-alone": weight - math.copysign(rate, gradient),
            "no-weight": -rate * gradient,
        }
        if math.isclose(got, weight - rate * gradient, rel_tol=1e-5, abs_tol=1e-9):
            continue
        for code, value in known.items():
            if math.isclose(got, value, rel_tol=1e-5, abs_tol=1e-9):
                raise Wrong(code)
        raise Wrong(message=f"From weight {weight:.3f} with gradient {gradient:.3f} and rate {rate:.3f} got {got:.3f}.")
    return "Six drawn steps agree: against the gradient, as far as the learning rate says."


ONE_STEP = Exercise(
    name="one_step",
    title="One step downhill",
    kind="write",
    minutes=4,
    question="Write step(weight, gradient, learning_rate), which returns the weight after one step of gradient descent.",
    judge=_judge_step,
    misconceptions={
        "uphill": "That step makes the loss larger: the gradient points to where the loss grows, so go against it.",
        "no-rate": "That takes the whole gradient. The learning rate says how much of it one step takes.",
        "sign-alone": "That takes steps of equal length whatever the slope is. Gradient descent takes longer ones where it "
        "is steep. "
        "(Dividing by the gradient's size is what Adam does, later.)",
        "no-weight": "That is the change alone. The new weight is the old one plus the change.",
    },
    hints=(
        "The gradient says how much the loss grows when the weight grows a little. We want the loss to fall.",
        "The change is minus the learning rate times the gradient.",
    ),
    solution_is=step,
)
