"""A GGUF file holds the model: read back by transformers' own loader, or by the format's rules where that one can't read it."""

from __future__ import annotations

import pytest
from gguf_models import ABOUT, chatml, tiny_checkpoint

from qlora_helpers.base.errors import ModelError
from qlora_helpers.export.gguf_families import FAMILIES, apart_from_groups, neighbours_from_halves
from qlora_helpers.export.gguf_file import WRITTEN, write_gguf

# transformers reads no sizes of heads for Qwen 3, no other scale for Gemma, and knows neither Gemma 1, Phi-2 nor Falcon's new form;
# those are read by llama.cpp (test_llama_cpp.py)
READ_BY_TRANSFORMERS = ("llama", "mistral", "qwen2", "phi3", "gemma2", "gemma3_text")
SAME_ANSWERS = ("llama", "mistral", "qwen2", "phi3")
OFF = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 0.005, "q5_0": 0.07, "q5_1": 0.07, "q4_0": 0.13, "q4_1": 0.14, "f32": 0.0}


@pytest.fixture(scope="module")
def checkpoints(torch, tmp_path_factory):
    """A checkpoint of each family. Shared: look, don't touch."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_checkpoint(folder, family) for family in FAMILIES}


def read_back(path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def greedy(model, ids, count=12):
    import torch

    return model.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0].tolist()


@pytest.mark.parametrize("family", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_weights(checkpoints, tmp_path, family):
    from transformers import AutoModelForCausalLM

    report = write_gguf(checkpoints[family], tmp_path / "m.gguf", *chatml(), ABOUT, kind="f32")
    assert report.largest_error == 0
    before = AutoModelForCausalLM.from_pretrained(checkpoints[family]).state_dict()
    after = read_back(tmp_path / "m.gguf").state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert (weight - after[name]).abs().max() < 2**-22, name


@pytest.mark.parametrize("family", SAME_ANSWERS)
def test_transformers_answers_the_same_from_f16(checkpoints, tmp_path, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_gguf(checkpoints[family], tmp_path / "m.gguf", *chatml(), ABOUT, kind="f16")
    tokenizer, _ = chatml()
    text = "<|im_start|>user\nWhere is my parcel? 12345 café<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")(text)["input_ids"] == ids
    model = AutoModelForCausalLM.from_pretrained(checkpoints[family])
    assert greedy(read_back(tmp_path / "m.gguf"), ids) == greedy(model, ids)


@pytest.mark.parametrize("kind", WRITTEN)
def test_weights_are_equal_within_their_quantisation(checkpoints, tmp_path, kind):
    import torch
    from transformers import AutoModelForCausalLM

    report = write_gguf(checkpoints["llama"], tmp_path / "m.gguf", *chatml(), ABOUT, kind=kind)
    before = AutoModelForCausalLM.from_pretrained(checkpoints["llama"]).state_dict()
    after = read_back(tmp_path / "m.gguf").state_dict()
    worst = 0.0
    for name, weight in before.items():
        if weight.ndim == 1:
            assert torch.equal(weight, after[name])
            continue
        blocks = weight.abs().reshape(-1, 32).max(dim=1).values
        off = (weight - after[name]).abs().reshape(-1, 32).max(dim=1).values
        worst = max(worst, float((off / blocks).max()))
    assert worst <= OFF[kind] and (kind == "f32" or worst > OFF[kind] / 8)
    assert report.kind == kind and report.largest_error <= OFF[kind]


def test_a_file_with_another_weight_is_not_accepted(checkpoints, tmp_path, monkeypatch):
    from qlora_helpers.export import gguf_file

    monkeypatch.setattr(gguf_file, "stored_as", lambda name, config, family: None)
    write_gguf(checkpoints["llama"], tmp_path / "m.gguf", *chatml(), ABOUT)  # the file is what it was asked to be ...
    monkeypatch.undo()
    path, close = tmp_path / "n.gguf", gguf_file._read_back

    def spoilt(out, tensors, kinds):
        data = bytearray(out.read_bytes())
        data[-2] ^= 0x40  # ... but a bit of it flips on the way
        out.write_bytes(data)
        return close(out, tensors, kinds)

    monkeypatch.setattr(gguf_file, "_read_back", spoilt)
    with pytest.raises(ModelError, match="was not written as it is"):
        write_gguf(checkpoints["llama"], path, *chatml(), ABOUT)


def test_rows_become_neighbours(torch):
    rows = torch.arange(12.0)[:, None]  # two heads of six rows: halves 0-2 and 3-5, 6-8 and 9-11
    assert neighbours_from_halves(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    groups = torch.arange(8.0)[:, None].repeat_interleave(2, 0)  # two groups of q, q, k, v
    assert apart_from_groups(groups, 4, 2).flatten()[::2].tolist() == [0, 1, 4, 5, 2, 6, 3, 7]


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "scaled by yarn"),
        ("gemma2", {"query_pre_attn_scalar": 144}, "divided by the root of 144"),
        ("falcon", {"alibi": True}, "alibi"),
        ("falcon", {"new_decoder_architecture": False, "multi_query": False}, "without shared keys"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 3}, "sliding windows lie in other layers"),
        ("opt", {}, "models of the family opt are not written as GGUF here; expected llama, mistral, "),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(torch, tmp_path, family, settings, message):
    from tiny import FAMILIES as TINY
    from transformers import AutoConfig

    from qlora_helpers.export.gguf_families import gguf_family

    more = {"num_hidden_layers": 3} | settings
    with pytest.raises(ModelError, match=rf"{message}.*Use --to merged or --to vllm"):
        gguf_family(AutoConfig.for_model(family, **TINY[family] | more))


def test_a_value_that_f16_can_not_hold_is_refused(torch, tmp_path):
    folder = tiny_checkpoint(tmp_path, "llama", scale=1e6)
    with pytest.raises(ModelError, match=r"has values that F16 can't hold. Use --quantize bf16"):
        write_gguf(folder, tmp_path / "m.gguf", *chatml(), ABOUT)
    assert write_gguf(folder, tmp_path / "b.gguf", *chatml(), ABOUT, kind="bf16").largest_error <= 2**-8


def test_a_window_ends_the_context(torch, tmp_path):
    """llama.cpp computes no sliding window for Mistral: within the window there is none."""
    import gguf

    folder = tiny_checkpoint(tmp_path, "mistral", sliding_window=128, max_position_embeddings=512)
    write_gguf(folder, tmp_path / "m.gguf", *chatml(), ABOUT)
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["llama.context_length"].contents() == 128


def test_llama_3s_frequencies_are_stored(torch, tmp_path):
    import gguf

    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = tiny_checkpoint(tmp_path, "llama", rope_parameters=rope)
    write_gguf(folder, tmp_path / "m.gguf", *chatml(), ABOUT)
    factors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}["rope_freqs.weight"]
    assert factors.shape == (8,)
    assert factors[0] == pytest.approx(1) and factors[-1] == pytest.approx(8)
    assert (factors[1:] >= factors[:-1] - 1e-6).all()
