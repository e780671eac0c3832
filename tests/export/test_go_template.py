"""A Modelfile's template is rendered by Go's own `text/template`, and writes ten conversations as they were trained.

Needs Go (`apt-get install golang-go`), so it runs in `make slow` alone; `test_turn_format.py` proves the parts without it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from chat_families import FAMILIES, family_tokenizer

from qlora_helpers.base.config import DataConfig, RunConfig
from qlora_helpers.export.modelfile import modelfile, turns_of
from qlora_helpers.export.serving_template import serving_template
from qlora_helpers.export.turn_format import CONVERSATIONS

pytestmark = [
    pytest.mark.only_slow,
    pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed: apt-get install golang-go"),
]
PROGRAM = Path(__file__).parent / "go" / "render.go"


def rendered_by_go(requests: list[dict]) -> list[list[str]]:
    done = subprocess.run(
        ["go", "run", str(PROGRAM)],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("written", ["chat", "plain"])
def test_go_renders_ten_conversations_as_they_were_trained(written):
    assert len(CONVERSATIONS) == 10
    requests, expected = [], []
    for name in FAMILIES:
        for system in (None, 'Be kind;\nsay "ok".'):
            tokenizer = family_tokenizer(name)
            template = serving_template(DataConfig(template=written, system=system), tokenizer)
            text, _ = modelfile("m.gguf", template, tokenizer, RunConfig(), "CC0-1.0")
            body = text.split('TEMPLATE """')[1].split('"""')[0]
            # What a Modelfile's SYSTEM says is put first where a conversation has no system's message of its own
            own = [[{"role": "system", "content": system}] if system else [], []]
            asked = [
                [*own[messages[0]["role"] == "system"], *(dict(message) for message in messages)]
                for messages in CONVERSATIONS
            ]
            requests.append({"template": body, "conversations": asked})
            begin = tokenizer.bos_token or ""
            expected.append(
                [
                    tokenizer.apply_chat_template(
                        list(messages), chat_template=template.text, add_generation_prompt=True, tokenize=False
                    ).removeprefix(begin)
                    for messages in CONVERSATIONS
                ]
            )
            assert turns_of(template, tokenizer).takes_system
    assert rendered_by_go(requests) == expected


def test_go_renders_the_recipes_prompt():
    tokenizer = family_tokenizer("chatml")
    template = serving_template(DataConfig(template="recipe"), tokenizer)
    text, notes = modelfile("m.gguf", template, tokenizer, RunConfig(), "CC0-1.0")
    assert notes == ["the model was trained without a system's message; Ollama drops one"]
    body = text.split('TEMPLATE """')[1].split('"""')[0]
    ((found,),) = rendered_by_go([{"template": body, "conversations": [list(CONVERSATIONS[0])]}])
    assert found == "Where is my parcel?\n---\nSummary:\n"
