"""Tiny checkpoints of the families that are written as GGUF, and what their files are written with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chat_families import family_tokenizer
from tiny import FAMILIES as TINY
from tiny import tiny_model

from qlora_helpers.base.config import DataConfig
from qlora_helpers.export.gguf_families import FAMILIES
from qlora_helpers.export.gguf_file import About
from qlora_helpers.export.serving_template import ServingTemplate, serving_template

ABOUT = About("m", "base", "CC0-1.0", "rows (CC0-1.0)", {"temp": 0.0})


def chatml(kind: str = "chat") -> tuple[Any, ServingTemplate]:
    """A tokenizer of 440 tokens with its template."""
    tokenizer = family_tokenizer("chatml")
    return tokenizer, serving_template(DataConfig(template=kind), tokenizer)


def tiny_checkpoint(folder: Path, family: str, *, scale: float = 1.0, **more: Any) -> Path:
    """Saves a model of three layers, with grouped heads where the family has them and norms that are not all one."""
    import torch

    tokenizer, _ = chatml()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 5,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    }
    if "num_key_value_heads" in TINY[family]:
        settings["num_key_value_heads"] = 4 if family == "phi" else 2
    if "head_dim" in TINY[family]:
        settings["head_dim"] = 16
    if family in ("gemma2", "gemma3_text"):
        settings["query_pre_attn_scalar"] = 16
    if family == "falcon":
        settings["num_kv_heads"] = 2
    model = tiny_model(family, **settings | more)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
            parameter.mul_(scale)
    place = folder / family
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


assert set(FAMILIES) <= set(TINY)
