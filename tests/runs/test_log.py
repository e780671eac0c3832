"""A run's log holds each message once, and nothing after its session."""

from __future__ import annotations

import logging

from qlora_helpers.runs import log as run_log
from qlora_helpers.runs.log import logged_to


def test_messages_of_the_package_and_of_transformers_are_logged_during_the_block(tmp_path):
    path = tmp_path / "log.txt"
    with logged_to(path):
        logging.getLogger("qlora_helpers.training").info("a step")
        logging.getLogger("transformers.trainer").warning("a warning")
    logging.getLogger("qlora_helpers").info("afterwards")
    lines = path.read_text().splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == [
        "qlora_helpers.training INFO a step",
        "transformers.trainer WARNING a warning",
    ]


def test_what_transformers_prints_into_the_same_file_is_not_logged_again(tmp_path, monkeypatch):
    path = tmp_path / "log.txt"
    monkeypatch.setattr(run_log, "prints_into", lambda found: found == path)
    with logged_to(path):
        logging.getLogger("qlora_helpers").info("a step")
        logging.getLogger("transformers").warning("a warning")
    assert path.read_text().count("\n") == 1 and "a step" in path.read_text()
