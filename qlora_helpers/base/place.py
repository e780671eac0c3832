"""Where a run is: `at("backward")` around a step, so that an error says which step it came from.

An error takes the place along: every `at` that it leaves adds its own, the innermost first. So no state is kept while all is
well, and it does not matter which thread raised: autograd hands an error of its own threads on as the same object. Entering costs
an object; it is set around steps and never inside a compiled layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any

_PLACES, _FACTS = "qlora_places", "qlora_facts"


class at(ContextDecorator):
    """Around a step, in a `with` statement or as a decorator: names the place of an error that comes from it.

    Args:
        place: such as `backward`; empty where only facts are added.
        facts: called when an error passes; plain values that the error shall keep, by name.
    """

    def __init__(self, place: str = "", *, facts: Callable[[], dict[str, Any]] = dict) -> None:
        self.place, self.facts = place, facts

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            return
        kept = vars(error)
        if self.place:
            kept.setdefault(_PLACES, []).append(self.place)
        kept[_FACTS] = self.facts() | kept.get(_FACTS, {})


def places_of(error: BaseException) -> list[str]:
    """The places that an error has left so far, the innermost first."""
    return vars(error).get(_PLACES, [])


def facts_of(error: BaseException) -> dict[str, Any]:
    """What the steps noted on an error; of one name, the innermost value."""
    return vars(error).get(_FACTS, {})
