"""Whoever runs the tests has one name in all of them, and no account is asked for."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def me(monkeypatch) -> str:
    monkeypatch.setenv("QLORA_MAKER", "d-abc123/lab")
    monkeypatch.setenv("QLORA_BUCKET_OWNER", "123456789012")
    return "d-abc123/lab"
