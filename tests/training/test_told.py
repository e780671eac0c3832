"""What an error of an exchange between processes is, whoever explains it in words of his own."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from qlora_helpers.base.errors import ModelError  # noqa: E402
from qlora_helpers.training.proving import why_it_fails  # noqa: E402
from qlora_helpers.training.told import is_of_exchange  # noqa: E402

LOST = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:12345"


def explained(error: Exception) -> ModelError:
    """The error in the words of a step that tries something on a model."""
    try:
        try:
            raise error
        except RuntimeError as first:
            raise ModelError("the model can't be trained") from first
    except ModelError as second:
        return second


def test_an_explained_error_is_still_one_of_an_exchange():
    assert is_of_exchange(RuntimeError(LOST)) and is_of_exchange(explained(RuntimeError(LOST)))
    assert not is_of_exchange(explained(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    assert not is_of_exchange(ModelError("the process group is a setting that nobody knows"))


def test_a_proof_does_not_blame_the_model_for_a_process_that_ended():
    def attempt(error: Exception) -> object:
        raise error

    with pytest.raises(RuntimeError, match="closed by peer"):
        why_it_fails(lambda: attempt(RuntimeError(LOST)), "the proof failed")
    assert why_it_fails(lambda: attempt(RuntimeError("shapes")), "the proof failed") == (
        "the proof failed (RuntimeError: shapes)"
    )
