"""An exercise of notebook 07: choose a machine by what the whole training costs."""

from __future__ import annotations

import random
from typing import Any

from qlora_helpers.teaching.exercise import Exercise, Wrong, call


def cheapest(machines, tokens, most_hours):
    """The solution of `cheapest_machine`."""
    hours = {name: tokens / speed / 3600 for name, price, speed in machines}
    in_time = [(price * hours[name], name) for name, price, speed in machines if hours[name] <= most_hours]
    return min(in_time)[1] if in_time else "none"


def _judge_cheapest(function: Any) -> str:
    draw = random.Random()
    tokens = 3_000_000
    for number in range(8):
        machines = [
            ("small", 1.0 * draw.uniform(0.9, 1.1), 300.0),  # cheap an hour, dear a token, and late
            ("medium", 7.0 * draw.uniform(0.9, 1.1), 3200.0),
            ("bargain", 2.0 * draw.uniform(0.9, 1.1), 1200.0),  # the cheapest a token
            ("large", 60.0 * draw.uniform(0.9, 1.1), 20000.0),
        ]
        draw.shuffle(machines)
        most_hours = (0.5, 1.0, 0.01, 1.0)[number % 4]
        right = cheapest(machines, tokens, most_hours)
        got = call(function, list(machines), tokens, most_hours)
        if got == right:
            continue
        if right == "none":
            raise Wrong("deadline")
        if got == min(machines, key=lambda each: each[1])[0]:
            raise Wrong("price-an-hour", right=right)
        if got == max(machines, key=lambda each: each[2])[0]:
            raise Wrong("fastest", right=right)
        if got == min(machines, key=lambda each: each[1] / each[2])[0]:
            raise Wrong("deadline")
        raise Wrong(message=f"With at most {most_hours} hours the cheapest is {right!r}; got {got!r}.")
    return "Eight drawn offers agree: dollars are the price an hour times the hours that it takes, among those that are in time."


CHEAPEST_MACHINE = Exercise(
    name="cheapest_machine",
    title="The cheapest machine",
    kind="judge",
    minutes=8,
    question="Write cheapest(machines, tokens, most_hours): of (name, dollars an hour, tokens a second), return the name "
    "of the one that "
    'trains the tokens for the least money within the hours, or "none".',
    judge=_judge_cheapest,
    misconceptions={
        "price-an-hour": "That machine costs least an hour and takes longest: {right} costs less in the end.",
        "fastest": "That is the fastest one. {right} is in time as well, for less money.",
        "deadline": 'That one is the cheapest of all and ends too late; where none is in time, the answer is "none".',
    },
    hints=(
        "Hours = tokens / (tokens a second) / 3600; dollars = hours · dollars an hour.",
        "First leave out what takes longer than most_hours, then take the least dollars.",
    ),
    solution_is=cheapest,
)
