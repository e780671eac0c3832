"""From a checkpoint to an audited 4-bit model and its tokenizer.

Owns dtype and attention for the hardware, placement over GPUs, the padding token, and the audit after
loading. Knows nothing of adapters, data or run folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.units import gib
from qlora_helpers.model.checkpoints import Checkpoint, find_checkpoint
from qlora_helpers.model.load_errors import _clear_load_errors
from qlora_helpers.model.nf4 import (
    falcon_linears_as_plain,
    is_nf4,
    keep_gradients_exact_on_cpu,
    quantization_settings,
    stored_bytes,
    unpacked_numel,
)
from qlora_helpers.model.placement import Spread, _limits, device_map_argument, on_a_gpu
from qlora_helpers.model.tokenizers import _tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadAudit:
    """What was found in memory after loading.

    Attributes:
        quantized, expected: linear layers in 4 bits, and how many should be.
        storage: `nf4`, or `none` where quantisation was off.
        gib_by_device: weights and buffers on each device.
        parameters: weights, two for each byte of a 4-bit layer.
        compute_dtype, attention: what the products and the attention run in.
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
            f"{devices}; products in {self.compute_dtype}, attention by {self.attention}"
        )


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with all that belongs to it."""

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


def load_model(
    config: ModelConfig, *, spread: Spread = lambda gpus: None, say: Callable[[str], None] = print
) -> LoadedModel:
    """Loads a model as asked, places it over the devices and audits what is in memory.

    Args:
        config: name, quantisation, dtype, attention and placement.
        spread: how many decoder layers each of several GPUs gets.
        say: told what takes long.

    Raises:
        ModelError: the checkpoint can't be had, does not fit, or is not what was asked for after loading.
    """
    import torch

    if torch.cuda.is_available():
        use_expandable_segments()
    checkpoint = find_checkpoint(config, say=say)
    tokenizer = _tokenizer(checkpoint)
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
    """The type of the matrix products: bfloat16 where the GPU has it, float16 only where it has not, float32 on a CPU."""
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

    with _clear_load_errors(checkpoint.name), falcon_linears_as_plain():
        shape = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        model, found = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            quantization_config=quantization_settings(config, dtype),
            dtype=dtype,
            attn_implementation=attention,
            device_map=device_map_argument(shape, config, spread),
            max_memory=_limits(config) if on_a_gpu(config) else None,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(found["missing_keys"])  # transformers fills these with random values and goes on
    if missing:
        raise ModelError(
            f"{checkpoint.name} lacks {len(missing)} of its weights, {missing[0]} first",
            next_step="Its files are incomplete, or not of the model that its config.json describes: get it again.",
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

    Every linear layer but the output head has to be a 4-bit one: `is_loaded_in_4bit` alone is True even where transformers
    skipped every layer, as it does for Falcon without the shim.

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
            next_step="Set model.quantization=none to train it in 16 bits, or choose another model.",
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


VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


NAME = "expandable_segments"


def use_expandable_segments() -> bool:
    """Turns expandable segments on, in this process and those that it starts.

    Set after torch was imported, PyTorch's variable changes nothing on CUDA (torch 2.11: a step of the 2023 recipe on Falcon-40B
    reserved 51 GiB, and 41 once the running allocator was told too, as here). Segments that are there stay as they are.
    (PyTorch's notes on CUDA, "Optimizing memory usage with PYTORCH_ALLOC_CONF".)

    Returns:
        False where a variable says that they shall not be used; nothing is changed then.
    """
    import torch

    chosen = [os.environ[name] for name in VARIABLES if os.environ.get(name)]
    if any(f"{NAME}:false" in each.lower() for each in chosen):
        return False
    if not any(NAME in each for each in chosen):
        chosen = [",".join([*chosen[:1], f"{NAME}:True"])]
        os.environ[VARIABLES[0]] = chosen[0]
    tell = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    tell(chosen[0])
    return True


def segments_expand() -> bool:
    """Whether memory that PyTorch holds on a GPU lies in such segments."""
    import torch

    return any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())
