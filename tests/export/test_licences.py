"""A licence is quoted from where it is written, never guessed."""

from __future__ import annotations

import pytest

from qlora_helpers.export.licences import licences_of
from qlora_helpers.model.checkpoints import Checkpoint
from qlora_helpers.runs.folder import Run


@pytest.mark.parametrize(
    ("name", "origin", "card", "expected"),
    [
        (
            "mine/base",
            "hub",
            "---\nlanguage: en\nlicense: apache-2.0\n---\n# It",
            "mine/base (apache-2.0, by its model card)",
        ),
        ("mine/base", "hub", '---\nlicense: "llama3.1"\n---\n', "mine/base (llama3.1, by its model card)"),
        ("mine/base", "hub", "# no front matter\n\n---\nlicense: mit\n", "see https://huggingface.co/mine/base"),
        ("mine/base", "hub", None, "mine/base (licence not known: see https://huggingface.co/mine/base)"),
        ("tiiuae/falcon-40b", "hub", None, "tiiuae/falcon-40b (Apache-2.0)"),
        ("folder", "folder", None, "folder (licence not known: its folder names none)"),
        ("random:falcon-tiny", "random", None, "random:falcon-tiny (random weights, no licence)"),
    ],
)
def test_a_base_models_licence(tmp_path, name, origin, card, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    found = licences_of(Run(tmp_path / "run"), Checkpoint(name, tmp_path, origin))
    assert expected in found.base and found.data == "licence not known"
    assert expected in str(found)
