"""Tiny real models and a few dialogues: what the tests use instead of mocks. Heavy libraries are imported where they are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Of each listed family: the configuration that gives a tiny model.
_SMALL = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
_GROUPED = _SMALL | {"num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "falcon": _SMALL | {"num_kv_heads": 1, "new_decoder_architecture": True},
    "gpt_neox": _SMALL | {"intermediate_size": 128},
    "bloom": {"vocab_size": 256, "hidden_size": 64, "n_layer": 1, "n_head": 2, "pad_token_id": 0},
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "gemma": _GROUPED,
    "gemma2": _GROUPED,
    "gemma3_text": _GROUPED,
    "phi": _SMALL | {"num_key_value_heads": 2, "intermediate_size": 128},
    "phi3": _GROUPED,
    "opt": _SMALL | {"ffn_dim": 128, "word_embed_proj_dim": 64},
}
UNLISTED: dict[str, dict[str, Any]] = {
    "stablelm": _SMALL | {"num_key_value_heads": 2, "intermediate_size": 128},
    "mpt": {"vocab_size": 256, "d_model": 64, "n_layers": 1, "n_heads": 2},
    "gpt2": {"vocab_size": 256, "n_embd": 64, "n_layer": 1, "n_head": 2},
}


def tiny_model(family: str, *, dtype: Any = None, attention: str | None = None, **more: Any) -> Any:
    """A model of a family with random weights: one layer, hidden size 64, 256 tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **(FAMILIES | UNLISTED)[family] | more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()


def tiny_llama(**changes: Any) -> Any:
    """A Llama with random weights in float32: two layers, hidden size 64, the corpus tokenizer's 2,048 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 2048,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "use_cache": False,
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def tiny_gguf(folder: Path) -> tuple[Path, Any]:
    """A tiny Llama as a GGUF file in a folder, and the model that it was made from."""
    import numpy
    from gguf import GGMLQuantizationType, GGUFWriter

    from qlora_helpers.model.checkpoints import corpus_tokenizer

    model = tiny_llama(num_key_value_heads=4)  # with grouped keys the file would hold permuted rows
    path = folder / "tiny-llama.gguf"
    writer = GGUFWriter(str(path), "llama")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(corpus_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp's order of the rotated halves
            heads = config.num_attention_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        name = name.replace("model.layers.", "blk.")
        writer.add_tensor(name, numpy.ascontiguousarray(values), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def tiny_falcon() -> Any:
    """The tiny Falcon (the wiring of the 40B) in NF4, with its tokenizer: a `LoadedModel`."""
    from qlora_helpers.base.config import ModelConfig
    from qlora_helpers.model.loading import load_model

    return load_model(ModelConfig(name="random:falcon-tiny"), say=lambda text: None)


def tuned(base: Any) -> Any:
    """A model with adapters that add something, for answers."""
    import torch

    from qlora_helpers.base.config import AdapterConfig
    from qlora_helpers.model.lora import add_adapters

    model = add_adapters(base, AdapterConfig(r=4, lora_dropout=0.5), seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return model.eval()


DIALOGUES = (
    (
        "Ana: are you coming tonight?\nBo: can't, I'm on shift until ten\nAna: pity!",
        "Bo works until ten and can't come.",
    ),
    ("Kim: the printer is out of toner again\nLee: I'll order some", "Lee will order toner for the printer."),
    (
        "Mia: happy birthday!! 🎂\nJo: aww thank you <3\nMia: party on Saturday?\nJo: yes, 8 pm",
        "Jo's party is on Saturday at 8.",
    ),
    ("Sam: did you feed the cat\nRia: twice, by accident 😅", "Ria has fed the cat twice."),
    ("Tom: train is late\nUma: how late?\nTom: half an hour, start without me", "Tom's train is half an hour late."),
    ("Eva: can you send me the slides?\nFin: <file_other>\nEva: thanks!", "Fin sends Eva the slides."),
    (
        "Gil: lunch?\nHal: in a call, give me 20 min\nGil: ok, the usual place",
        "Gil and Hal have lunch in twenty minutes.",
    ),
    (
        "Ida: I lost my keys again\nJan: look in the fridge\nIda: ... how did you know",
        "Ida finds her keys in the fridge.",
    ),
)


def prepared_data(corpus: Any, tokenizer: Any, **settings: Any) -> Any:
    """A corpus as blocks, of 128 tokens unless the settings say otherwise."""
    from qlora_helpers.base.config import DataConfig
    from qlora_helpers.data.prepare import prepare

    return prepare(corpus, tokenizer, DataConfig(**{"seq_len_tokens": 128} | settings))
