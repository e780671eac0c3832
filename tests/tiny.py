"""Tiny real models and a few dialogues: what the tests use instead of mocks. Heavy libraries are imported where they are used."""

from __future__ import annotations

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
