"""What is made of a conversation: what the run's rows have around a text is added once, and only where the client left it out."""

from __future__ import annotations

import pytest

from qlora_helpers.base.profiles import profile_config
from qlora_helpers.data.examples import Example, Message
from qlora_helpers.data.prompts import question
from qlora_helpers.runs.folder import Run
from qlora_helpers.serving.asked import Asked
from qlora_helpers.serving.served_run import ServedRun


@pytest.fixture
def served(tmp_path):
    """A run whose rows have an instruction and a system's message; no model is loaded."""
    run = Run(tmp_path / "runs" / "mine")
    settings = {"data.source": "rows.jsonl", "data.instruction": "Summarise:\n", "data.system": "Be brief."}
    run.save_config(profile_config("tiny").with_settings(settings))
    return ServedRun(run, None, None, "")


def conversation(served, *turns: tuple[str, str], **more) -> Example:
    return served._conversation(Asked("mine", messages=tuple(Message(*turn) for turn in turns), **more))


def texts(example: Example) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in example.messages]


def test_a_text_is_asked_as_ask_does(served):
    assert conversation(served, ("user", "Ann: hi")) == question("Ann: hi", served.config.data)
    assert served.described("mine")["adds"] == {"system": "Be brief.", "before": "Summarise:\n", "behind": ""}


def test_the_beginning_stays_the_same_as_a_conversation_goes_on(served):
    later = conversation(served, ("user", "Ann: hi"), ("assistant", "Ann greets."), ("user", "Shorter."))
    assert texts(later) == [
        ("system", "Be brief."),
        ("user", "Summarise:\nAnn: hi"),
        ("assistant", "Ann greets."),
        ("user", "Shorter."),
        ("assistant", ""),
    ]


def test_nothing_is_added_twice_or_where_the_client_wrote_its_own(served):
    assert texts(conversation(served, ("user", "Summarise:\nAnn: hi"))) == texts(
        conversation(served, ("user", "Ann: hi"))
    )
    own = (("system", "Be long."), ("user", "Ann: hi"))
    assert texts(conversation(served, *own)) == [*own, ("assistant", "")]
    assert texts(conversation(served, ("user", "Ann: hi"), as_written=True)) == [("user", "Ann: hi"), ("assistant", "")]
