"""An error takes along the places that it leaves, from any thread, and nothing else."""

from __future__ import annotations

import pytest

from qlora_helpers.base.place import at, facts_of, places_of


def test_an_error_names_the_places_it_left_innermost_first():
    with pytest.raises(InterruptedError) as caught, at("evaluation"), at("forward"):
        raise InterruptedError
    assert places_of(caught.value) == ["forward", "evaluation"]


def test_a_place_left_before_the_error_is_not_named():
    @at("backward")
    def backward():
        with at("forward"):
            pass
        raise InterruptedError

    with pytest.raises(InterruptedError) as caught:
        backward()
    assert places_of(caught.value) == ["backward"]
    assert places_of(InterruptedError()) == [] and facts_of(InterruptedError()) == {}


def test_as_a_decorator_it_is_new_for_every_call():
    @at("loss")
    def loss(value):
        """Divides."""
        return 1 / value

    assert loss(2) == 0.5 and loss.__doc__ == "Divides."
    for _ in range(2):
        with pytest.raises(ZeroDivisionError) as caught:
            loss(0)
        assert places_of(caught.value) == ["loss"]


def test_facts_are_read_when_the_error_passes_and_the_innermost_counts():
    state = {"step": 1, "compiled": True}

    @at(facts=lambda: dict(state))
    def session():
        state["step"] = 3
        with at("forward", facts=lambda: {"step": state["step"] + 1}):
            raise InterruptedError

    with pytest.raises(InterruptedError) as caught:
        session()
    assert facts_of(caught.value) == {"step": 4, "compiled": True}
    assert places_of(caught.value) == ["forward"]
