"""What an error of an exchange between processes is, whoever explains it in words of his own."""

from __future__ import annotations

import contextlib

import pytest

torch = pytest.importorskip("torch")

from qlora_helpers.base.errors import ModelError  # noqa: E402
from qlora_helpers.training import rank_failures  # noqa: E402
from qlora_helpers.training.proving import why_it_fails  # noqa: E402
from qlora_helpers.training.rank_failures import is_of_exchange  # noqa: E402

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


@pytest.mark.parametrize("how", ["missing", "failing", "blocking", "working"])
def test_where_a_waiting_exchange_can_not_be_aborted_the_process_ends_after_a_moment(how, monkeypatch, caplog):
    import threading

    from torch import distributed

    called, blocked = threading.Event(), threading.Event()

    def abort() -> None:
        called.set()
        if how == "failing":
            raise RuntimeError("not with this NCCL")
        if how == "blocking":
            blocked.wait(30)

    ended: list[int] = []
    done = threading.Event()

    def reported(*, wait: bool) -> RuntimeError:
        return RuntimeError("process 2 of 2 failed")

    def exit_(code: int) -> None:
        ended.append(code)
        raise SystemExit

    monkeypatch.setattr(distributed, "get_backend", lambda: "nccl")
    if how == "missing":
        monkeypatch.delattr(distributed.distributed_c10d, "_abort_process_group")
    else:
        monkeypatch.setattr(distributed.distributed_c10d, "_abort_process_group", abort)
    monkeypatch.setattr(rank_failures, "LOOK_S", 0.01)
    monkeypatch.setattr(rank_failures, "STUCK_S", 0.2)
    monkeypatch.setattr(rank_failures, "_reported", reported)
    monkeypatch.setattr(rank_failures.os, "_exit", exit_)
    stuck: list[Exception] = []
    if how == "working":  # the exchange fails in the main thread, which then leaves the block
        threading.Thread(target=lambda: called.wait(30) and done.set()).start()
        monkeypatch.setattr(rank_failures, "STUCK_S", 30.0)
    with contextlib.suppress(SystemExit):
        rank_failures._watch(done, stuck.append)
    blocked.set()
    assert ended == ([] if how == "working" else [rank_failures.EXIT_CODE]) and len(stuck) == len(ended)
    if how in ("missing", "failing"):
        assert "can't abort an exchange" in caplog.text or "was not aborted" in caplog.text
