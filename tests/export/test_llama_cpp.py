"""llama.cpp itself reads what is written: the same tokens, the same logits, the same greedy answers, of every family.

Needs `pip install llama-cpp-python` (built for several minutes), so it runs in `make slow` alone.
"""

from __future__ import annotations

import importlib.util
import shutil

import pytest
from chat_families import FAMILIES as CHAT_FAMILIES
from chat_families import SENTENCES, family_tokenizer
from gguf_models import ABOUT, chatml, tiny_checkpoint
from test_gguf_vocabulary import phi_3_tokenizer, sentencepiece_tokenizer, split_by

from qlora_helpers.base.config import AdapterConfig, DataConfig
from qlora_helpers.data.examples import Example, Message
from qlora_helpers.export.gguf_adapter import write_adapter_gguf
from qlora_helpers.export.gguf_families import FAMILIES
from qlora_helpers.export.gguf_file import write_gguf
from qlora_helpers.export.gguf_vocabulary import SPLITTINGS, TEXTS
from qlora_helpers.export.llama_cpp_check import checked_by_llama_cpp
from qlora_helpers.export.merge import merge
from qlora_helpers.export.quantize import K_QUANTS, quantize
from qlora_helpers.export.serving_template import serving_template

pytestmark = [
    pytest.mark.only_slow,
    pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="pip install llama-cpp-python"),
]
TEXT = "<|im_start|>user\nWhere is my parcel? It left 12345 café 你好 🎂<|im_end|>\n<|im_start|>assistant\n"
TOLERANCE = 0.02  # of logits up to about 9: llama.cpp's attention and SiLU work in F16


def opened(path, **settings):
    import llama_cpp

    return llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=1, verbose=False, logits_all=True, type_k=0, type_v=0, **settings
    )


def asked(model, ids, count=16):
    """Logits of a prompt's tokens, and a greedy answer, by llama.cpp."""
    import numpy as np

    model.reset()
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)])
    model.reset()
    answer = []
    for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        answer.append(int(token))
        if len(answer) == count:
            break
    return logits, answer


def asked_transformers(folder, ids, count=16):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    answer = model.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return logits, answer[0].tolist()[len(ids) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_every_family_as_transformers_does(torch, tmp_path, family):
    tokenizer, template = chatml()
    folder = tiny_checkpoint(tmp_path, family)
    write_gguf(folder, tmp_path / "m.gguf", tokenizer, template, ABOUT, kind="f32")
    model = opened(tmp_path / "m.gguf")
    ids = tokenizer(TEXT)["input_ids"]
    assert model.tokenize(TEXT.encode(), add_bos=False, special=True) == ids
    logits, answer = asked(model, ids)
    expected, expected_answer = asked_transformers(folder, ids)
    assert abs(logits - expected).max() < TOLERANCE
    assert answer == expected_answer
    model.close()


def test_llama_cpp_scales_positions_as_llama_3_does(torch, tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    for name, changed in (("llama3", rope), ("linear", {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})):
        tokenizer, template = chatml()
        folder = tiny_checkpoint(tmp_path / name, "llama", rope_parameters=changed)
        write_gguf(folder, tmp_path / f"{name}.gguf", tokenizer, template, ABOUT, kind="f32")
        ids = tokenizer(TEXT)["input_ids"]
        model = opened(tmp_path / f"{name}.gguf")
        assert abs(asked(model, ids)[0] - asked_transformers(folder, ids)[0]).max() < TOLERANCE
        model.close()


@pytest.mark.parametrize("family", ["llama", "falcon", "qwen3"])
def test_an_adapter_beside_its_base_computes_what_the_merged_model_does(torch, tmp_path, family):
    from transformers import AutoModelForCausalLM

    from qlora_helpers.model.lora import add_adapters

    tokenizer, template = chatml()
    folder = tiny_checkpoint(tmp_path, family)
    model = add_adapters(AutoModelForCausalLM.from_pretrained(folder), AdapterConfig(r=4), seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    merge(folder, tmp_path / "adapter", tmp_path / "merged")
    write_gguf(folder, tmp_path / "base.gguf", tokenizer, template, ABOUT, kind="f32")
    write_gguf(tmp_path / "merged", tmp_path / "merged.gguf", tokenizer, template, ABOUT, kind="f32")
    write_adapter_gguf(folder, tmp_path / "adapter", tmp_path / "adapter.gguf", "m")
    ids = tokenizer(TEXT)["input_ids"]
    both = opened(tmp_path / "base.gguf", lora_path=str(tmp_path / "adapter.gguf"))
    merged, base = opened(tmp_path / "merged.gguf"), opened(tmp_path / "base.gguf")
    one, other, plain = (asked(each, ids)[0] for each in (both, merged, base))
    for each in (both, merged, base):
        each.close()
    with torch.no_grad():
        expected = model.eval()(torch.tensor([ids])).logits[0].numpy()
    assert abs(one - expected).max() < TOLERANCE
    assert abs(one - other).max() < abs(one - plain).max() / 3  # the merged weights were rounded to bfloat16


@pytest.mark.parametrize("kind", K_QUANTS)
def test_a_k_quant_is_made_and_loaded(torch, tmp_path, kind):
    tokenizer, template = chatml()
    folder = tiny_checkpoint(tmp_path, "llama", hidden_size=256, intermediate_size=512)
    write_gguf(folder, tmp_path / "bf16.gguf", tokenizer, template, ABOUT, kind="bf16")
    error = quantize(tmp_path / "bf16.gguf", tmp_path / "k.gguf", kind)
    assert 0 < error < {"q2_k": 0.35, "q3_k_s": 0.2, "q3_k_m": 0.2, "q3_k_l": 0.2}.get(kind, 0.12)
    assert (tmp_path / "k.gguf").stat().st_size < (tmp_path / "bf16.gguf").stat().st_size * 0.8
    model = opened(tmp_path / "k.gguf")
    assert len(asked(model, tokenizer(TEXT)["input_ids"])[1]) == 16
    assert model.metadata["tokenizer.chat_template"] == template.text
    model.close()


def rows(*texts):
    return tuple(
        Example(f"r{number}", "here", (Message("user", text), Message("assistant", "")))
        for number, text in enumerate(texts)
    )


def checkpoint_for(tokenizer, folder):
    """A tiny Llama with as many rows as a tokenizer has tokens."""
    from tiny import tiny_llama

    tiny_llama(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None, pad_token_id=None).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("written", ["chat", "plain"])
@pytest.mark.parametrize("family", [name for name in CHAT_FAMILIES if not CHAT_FAMILIES[name].strip_behind])
def test_llama_cpp_cuts_prompts_into_the_trained_tokens(torch, tmp_path, family, written):
    tokenizer = family_tokenizer(family)
    config = DataConfig(template=written)
    template = serving_template(config, tokenizer)
    write_gguf(checkpoint_for(tokenizer, tmp_path / "base"), tmp_path / "m.gguf", tokenizer, template, ABOUT)
    asked = rows(*TEXTS, *SENTENCES)
    found = checked_by_llama_cpp(tmp_path / "m.gguf", config, template, tokenizer, asked)
    assert found == "llama.cpp cuts 8 of 8 held-out prompts into the tokens that were trained"


@pytest.mark.parametrize("written", ["chat", "plain"])
def test_a_sentencepiece_tokenizer_is_llama_cpps(torch, tmp_path, written):
    tokenizer = sentencepiece_tokenizer(tmp_path)
    tokenizer.pad_token = "<unk>"
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    config = DataConfig(template=written)
    template = serving_template(config, tokenizer)
    write_gguf(checkpoint_for(tokenizer, tmp_path / "base"), tmp_path / "m.gguf", tokenizer, template, ABOUT)
    found = checked_by_llama_cpp(tmp_path / "m.gguf", config, template, tokenizer, rows(*TEXTS, *SENTENCES))
    assert found.startswith("llama.cpp cuts 8 of 8")


@pytest.mark.parametrize("written", ["chat", "plain"])
def test_phi_3s_control_tokens_swallow_white_space_in_llama_cpp_too(torch, tmp_path, written):
    tokenizer = phi_3_tokenizer(tmp_path)
    config = DataConfig(template=written)
    template = serving_template(config, tokenizer)
    write_gguf(checkpoint_for(tokenizer, tmp_path / "base"), tmp_path / "m.gguf", tokenizer, template, ABOUT)
    found = checked_by_llama_cpp(tmp_path / "m.gguf", config, template, tokenizer, rows(*TEXTS, *SENTENCES))
    assert found.startswith("llama.cpp cuts 8 of 8")


@pytest.mark.parametrize("name", SPLITTINGS)
def test_llama_cpp_splits_text_as_its_name_says(torch, tmp_path, name):
    from tokenizers import decoders, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = split_by(name)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|pad|>"],
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS, *SENTENCES] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    config = DataConfig(template="plain")
    template = serving_template(config, tokenizer)
    report = write_gguf(checkpoint_for(tokenizer, tmp_path / "base"), tmp_path / "m.gguf", tokenizer, template, ABOUT)
    assert report.pre == name
    found = checked_by_llama_cpp(tmp_path / "m.gguf", config, template, tokenizer, rows(*TEXTS, *SENTENCES))
    assert found.startswith("llama.cpp cuts 8 of 8")


def test_other_tokens_are_refused(torch, tmp_path, monkeypatch):
    from qlora_helpers.base.errors import ModelError
    from qlora_helpers.export import gguf_vocabulary

    tokenizer, template = chatml()
    monkeypatch.setattr(gguf_vocabulary, "splitting_name", lambda content, backend: "llama-bpe")
    write_gguf(checkpoint_for(tokenizer, tmp_path / "base"), tmp_path / "m.gguf", tokenizer, template, ABOUT)
    with pytest.raises(ModelError, match="llama.cpp cuts prompts into other tokens.*of 8 prompts"):
        checked_by_llama_cpp(
            tmp_path / "m.gguf", DataConfig(template="chat"), template, tokenizer, rows(*TEXTS, *SENTENCES)
        )
    shutil.rmtree(tmp_path / "base")
