"""Writes an adapter alone as a GGUF file, which llama.cpp adds to a GGUF file of its base model.

B's rows change their order where those of the layer's weight do (`gguf_families`); A's columns never do. Knows nothing of runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import ModelError
from qlora_helpers.export.gguf_families import INSTEAD, GgufFamily, gguf_family, stored_as
from qlora_helpers.export.gguf_file import GgufReport, GgufTensor, reading, tensor_names, written_file
from qlora_helpers.model.adapter_files import ADAPTER_WEIGHTS, read_adapter_settings
from qlora_helpers.model.stored_tensors import StoredTensor, tensors_in


def write_adapter_gguf(base: Path, adapter: Path, out: Path, name: str) -> GgufReport:
    """Writes an adapter alone as GGUF, for `--lora` beside a GGUF file of its base model.

    Args:
        base: folder of the base model's checkpoint.
        adapter: folder of the saved adapter.
        out: the file.
        name: of the model.

    Raises:
        ModelError: llama.cpp can't add this adapter.
    """
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    family = gguf_family(config)
    settings = read_adapter_settings(adapter)
    _refuse_other_kinds(settings)
    scale = settings["lora_alpha"] * (math.sqrt(settings["r"]) if settings.get("use_rslora") else 1)
    writer = gguf.GGUFWriter(out, family.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scale)
    tensors = list(_adapter_tensors(tensors_in([adapter / ADAPTER_WEIGHTS]), config, family))
    return written_file(writer, out, tensors, family, "f32", "")


def _adapter_tensors(weights: Mapping[str, StoredTensor], config: Any, family: GgufFamily) -> Iterator[GgufTensor]:
    names = tensor_names(config, family)
    for stored, tensor in weights.items():
        layer, _, part = stored.removeprefix("base_model.model.").rpartition(".lora_")
        new = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if new is None or part not in ("A.weight", "B.weight"):
            raise ModelError(f"GGUF has no name for the adapter's {stored}", next_step=INSTEAD)
        change = stored_as(f"{layer}.weight", config, family) if part == "B.weight" else None
        yield GgufTensor(f"{new}.lora_{part[0].lower()}", tensor.shape, reading(tensor, change))


def _refuse_other_kinds(settings: Mapping[str, Any]) -> None:
    kinds = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters")
    refused = [key for key in kinds if settings.get(key)]
    if refused:
        raise ModelError(
            "llama.cpp takes plain LoRA alone", got=", ".join(refused), next_step="Use --to gguf: the merged model."
        )
