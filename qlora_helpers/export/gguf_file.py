"""Writes a merged model as a GGUF file: a tensor at a time, by the `gguf` package's writer and names.

What is written is read again, and compared with what it was made of. Knows nothing of runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.units import gib
from qlora_helpers.export.gguf_families import (
    INSTEAD,
    GgufFamily,
    extra_tensors,
    gguf_family,
    stored_as,
    write_settings,
)
from qlora_helpers.export.gguf_vocabulary import vocabulary, write_vocabulary
from qlora_helpers.export.serving_template import ServingTemplate
from qlora_helpers.model.stored_tensors import StoredTensor, stored_tensors

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

WRITTEN = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
"""Types of values that the `gguf` package writes; llama.cpp makes further ones from a bfloat16 file (`quantize`)."""
_LARGEST_F16 = 65504.0
# By how much of a block's largest value a weight may be off, for a step of the type's own: half a step, and its rounding to F16
_STEP = {
    "f32": 0.0,
    "f16": 2**-11,
    "bf16": 2**-8,
    "q8_0": 1 / 127,
    "q5_0": 1 / 16,
    "q5_1": 2 / 31,
    "q4_0": 1 / 8,
    "q4_1": 2 / 15,
}


@dataclass(frozen=True)
class About:
    """What a GGUF file says of its model besides weights and tokenizer.

    Attributes:
        name: of the model.
        base: the base model's name.
        base_licence, data: the base model's licence, and the name of the data with its licence.
        sampling: the settings that the answers were evaluated with, by GGUF's names (`temp`, `top_p`, `top_k`).
    """

    name: str
    base: str
    base_licence: str
    data: str
    sampling: Mapping[str, float]


@dataclass(frozen=True)
class GgufReport:
    """What was written and read back.

    Attributes:
        file: its name.
        architecture: GGUF's name of the family.
        kind: type of the values of its matrices.
        tensors: how many it holds.
        size_gib: of the file.
        largest_error: of any weight, as a share of the largest value of its block of 32.
        pre: llama.cpp's name of how the tokenizer splits text; empty for an adapter.
    """

    file: str
    architecture: str
    kind: str
    tensors: int
    size_gib: float
    largest_error: float
    pre: str = ""


def write_gguf(
    merged: Path,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    template: ServingTemplate,
    about: About,
    *,
    kind: str = "f16",
) -> GgufReport:
    """Writes a merged model as one GGUF file and reads it back.

    Args:
        merged: folder of the merged model.
        out: the file.
        tokenizer: the run's.
        template: what a server renders with.
        about: what the file says of the model.
        kind: one of `WRITTEN`; vectors stay in float32.

    Raises:
        ModelError: family, settings, tokenizer or weights can't be written so.
        OSError: the disk is full.
    """
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(merged, local_files_only=True, trust_remote_code=False)
    family = gguf_family(config)
    stored = stored_tensors(merged)
    rows = next(
        tensor.rows
        for name, tensor in stored.items()
        if name.endswith(("embed_tokens.weight", "word_embeddings.weight"))
    )
    found = vocabulary(tokenizer, rows)
    writer = gguf.GGUFWriter(out, family.architecture)
    name = f"{about.name} (strips white space behind control tokens, as phi-3 does)" if found.strips else about.name
    _write_about(writer, about, name, kind)
    write_settings(writer, config, family)
    write_vocabulary(writer, found, tokenizer, end=template.end, prompt=rendered(template, tokenizer, "a"))
    writer.add_chat_template(template.text)
    tensors = [*_tensors(stored, config, family), *_extra(config, family)]
    return written_file(writer, out, tensors, family, kind, found.pre)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a new file: its name, its shape, and what reads it in float32."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def _tensors(stored: Mapping[str, StoredTensor], config: Any, family: GgufFamily) -> Iterator[GgufTensor]:
    names = tensor_names(config, family)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    for name, tensor in stored.items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new == "output.weight" and tied:
            continue  # the embedding again
        if new is None and name.endswith(("rotary_emb.inv_freq", "attn.bias", "masked_bias")):
            continue  # computed from the settings
        if new is None:
            raise ModelError(f"GGUF has no name for {name}", next_step=INSTEAD)
        change = stored_as(name, config, family)
        yield GgufTensor(new, tensor.shape, reading(tensor, change))


def reading(tensor: StoredTensor, change: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[], torch.Tensor]:
    """Returns what reads a checkpoint's tensor in float32, changed into what GGUF holds."""

    def read() -> torch.Tensor:
        value = tensor.read().float()
        return value if change is None else change(value)

    return read


def tensor_names(config: Any, family: GgufFamily) -> Any:
    """Returns the `gguf` package's map from a checkpoint's names to GGUF's."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    return gguf.get_tensor_name_map(architecture, config.num_hidden_layers)


def _extra(config: Any, family: GgufFamily) -> Iterator[GgufTensor]:
    for name, value in extra_tensors(config, family).items():
        yield GgufTensor(name, tuple(value.shape), lambda value=value: value.float())  # type: ignore[misc]


def _write_about(writer: GGUFWriter, about: About, name: str, kind: str) -> None:
    import gguf

    writer.add_name(name)
    writer.add_file_type(int(gguf.LlamaFileType[_file_type(kind)]))
    if kind.startswith("q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_license(about.base_licence)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, about.base)
    writer.add_dataset_count(1)
    writer.add_dataset_name(0, about.data)
    for key, value in about.sampling.items():
        getattr(writer, f"add_sampling_{key}")(value)


def _file_type(kind: str) -> str:
    return "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"


def rendered(template: ServingTemplate, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Returns what a server renders for a question."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], chat_template=template.text, add_generation_prompt=True, tokenize=False
    )


def written_file(
    writer: GGUFWriter, out: Path, tensors: list[GgufTensor], family: GgufFamily, kind: str, pre: str
) -> GgufReport:
    """Writes tensors one by one, reads each back, and compares it.

    Args:
        writer: of the file, with all that is no tensor.
        out: the file.
        tensors: in the order in which they are written.
        family: of the model.
        kind: one of `WRITTEN`.
        pre: the splitting's name, for the report.

    Raises:
        ModelError: a value does not fit into its type, or was not written as it is.
    """
    import gguf
    import numpy as np

    kinds = [_kind_of(tensor, kind) for tensor in tensors]
    for tensor, own in zip(tensors, kinds, strict=True):
        quantization = gguf.GGMLQuantizationType[own.upper()]
        block, size = gguf.GGML_QUANT_SIZES[quantization]
        bytes_ = math.prod(tensor.shape) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), bytes_, raw_dtype=quantization)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, own in zip(tensors, kinds, strict=True):
            value = np.ascontiguousarray(tensor.read().numpy())
            if own == "f16" and np.abs(value).max(initial=0) > _LARGEST_F16:
                raise ModelError(f"{tensor.name} has values that F16 can't hold", next_step="Use --quantize bf16.")
            writer.write_tensor_data(gguf.quants.quantize(value, gguf.GGMLQuantizationType[own.upper()]))
    finally:
        writer.close()
    worst = _read_back(out, tensors, kinds)
    return GgufReport(out.name, family.architecture, kind, len(tensors), gib(out.stat().st_size), worst, pre)


def _kind_of(tensor: GgufTensor, kind: str) -> str:
    """Vectors stay in float32, as llama.cpp needs them; a matrix whose rows are no whole blocks stays in F16."""
    if len(tensor.shape) == 1:
        return "f32"
    return "f16" if kind.startswith("q") and tensor.shape[-1] % 32 else kind


def _read_back(path: Path, tensors: list[GgufTensor], kinds: list[str]) -> float:
    """Returns the largest error of a weight in the file, as a share of its block's largest value.

    Raises:
        ModelError: a tensor is missing, or further off than its type explains.
    """
    import gguf
    import numpy as np

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    worst = 0.0
    for tensor, kind in zip(tensors, kinds, strict=True):
        value = tensor.read().numpy()
        held = gguf.quants.dequantize(found[tensor.name].data, found[tensor.name].tensor_type).reshape(value.shape)
        width = 32 if value.shape[-1] % 32 == 0 else value.shape[-1]
        blocks, errors = np.abs(value).reshape(-1, width), np.abs(held - value).reshape(-1, width)
        allowed = 1.02 * _STEP[kind] * blocks.max(axis=1) + 2**-24
        if not (errors.max(axis=1) <= allowed).all():
            raise ModelError(f"{tensor.name} was not written as it is", next_step="Report this.")
        worst = max(worst, float((errors.max(axis=1) / np.maximum(blocks.max(axis=1), 2**-14)).max(initial=0)))
    return worst
