"""A merged checkpoint is the base plus the adapter, and merging takes no more memory than it reports."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from tiny import tiny_llama, tiny_model

from qlora_helpers.base.config import AdapterConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.export.merge import merge
from qlora_helpers.export.tensor_files import TensorToWrite, shards, write_tensors
from qlora_helpers.model.lora import add_adapters
from qlora_helpers.model.stored_tensors import stored_tensors

pytestmark = pytest.mark.usefixtures("cache", "torch")


def saved(model, folder, torch, **settings):
    """Saves a base checkpoint in bfloat16 and an adapter for it; returns the peft model."""
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="100KB")
    tuned = add_adapters(model, AdapterConfig(**{"r": 4, "lora_dropout": 0.0} | settings), seed=0)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    tuned.save_pretrained(folder / "adapter", save_embedding_layers=False)
    (folder / "merged").mkdir()
    return tuned.eval()


def loaded(folder, torch):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


MODELS = {
    "llama": lambda: tiny_llama(),
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "falcon": lambda: tiny_model("falcon"),
    "gpt_neox": lambda: tiny_model("gpt_neox"),
    "qwen2, with biases": lambda: tiny_model("qwen2"),
}


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 16}], ids=["lora", "rslora"])
def test_the_merged_model_is_base_plus_adapter(kind, settings, tmp_path, torch):
    tuned = saved(MODELS[kind](), tmp_path, torch, **settings)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {}, "_name_or_path": "/here"}))
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", shard_gib=1e-4, working_gib=1e-5)
    assert report.merged == sum("lora_A" in name for name, _ in tuned.named_parameters())
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": None}))
    base = loaded(tmp_path / "base", torch).state_dict()
    merged = loaded(tmp_path / "merged", torch).state_dict()
    expected = tuned.float().merge_and_unload().state_dict()
    changed = 0
    for name, weight in expected.items():
        # one unit in the last of bfloat16's 8 places, where the order of the sum decides how a value is rounded
        assert torch.allclose(merged[name], weight.bfloat16().float(), rtol=2**-7, atol=0), name
        assert (merged[name] == weight.bfloat16().float()).float().mean() > 0.99, name
        changed += not torch.equal(merged[name], base[name])
    assert changed == report.merged
    assert report.files > 1
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    names = {path.name for path in (tmp_path / "merged").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == names
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and not {"quantization_config", "_name_or_path"} & set(config)


def test_names_without_the_models_prefix_are_merged(tmp_path, torch):
    """Some checkpoints were saved from the inner model, with names such as `h.0...` in place of `transformer.h.0...`."""
    tuned = saved(tiny_model("falcon"), tmp_path, torch)
    stored = stored_tensors(tmp_path / "base")
    for path in (tmp_path / "base").glob("*.safetensors*"):
        path.unlink() if path.suffix == ".json" else None
    shorter = [
        TensorToWrite(name.removeprefix("transformer."), item.dtype, item.shape, [item.read()])
        for name, item in stored.items()
    ]
    write_tensors(tmp_path / "all.safetensors", shorter)
    for path in (tmp_path / "base").glob("*.safetensors"):
        path.unlink()
    (tmp_path / "all.safetensors").rename(tmp_path / "base" / "model.safetensors")
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert report.merged == sum("lora_A" in name for name, _ in tuned.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
    ],
)
def test_other_kinds_of_adapters_are_refused(tmp_path, torch, change, message):
    saved(tiny_llama(), tmp_path, torch)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_an_adapter_of_another_model_or_with_more_tensors_is_refused(tmp_path, torch):
    from safetensors.torch import load_file, save_file

    saved(tiny_llama(), tmp_path, torch)
    other = tmp_path / "other"
    saved(tiny_llama(hidden_size=96), other, torch)
    with pytest.raises(ModelError, match="does not belong to this checkpoint"):
        merge(tmp_path / "base", other / "adapter", tmp_path / "merged")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.extra": torch.ones(2)}, path)
    with pytest.raises(ModelError, match="more than matrices"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


# files


def test_a_written_file_is_read_by_safetensors(tmp_path, torch):
    from safetensors.torch import load_file

    values = {
        "a": torch.arange(12.0).view(4, 3),
        "b": torch.tensor(7),
        "c": torch.tensor([True, False]),
        "d": torch.zeros(0, 3),
        "e": torch.arange(6).view(1, 2, 3).bfloat16(),
    }
    kinds = {"a": "F32", "b": "I64", "c": "BOOL", "d": "F32", "e": "BF16"}
    tensors = [TensorToWrite(name, kinds[name], tuple(value.shape), [value]) for name, value in values.items()]
    write_tensors(tmp_path / "model.safetensors", tensors)
    read, stored = load_file(tmp_path / "model.safetensors"), stored_tensors(tmp_path)
    for name, value in values.items():
        assert torch.equal(read[name], value) and read[name].dtype == value.dtype
        assert torch.equal(stored[name].read(), value) and stored[name].read().dtype == value.dtype
    assert torch.equal(stored["a"].read(1, 3), values["a"][1:3])
    assert torch.equal(stored["a"].read(3, 9), values["a"][3:])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1",
        b"\xff" * 8 + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{",
        (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(60) + b"1234",
        (60).to_bytes(8, "little") + b'{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}'.ljust(60) + b"12345678",
        (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[8,0]}}'.ljust(60) + b"12345678",
    ],
)
def test_a_damaged_file_is_refused(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="damaged or incomplete"):
        stored_tensors(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_damaged(tmp_path, torch):
    values = torch.arange(12.0).view(4, 3)
    write_tensors(tmp_path / "model.safetensors", [TensorToWrite("a", "F32", (4, 3), [values])])
    (tensor,) = stored_tensors(tmp_path).values()
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-4])
    with pytest.raises(ModelError, match="it ends too early"):
        tensor.read()


def test_a_tensor_in_two_files_is_refused(tmp_path, torch):
    for name in ("one", "two"):
        write_tensors(tmp_path / f"{name}.safetensors", [TensorToWrite("a", "F32", (3,), [torch.ones(3)])])
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="a is in two files"):
        stored_tensors(tmp_path)


def test_a_tensor_that_is_smaller_than_announced_is_not_written(tmp_path, torch):
    with pytest.raises(ModelError, match="a has another size than its header says"):
        write_tensors(tmp_path / "model.safetensors", [TensorToWrite("a", "F32", (4,), [torch.ones(3)])])


def test_an_index_that_leaves_its_folder_is_refused(tmp_path):
    index = {"weight_map": {"a": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside its folder"):
        stored_tensors(tmp_path)


def test_shards_are_filled_in_order():
    assert shards({"a": 3, "b": 3, "c": 9, "d": 1, "e": 1}, 6) == [["a", "b"], ["c"], ["d", "e"]]


# memory

MEASURE = """
import re, sys
from pathlib import Path
import torch
from qlora_helpers.export.merge import merge
folder = Path(sys.argv[1])
torch.ones(8, 8) @ torch.ones(8, 8)
def peak_kib():  # ru_maxrss would begin at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak_kib()
report = merge(folder / "base", folder / "adapter", folder / "merged", working_gib=0.03)
print(before, peak_kib(), report.bound_gib)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_merging_stays_within_its_memory_bound(tmp_path, torch):
    """A checkpoint of 0.38 GiB, of which one tensor has 0.19, is merged with 0.03 GiB for its rows."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir(), adapter.mkdir(), (tmp_path / "merged").mkdir()
    rows, columns = 25_000, 4096
    part = torch.randn(1000, columns).bfloat16()
    layers = [TensorToWrite(f"model.layers.{i}.fc.weight", "BF16", (rows, columns), [part] * 25) for i in range(2)]
    write_tensors(base / "model.safetensors", layers)
    (base / "config.json").write_text("{}")
    low = [("lora_A", (8, columns)), ("lora_B", (rows, 8))]
    write_tensors(
        adapter / "adapter_model.safetensors",
        [
            TensorToWrite(f"base_model.model.model.layers.{i}.fc.{kind}.weight", "F32", shape, [torch.randn(shape)])
            for i in range(2)
            for kind, shape in low
        ],
    )
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    before, after, bound = map(float, done.stdout.split())
    assert 0.01 < (after - before) / 1024**2 < bound < 0.15
    total = sum(path.stat().st_size for path in (tmp_path / "merged").glob("*.safetensors"))
    assert math.isclose(total, 2 * 2 * rows * columns, rel_tol=1e-3)
