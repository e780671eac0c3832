"""Weights counted from the headers of a checkpoint's files."""

from __future__ import annotations

import json
import struct

import pytest
from tiny import tiny_model

from qlora_helpers.base.profiles import profile_config
from qlora_helpers.model.shapes.headers import checkpoint_parameters
from qlora_helpers.planning.run_plan import plan_run


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_checkpoint_s_headers_confirm_the_plan(torch, tmp_path, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    assert checkpoint_parameters(tmp_path) == sum(part.numel() for part in model.parameters())
    config = profile_config("tiny").with_settings({"model.name": str(tmp_path)})
    plan = plan_run(config, gpus="24GiB", tokens=10_000)
    assert any("headers hold as many weights" in note for note in plan.notes)


def test_a_config_json_of_another_model_is_noticed(torch, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    config = profile_config("tiny").with_settings({"model.name": str(tmp_path)})
    plan = plan_run(config, gpus="24GiB", tokens=10_000)
    assert any("its config.json is not this checkpoint's" in note for note in plan.notes)


def test_what_can_not_be_counted_is_left_alone(tmp_path):
    assert checkpoint_parameters(tmp_path) is None
    path = tmp_path / "model.safetensors"
    for content in (
        b"",
        b"short",
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", 4) + b"[1,2",
        struct.pack("<Q", 2) + b"[]",
    ):
        path.write_bytes(content)
        assert checkpoint_parameters(tmp_path) is None
    packed = json.dumps({"w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + bytes(8))
    assert checkpoint_parameters(tmp_path) is None, "weights in 4 bits"
