"""Loads a checkpoint as a 4-bit model with its tokenizer, and audits what is in memory.

Owns dtype and attention for the hardware and the audit after loading. Knows nothing of adapters, data or run folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.place import at
from qlora_helpers.base.text import Say
from qlora_helpers.base.units import gib
from qlora_helpers.model.allocator import use_expandable_segments
from qlora_helpers.model.checkpoints import Checkpoint, find_checkpoint
from qlora_helpers.model.load_errors import load_errors_explained
from qlora_helpers.model.loading_folder import loading_folder
from qlora_helpers.model.nf4 import (
    falcon_linears_as_plain,
    is_nf4,
    keep_gradients_exact_on_cpu,
    quantization_settings,
    stored_bytes,
    unpacked_numel,
)
from qlora_helpers.model.placement import Spread, device_map_argument, memory_limits, on_a_gpu
from qlora_helpers.model.tokenizers import tokenizer_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadAudit:
    """What was found in memory after loading.

    Attributes:
        quantized, expected: linear layers that are in 4 bits, and how many should be.
        storage: `nf4`, or `none` where quantisation was off.
        gib_by_device: weights and buffers on each device, GiB.
        parameters: weights, two for each byte of a 4-bit layer.
        compute_dtype: the type that matrix multiplications run in.
        attention: the attention implementation.
    """

    quantized: int
    expected: int
    storage: str
    gib_by_device: dict[str, float]
    parameters: int
    compute_dtype: str
    attention: str

    def __repr__(self) -> str:
        devices = ", ".join(f"{value:.3g} GiB on {name}" for name, value in self.gib_by_device.items())
        layers = f"{self.quantized} of {self.expected} linear layers in {self.storage}"
        return (
            f"{self.parameters:,} parameters, {layers}\n"
            f"{devices}; matrix multiplications in {self.compute_dtype}, attention by {self.attention}"
        )


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with its tokenizer, checkpoint and audit."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Checkpoint
    audit: LoadAudit

    @property
    def shape(self) -> dict[str, Any]:
        """The model's `config.json`, as it is in memory."""
        return self.model.config.to_dict()

    def __repr__(self) -> str:
        return f"{self.checkpoint!r}\n{self.audit!r}"


@at("loading of the model")
def load_model(config: ModelConfig, *, spread: Spread = lambda gpus: None, say: Say = print) -> LoadedModel:
    """Loads a model, places it on the devices and audits what is in memory.

    Args:
        config: name, quantisation, dtype, attention and placement.
        spread: returns how many decoder layers each of so many GPUs gets, or None to leave it to accelerate.
        say: receives a line before anything that takes long.

    Raises:
        ModelError: the checkpoint can't be found or does not fit, or the loaded model is not what was asked for.
    """
    import torch

    if torch.cuda.is_available():
        use_expandable_segments()
    checkpoint = find_checkpoint(config, say=say)
    tokenizer = tokenizer_of(checkpoint)
    dtype = compute_dtype(config)
    attention = None if config.attention == "auto" else config.attention
    if checkpoint.shape is not None:
        from transformers import AutoConfig

        from qlora_helpers.model.random_weights import build_random_model

        places = device_map_argument(AutoConfig.for_model(**checkpoint.shape), config, spread)
        model = build_random_model(checkpoint.shape, config, dtype=dtype, attention=attention, places=places)
    else:
        model = _from_pretrained(checkpoint, config, dtype, attention, spread)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.use_cache = False
    _check_vocabulary(model, tokenizer)
    keep_gradients_exact_on_cpu(model)
    return LoadedModel(model, tokenizer, checkpoint, audit(model, config))


def compute_dtype(config: ModelConfig) -> torch.dtype:
    """Returns the type for matrix multiplications: bfloat16, float16 on GPUs that lack it, float32 on a CPU."""
    import torch

    if config.compute_dtype != "auto":
        return getattr(torch, config.compute_dtype)
    if config.device_map == "cpu" or not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _from_pretrained(
    checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, attention: str | None, spread: Spread
) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    with load_errors_explained(checkpoint.name), falcon_linears_as_plain(), loading_folder(checkpoint) as folder:
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=quantization_settings(config, dtype),
            dtype=dtype,
            attn_implementation=attention,
            device_map=device_map_argument(shape, config, spread),
            max_memory=memory_limits(config) if on_a_gpu(config) else None,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        model.config._name_or_path = model.name_or_path = str(checkpoint.folder)  # the folder of links is gone then
    missing = sorted(found["missing_keys"])  # transformers fills these with random values and goes on
    if missing:
        raise ModelError(
            f"{checkpoint.name} lacks {len(missing)} of its weights, {missing[0]} first",
            next_step="Its files are incomplete, or belong to another model than its config.json describes: get them again.",
        )
    return model


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.get_input_embeddings().num_embeddings
    for kind, token in (("padding", tokenizer.pad_token_id), ("end-of-text", tokenizer.eos_token_id)):
        if token >= rows:
            raise ModelError(
                f"the tokenizer's {kind} token has no row in the model's embedding",
                expected=f"a number below {rows}",
                got=str(token),
                next_step="Get the tokenizer that belongs to the model, or choose another model.",
            )


def audit(model: PreTrainedModel, config: ModelConfig) -> LoadAudit:
    """Checks that the model in memory is the one that was asked for, and measures it.

    Every linear layer but the output head must be in 4 bits. `is_loaded_in_4bit` alone is True even where transformers skipped
    every layer, as it does for Falcon without `falcon_linears_as_plain`.

    Raises:
        ModelError: a layer is not in 4 bits, or a weight is on the meta device or on disk.
    """
    import torch

    lost = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if lost:
        raise ModelError(
            f"{len(lost)} weights are not in memory, {lost[0]} first",
            next_step="The model did not fit: raise model.max_memory_per_gpu_gib, or use more GPUs or a smaller model.",
        )
    head = model.get_output_embeddings()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    quantized = [name for name, module in linears.items() if is_nf4(module)]
    missing = sorted(set(linears) - set(quantized))
    if config.quantization == "nf4" and (missing or not linears):
        raise ModelError(
            "the model was not quantised as asked",
            expected=f"{len(linears)} linear layers in 4-bit NF4",
            got=f"{len(quantized)}; {missing[0] if missing else 'no layer'} is not",
            next_step="Set model.quantization=none to train it in bfloat16, or choose another model.",
        )
    by_device: dict[str, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        by_device[str(tensor.device)] = by_device.get(str(tensor.device), 0) + stored_bytes(tensor)
    return LoadAudit(
        quantized=len(quantized),
        expected=len(linears),
        storage=config.quantization,
        gib_by_device={name: gib(size) for name, size in sorted(by_device.items())},
        parameters=sum(unpacked_numel(parameter) for parameter in model.parameters()),
        compute_dtype=str(compute_dtype(config)).removeprefix("torch."),
        attention=str(model.config._attn_implementation),
    )
