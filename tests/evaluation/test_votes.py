"""Votes in a run's folder: whole, bounded, about the adapters that they were given for, and said for what they are."""

from __future__ import annotations

import dataclasses

import pytest
from fake_run import fake_run

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.evaluation import votes
from qlora_helpers.evaluation.votes import Vote, keep_vote, read_votes, votes_path

VOTE = Vote("base", "tuned", "right", True, "q", ("a", "b"), {"temperature": 0.0})


@pytest.fixture
def run(tmp_path):
    run = fake_run(tmp_path)
    run.adapter_dir.mkdir(exist_ok=True)
    (run.adapter_dir / "adapter_model.safetensors").write_bytes(b"one")
    return run


def test_votes_are_counted_by_the_models_whatever_their_sides(run):
    assert read_votes(run).votes == () and not votes_path(run).exists()
    for vote in (VOTE, dataclasses.replace(VOTE, left="tuned", right="base", better="left", blind=False)):
        keep_vote(run, vote, {"tuned": run})
    found = keep_vote(run, dataclasses.replace(VOTE, better="tie"), {"tuned": run})
    assert found.counts() == {("base", "tuned"): {"first": 0, "second": 2, "tie": 1, "blind": 2}}
    said = " ".join(found.sentences())
    assert (
        "3 votes between untuned and tuned: untuned was preferred 0 times, tuned 2 times, neither 1 time; 2 of them were"
        in said
    )
    assert "not a measurement" in said and "not a measurement" in repr(found)


def test_votes_on_an_adapter_that_is_gone_are_not_counted(run):
    keep_vote(run, VOTE, {"tuned": run})
    (run.adapter_dir / "adapter_model.safetensors").write_bytes(b"two")
    found = keep_vote(run, VOTE, {"tuned": run})
    assert (len(found.votes), found.older) == (1, 1)
    assert "1 votes are about adapters that the runs no longer have" in repr(found)


def test_a_strangers_vote_leads_nowhere(run):
    write_json(votes_path(run), {"votes": [dataclasses.asdict(VOTE) | {"adapters": {"run:../x y": "0", "else": "1"}}]})
    found = read_votes(run)
    assert (found.votes, found.older) == ((), 1)


def test_the_file_is_bounded(run, monkeypatch):
    monkeypatch.setattr(votes, "MOST_VOTES", 3)
    for number in range(5):
        found = keep_vote(run, dataclasses.replace(VOTE, question=f"{number}" + "x" * 9000), {"tuned": run})
    assert (len(found.votes), found.dropped) == (3, 2) and "2 older votes were dropped" in repr(found)
    kept = read_json(votes_path(run))["votes"]
    assert [vote["question"][0] for vote in kept] == ["2", "3", "4"] and len(kept[0]["question"]) == 4000


def test_a_damaged_file_is_said_and_not_overwritten(run):
    write_json(votes_path(run), {"votes": [{"left": "base"}]})
    with pytest.raises(RunError, match=r"votes\.json is damaged"):
        keep_vote(run, VOTE, {"tuned": run})
    assert read_json(votes_path(run)) == {"votes": [{"left": "base"}]}
