"""A checkpoint whose weights are packed is recognised before it is loaded: used as it is, unpacked rightly, or refused."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
from tiny import tiny_llama

from qlora_helpers.base.config import ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.model import stored_formats
from qlora_helpers.model.checkpoints import corpus_tokenizer, find_checkpoint
from qlora_helpers.model.loading import load_model

NAME = "model.layers.0.mlp.down_proj"


def load(folder, **settings):
    return load_model(ModelConfig(name=str(folder), **settings), say=lambda text: None)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(torch, cache, tmp_path):
    """A tiny Llama in bfloat16, to be packed."""
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "packed")
    corpus_tokenizer().save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def repack(folder, settings, pack) -> None:
    """Replaces every linear weight of a folder by what `pack` makes of its name and values, and says so in its config."""
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    found = {}
    for name, value in held.items():
        is_linear = name.endswith("proj.weight")
        found |= pack(name, value.float()) if is_linear else {name: value}
    save_file({name: value.contiguous() for name, value in found.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def blocks_of_fp8(torch, name, value):
    """FP8 as DeepSeek's checkpoints have it: one scale for each block, here of 48 by 48, of which the last ones are short."""
    packed = torch.empty_like(value, dtype=torch.float8_e4m3fn)
    scale = torch.empty(*(-(-size // 48) for size in value.shape))
    for row, column in itertools.product(*map(range, scale.shape)):
        place = (slice(48 * row, 48 * row + 48), slice(48 * column, 48 * column + 48))
        scale[row, column] = value[place].abs().max() / 448
        packed[place] = (value[place] / scale[row, column]).to(torch.float8_e4m3fn)
    return {name: packed, f"{name}_scale_inv": scale}


def rows_of_fp8(torch, name, value):
    scale = value.abs().amax(1, keepdim=True) / 448
    return {name: (value / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.to(torch.bfloat16)}


def whole_of_fp8(torch, name, value):
    scale = value.abs().max().reshape(1) / 448
    more = {f"{name.removesuffix('weight')}input_scale": torch.ones(1)}
    return {name: (value / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale} | more


def rows_of_int8(torch, name, value):
    most = value.abs().amax(1)
    return {
        name: (value * 127 / most[:, None]).round().to(torch.int8),
        f"{name.removesuffix('weight')}SCB": most,
        f"{name.removesuffix('weight')}weight_format": torch.tensor(0, dtype=torch.uint8),
    }


FORMATS = {
    "fp8 in blocks": ({"quant_method": "fp8", "weight_block_size": [48, 48]}, blocks_of_fp8),
    "compressed-tensors, rows": ({"quant_method": "compressed-tensors", "format": "float-quantized"}, rows_of_fp8),
    "compressed-tensors, whole": ({"quant_method": "compressed-tensors", "format": "float-quantized"}, whole_of_fp8),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, rows_of_int8),
}


@pytest.mark.parametrize("form", FORMATS)
def test_packed_numbers_are_multiplied_by_their_scales(torch, folder, form):
    """They were once loaded as if they were the weights: up to 448 instead of 0.4."""
    settings, pack = FORMATS[form]
    original = tiny_llama().get_submodule(NAME).weight
    repack(folder, settings, lambda name, value: pack(torch, name, value))
    loaded = load(folder, quantization="none")
    weight = loaded.model.get_submodule(NAME).weight.float()
    assert float((weight - original).norm() / original.norm()) < 0.04
    assert "quantization_config" not in json.loads((loaded.checkpoint.folder / "config.json").read_text())
    assert load(folder).audit.quantized == 14  # and from there to NF4
    assert loaded.checkpoint.folder == find_checkpoint(ModelConfig(name=str(folder))).folder  # the same copy


def test_every_shape_of_a_scale_is_spread_over_its_weight(torch):
    values = torch.full((5, 6), 2, dtype=torch.int8)
    assert torch.equal(stored_formats.scaled(values, torch.tensor(3.0)), torch.full((5, 6), 6.0, dtype=torch.bfloat16))
    rows = stored_formats.scaled(values, torch.arange(5.0)[:, None])
    assert rows[:, 0].tolist() == rows[:, 5].tolist() == [0, 2, 4, 6, 8]
    four = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    blocks = stored_formats.scaled(values, four, (4, 4))  # the last blocks are short, as of 576 rows in blocks of 128
    assert blocks[:, 0].tolist() == [2, 2, 2, 2, 6] and blocks[0].tolist() == [2, 2, 2, 2, 4, 4]
    experts = stored_formats.scaled(values.expand(3, 5, 6), four.expand(3, 2, 2), (4, 4))
    assert torch.equal(experts, blocks.expand(3, 5, 6))
    halves = stored_formats.scaled(values[:4], four)  # whole blocks need no size
    assert halves[:, 0].tolist() == [2, 2, 6, 6]
    for block in ((), (2, 2), (8, 8)):
        with pytest.raises(ValueError, match="2 scales for 5 values in blocks of|2 scales for 6 values in blocks of"):
            stored_formats.scaled(values, four, block)
    with pytest.raises(ValueError, match="a scale of"):
        stored_formats.scaled(values, torch.ones(4))


@pytest.mark.parametrize(
    ("settings", "block"),
    [
        ({"weight_block_size": [128, 64]}, (128, 64)),
        ({"weight_block_size": None}, ()),
        ({"config_groups": {"group_0": {"weights": {"block_structure": [128, 128]}}}}, (128, 128)),
        ({"config_groups": {"group_0": {"weights": {"block_structure": "64x32"}}}}, (64, 32)),
        ({"config_groups": {"group_0": {"weights": None}}}, ()),
        ({}, ()),
    ],
)
def test_the_size_of_a_block_is_read_from_the_settings(settings, block):
    assert stored_formats.block_of(settings) == block


def test_mxfp4_is_unpacked_exactly(torch):
    """Against the format's definition: the low half first, 0.5 is 1, the sign is the fourth bit, a scale is a power of two."""
    blocks = torch.zeros(1, 2, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, 0], blocks[0, 1, 0, 15] = 0x21, 0xF7  # 0.5 then 1.0; 6.0 then -6.0
    scales = torch.tensor([[[128], [126]]], dtype=torch.uint8)  # times 2, times 1/2
    found = stored_formats.from_mxfp4(blocks, scales)
    assert found.shape == (1, 32, 2) and found.dtype == torch.bfloat16
    assert found[0, :2, 0].tolist() == [1.0, 2.0] and found[0, 30:, 1].tolist() == [3.0, -3.0]
    assert found.count_nonzero() == 4


def test_gpt_oss_is_loaded_from_its_mxfp4_files(torch, cache, tmp_path):
    """Every value of such a file is a bfloat16 number, so the model is that of the plain files to the bit."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    more = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("gpt_oss", **sizes, **more, pad_token_id=1, eos_token_id=0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    corpus_tokenizer().save_pretrained(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "packed")
    plain = load_file(tmp_path / "plain/model.safetensors")
    packed = dict(plain)
    for name, value in plain.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            del packed[name]
            shape = (value.shape[0], value.shape[2], value.shape[1] // 32, 16)
            blocks = torch.randint(0, 256, shape, dtype=torch.uint8)
            scales = torch.randint(118, 126, shape[:-1], dtype=torch.uint8)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = stored_formats.from_mxfp4(blocks, scales)
    save_file(plain, tmp_path / "plain/model.safetensors")
    save_file(packed, tmp_path / "packed/model.safetensors")
    shape = json.loads((tmp_path / "packed/config.json").read_text())
    shape["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "packed/config.json").write_text(json.dumps(shape))
    both = [load(tmp_path / name) for name in ("plain", "packed")]
    assert [each.audit.stacks for each in both] == [4, 4]
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        assert torch.equal(*(each.model(input_ids=ids).logits for each in both))


# bitsandbytes' 4 bits


@pytest.fixture
def nf4_folder(torch, folder, tmp_path):
    """The tiny Llama as somebody else saved it in NF4, without double quantisation and for bfloat16."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map={"": "cpu"})
    model.save_pretrained(tmp_path / "nf4")
    corpus_tokenizer().save_pretrained(tmp_path / "nf4")
    return tmp_path / "nf4"


def test_nf4_files_are_used_as_they_are(torch, nf4_folder):
    from safetensors.torch import load_file

    loaded = load(nf4_folder)
    layer = loaded.model.get_submodule(NAME)
    assert torch.equal(layer.weight.data, load_file(nf4_folder / "model.safetensors")[f"{NAME}.weight"])
    assert (loaded.audit.quantized, loaded.audit.double_quantization) == (
        14,
        False,
    )  # as in the files, not as by default
    assert layer.compute_dtype == torch.float32  # as this machine needs it, not as in the files
    assert loaded.checkpoint.folder == nf4_folder


def test_nf4_files_are_unpacked_where_no_quantisation_is_asked_for(torch, nf4_folder):
    from bitsandbytes.functional import dequantize_4bit

    packed = load(nf4_folder).model.get_submodule(NAME).weight
    plain = load(nf4_folder, quantization="none").model.get_submodule(NAME).weight
    assert torch.equal(plain, dequantize_4bit(packed.data, packed.quant_state).to(torch.bfloat16).float())


# what is refused


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quant_method": "awq", "bits": 4}, "stored in AWQ, which can't be tuned here"),
        ({"quant_method": "hqq"}, "stored in hqq, which can't be tuned here"),
    ],
)
def test_other_forms_are_refused_by_name(folder, settings, expected):
    repack(folder, settings, lambda name, value: {name: value})
    for quantization in ("nf4", "none"):
        with pytest.raises(ModelError, match=expected):
            load(folder, quantization=quantization)


def test_packed_integers_of_four_bits_are_refused(torch, folder):
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    repack(folder, settings, lambda name, value: {f"{name}_packed": value.to(torch.int32), f"{name}_scale": value})
    with pytest.raises(ModelError, match=r"stored in compressed-tensors \(pack-quantized\), which can't be tuned"):
        load(folder)


def test_packed_weights_that_the_config_does_not_name_are_refused(torch, folder):
    repack(folder, None, lambda name, value: rows_of_fp8(torch, name, value))
    with pytest.raises(ModelError, match=r"holds packed weights, and its config.json does not say how; got model\."):
        load(folder)


def test_a_scale_that_nothing_reads_is_refused(torch, folder):
    repack(folder, None, lambda name, value: {name: value, f"{name}_scale": value[:1].clone()})
    with pytest.raises(ModelError, match="14 parts of linear layers that would not be read, model.layers.0.mlp"):
        load(folder)


def test_packed_weights_without_a_scale_are_refused(torch, folder):
    repack(folder, {"quant_method": "fp8"}, lambda name, value: {name: value.to(torch.float8_e4m3fn)})
    with pytest.raises(ModelError, match="is packed and has no scale"):
        load(folder)


def test_what_an_nf4_checkpoint_itself_keeps_out_of_4_bits_is_counted_with_its_reason(torch, folder):
    """As Unsloth's dynamic checkpoints do; what is neither in 4 bits nor named there is refused as ever."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "model.layers.1.mlp"]
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)
    mlp = sum(parameter.numel() for parameter in model.model.layers[1].mlp.parameters())
    model.save_pretrained(folder)
    found = load(folder).audit
    assert {each.reason: each.values for each in found.unquantised}["kept by the checkpoint"] == mlp
    assert found.quantized == found.expected == 11
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="not quantised as asked"):
        load(folder)


def test_an_output_head_in_4_bits_is_no_stack_of_experts(torch, folder):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[])
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings).save_pretrained(folder)
    found = load(folder).audit
    assert (found.quantized, found.stacks) == (14, 0)
    assert "output head" not in {each.reason for each in found.unquantised}


def test_a_form_without_a_name_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(ModelError, match="stored in a form that its config.json does not name"):
        load(folder)
