"""What people thought of answers side by side: votes, kept in a run's `votes.json`.

A vote is one person's taste on a question that they chose; nothing here makes a measurement of it. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_helpers.base.files import write_json
from qlora_helpers.base.records import read_record
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.evaluation.worth import model_name
from qlora_helpers.runs.folder import Run, is_run_name

MOST_VOTES, LONGEST = 1000, 4000  # votes in the file, and characters of a text; the oldest go first
BETTER = ("left", "right", "tie")
WHAT = "Votes are people's taste on questions that they chose themselves, and not a measurement."


@dataclass(frozen=True)
class Vote:
    """One comparison of two answers.

    Attributes:
        left, right: who answered, by their names in an evaluation.
        better: `left`, `right` or `tie`.
        blind: whether the names were hidden until the vote.
        question: the last question of the conversation.
        answers: what `left` and `right` answered to it.
        settings: temperature and the like, and the seed.
        turn: which question of the conversation it was, from 1.
        adapters: sha256 of the adapter's file of each run that answered, by its name in an evaluation, when the vote was given.
        time: seconds since 1970.
    """

    left: str
    right: str
    better: str
    blind: bool
    question: str
    answers: tuple[str, ...]
    settings: dict[str, float]
    turn: int = 1
    adapters: dict[str, str] = field(default_factory=dict)
    time: float = 0.0

    @property
    def is_plausible(self) -> bool:
        """Whether `better` is one of `BETTER`."""
        return self.better in BETTER


@dataclass(frozen=True)
class VotesFile:
    """What `votes.json` holds: the newest votes, and how many older ones were dropped."""

    votes: tuple[Vote, ...] = ()
    dropped: int = 0


def _times(count: int) -> str:
    return f"{count} time{'s' * (count != 1)}"


@dataclass(frozen=True)
class Votes(Tabular):
    """A run's votes.

    Attributes:
        votes: those about the adapters that the runs have now.
        older: how many are about earlier adapters, or adapters that are not there to compare.
        dropped: how many were dropped because the file was full.
    """

    votes: tuple[Vote, ...]
    older: int = 0
    dropped: int = 0

    def counts(self) -> dict[tuple[str, str], dict[str, int]]:
        """Returns for each two models how often the first, the second and neither was better, and how often it was blind."""
        found: dict[tuple[str, str], dict[str, int]] = {}
        for vote in self.votes:
            swapped = vote.left > vote.right
            first, second = (vote.right, vote.left) if swapped else (vote.left, vote.right)
            count = found.setdefault((first, second), dict.fromkeys(("first", "second", "tie", "blind"), 0))
            places = {"left": "second" if swapped else "first", "right": "first" if swapped else "second", "tie": "tie"}
            count[places[vote.better]] += 1
            count["blind"] += vote.blind
        return found

    def notes(self) -> list[str]:
        """What a person should know of these votes."""
        found = [WHAT] if self.votes else []
        if self.older:
            found.append(f"{self.older} votes are about adapters that the runs no longer have, and are not counted.")
        return found + ([f"{self.dropped} older votes were dropped: the file was full."] if self.dropped else [])

    def table(self) -> Table:
        """Returns a row for each two models."""
        rows = [
            [model_name(one), model_name(other), *(str(count[key]) for key in ("first", "second", "tie", "blind"))]
            for (one, other), count in self.counts().items()
        ]
        header = ["first", "second", "first is better", "second is better", "as good", "of these blind"]
        return Table(header, rows, caption="votes", notes=self.notes(), numbers=range(2, 6))

    def sentences(self) -> list[str]:
        """Returns the same in words, with what votes are."""
        found = []
        for (one, other), count in self.counts().items():
            total = count["first"] + count["second"] + count["tie"]
            found.append(
                f"{total} vote{'s' * (total != 1)} between {model_name(one)} and {model_name(other)}: {model_name(one)} was "
                f"preferred {_times(count['first'])}, {model_name(other)} {_times(count['second'])}, neither "
                f"{_times(count['tie'])}; {count['blind']} of them {'was' if count['blind'] == 1 else 'were'} blind."
            )
        return found + self.notes()


def votes_path(run: Run) -> Path:
    """Returns the path of a run's `votes.json`."""
    return run.folder / "votes.json"


def keep_vote(run: Run, vote: Vote, runs: Mapping[str, Run]) -> Votes:
    """Adds a vote to the run's `votes.json` and returns all of them.

    Args:
        run: the run whose folder keeps it.
        vote: the vote; its time and adapters are set here.
        runs: the run behind each name in an evaluation; the untuned model has none.

    Raises:
        RunError: the file is damaged, or can't be written.
    """
    adapters = {name: _adapter_sha(runs[name]) for name in (vote.left, vote.right) if name in runs}
    kept = dataclasses.replace(
        vote,
        question=vote.question[:LONGEST],
        answers=tuple(text[:LONGEST] for text in vote.answers),
        adapters=adapters,
        time=round(time.time(), 1),
    )
    found = _read(run)
    votes = (*found.votes, kept)
    write_json(votes_path(run), VotesFile(votes[-MOST_VOTES:], found.dropped + max(0, len(votes) - MOST_VOTES)))
    return read_votes(run)


def read_votes(run: Run) -> Votes:
    """Reads a run's votes; none where nobody voted.

    Raises:
        RunError: the file is damaged.
    """
    found = _read(run)
    now: dict[str, str] = {}

    def same(vote: Vote) -> bool:
        for name, sha in vote.adapters.items():
            if name not in now:
                beside = name.partition(":")[2]
                known = name == "tuned" or is_run_name(beside)
                now[name] = _adapter_sha(run if name == "tuned" else Run(run.folder.parent / beside)) if known else ""
            if now[name] != sha:
                return False
        return True

    current = tuple(vote for vote in found.votes if same(vote))
    return Votes(current, len(found.votes) - len(current), found.dropped)


def _read(run: Run) -> VotesFile:
    if not votes_path(run).exists():
        return VotesFile()
    return read_record(votes_path(run), VotesFile, next_step="Delete it, or restore it from a copy.")


def _adapter_sha(run: Run) -> str:
    """Hashes a run's adapter file; empty where it has none."""
    try:
        with open(run.adapter_dir / "adapter_model.safetensors", "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def plain_settings(settings: Mapping[str, Any]) -> dict[str, float]:
    """Returns the settings of an answer as a vote keeps them."""
    return {name: float(value) for name, value in settings.items()}
