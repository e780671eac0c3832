"""From a checkpoint to an audited 4-bit model and its tokenizer.

Owns dtype and attention for the hardware, placement over GPUs, the padding token, and the audit after
loading. Knows nothing of adapters, data or run folders.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.allocator import use_expandable_segments
from qlora_helpers.checkpoints import Checkpoint, find_checkpoint
from qlora_helpers.config import ModelConfig
from qlora_helpers.errors import ModelError
from qlora_helpers.nf4 import (
    falcon_linears_as_plain,
    is_nf4,
    keep_gradients_exact_on_cpu,
    quantization_settings,
    stored_bytes,
    unpacked_numel,
)
from qlora_helpers.units import BYTES_IN_GIB, gib

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<|pad|>", "<pad>", "[PAD]", "<unk>", "[UNK]", ">>SUFFIX<<")


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

    def __repr__(self) -> str:
        return f"{self.checkpoint!r}\n{self.audit!r}"


def load_tokenizer(config: ModelConfig, *, say: Callable[[str], None] = print) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token that is not its end-of-text token."""
    return _tokenizer(find_checkpoint(config, say=say))


ALIKE = 1.05  # most free memory of a card by the least, up to which the plan takes them for the same
Spread = Callable[[int], tuple[int, ...] | None]
"""Told a number of GPUs, gives the decoder layers of each; None leaves it to accelerate, which counts weights alone."""


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

        from qlora_helpers.random_weights import build_random_model

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


@contextlib.contextmanager
def _clear_load_errors(name: str) -> Iterator[None]:
    """What goes wrong while a checkpoint's files are read becomes one `ModelError`."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(
            f"{name} does not fit on the GPU",
            next_step="Choose a smaller model or a larger GPU; notebook 08 shows what holds GPU memory.",
        ) from error
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        text = str(error)
        if "dispatched on the CPU or the disk" in text:
            raise ModelError(
                f"{name} does not fit on the GPUs within the limit",
                next_step="Raise model.max_memory_per_gpu_gib, use more or larger GPUs, or a smaller model.",
            ) from error
        if "custom code" in text or "trust_remote_code" in text or "model type" in text.lower():
            raise ModelError(
                f"{name} needs code that transformers does not hold itself, or is no causal language model",
                next_step="Code that comes with a model is never run here: choose a model that is native in transformers.",
            ) from error
        if "attention implementation" in text:
            raise ModelError(f"{name} has no such attention", next_step="Set model.attention=auto.") from error
        if "You set `ignore_mismatched_sizes`" in text:
            text = "its weights have other sizes than its config.json says"
        reason = (text.strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{name} could not be loaded ({reason})", next_step="Get its files again, or choose another model."
        ) from error


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


def on_a_gpu(config: ModelConfig) -> bool:
    """Whether a model is loaded onto GPUs: there are some, and nothing else was asked for."""
    import torch

    return config.device_map == "auto" and torch.cuda.is_available()


def device_map_argument(shape: Any, config: ModelConfig, spread: Spread) -> Any:
    """One process: spread over all GPUs, by the plan where it can. Under torchrun: each process has the whole model on its GPU.

    The plan takes all cards alike and empty. Where they are not alike, one holds something, or a limit on the weights is set,
    accelerate shares the model out.

    Args:
        shape: the model's transformers configuration.
        config: placement and limits.
        spread: how many decoder layers each of several GPUs gets.
    """
    import torch

    from qlora_helpers.device_maps import layer_map

    if not on_a_gpu(config):
        return {"": "cpu"}
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None:
        return {"": int(rank)}
    free = [torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())]
    if len(free) < 2 or max(free) > ALIKE * min(free) or config.max_memory_per_gpu_gib is not None:
        return "auto"
    counts = spread(len(free))
    return (counts and layer_map(shape, counts)) or "auto"


def _limits(config: ModelConfig) -> dict[int, int] | None:
    import torch

    if config.max_memory_per_gpu_gib is None:
        return None
    limit = int(config.max_memory_per_gpu_gib * BYTES_IN_GIB)
    return dict.fromkeys(range(torch.cuda.device_count()), limit)


def placement(shape: dict[str, Any], *, gpus: int, limit_gib: float) -> dict[str, float]:
    """Where `device_map="auto"` would put a model's weights, computed on the meta device: no GPU and no weights needed.

    Args:
        shape: the model's `config.json`.
        gpus: how many GPUs.
        limit_gib: memory allowed on each, GiB; transformers keeps 10 % of it free.

    Returns:
        GiB of weights by GPU.

    Raises:
        ModelError: they don't fit.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.accelerate import _get_device_map, compute_module_sizes
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(quantization_settings(ModelConfig(), torch.bfloat16))
    with falcon_linears_as_plain(), init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    quantizer.preprocess_model(model=model, device_map=None)
    limits = {index: int(limit_gib * BYTES_IN_GIB) for index in range(gpus)} | {"cpu": 0}
    try:
        with _without_device_warnings():
            devices = _get_device_map(model, "auto", limits, quantizer)
    except ValueError as error:
        raise ModelError(
            f"the weights don't fit on {gpus} GPU{'s' * (gpus != 1)} of {limit_gib:g} GiB",
            next_step="Use more or larger GPUs, or a smaller model.",
        ) from error
    sizes, _ = compute_module_sizes(model, quantizer)
    found: dict[str, float] = {}
    for module, device in devices.items():
        key = f"cuda:{device}" if isinstance(device, int) else str(device)
        found[key] = found.get(key, 0.0) + gib(sizes[module])
    return found


@contextlib.contextmanager
def _without_device_warnings() -> Iterator[None]:
    """accelerate warns that the GPUs asked about are not in this machine; that is the point of asking."""
    logger = logging.getLogger("accelerate.utils.modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _clear_load_errors(f"the tokenizer of {checkpoint.name}"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    tokenizer.clean_up_tokenization_spaces = False  # it would strip spaces from a byte-level tokenizer's text
    set_pad_token(tokenizer)
    return tokenizer


def set_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the tokenizer a padding token that is not its end-of-text token, without adding a row to the embedding.

    With `pad_token = eos_token`, as in the 2023 recipe, transformers' collator masks the label of every end-of-text token, and
    the model never learns to stop.

    Raises:
        ModelError: the vocabulary has no token to spare.
    """
    if tokenizer.eos_token is None:
        raise ModelError("the tokenizer has no end-of-text token", next_step="Choose another model.")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    spare = [token for token in PAD_TOKENS if token in vocabulary and token not in taken]
    spare += sorted(token for token in tokenizer.all_special_tokens if token not in taken)
    if not spare:
        raise ModelError("the tokenizer has no token to pad with", next_step="Choose another model.")
    tokenizer.pad_token = spare[0]
