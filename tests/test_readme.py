"""The README's figures are those of the JSON files under benchmarks/."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("readme_figures", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_figure_comes_from_its_record(script):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script.filled(text) == text
    tampered = re.sub(r"\| \*\*tuned\*\* \| [\d.]+ \|", "| **tuned** | 99.9 |", text, count=1)
    assert tampered != text
    assert script.filled(tampered) == text


def test_a_missing_place_is_told(script):
    with pytest.raises(ValueError, match="no place for demo"):
        script.filled("# Nothing")
