"""Every test has a learner's folder of its own."""

import pytest


@pytest.fixture(autouse=True)
def learner(tmp_path, monkeypatch):
    folder = tmp_path / "learner"
    monkeypatch.setenv("QLORA_LEARNER", str(folder))
    monkeypatch.delenv("QLORA_SEAT", raising=False)
    monkeypatch.delenv("QLORA_TEACHER", raising=False)
    return folder
