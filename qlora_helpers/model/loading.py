"""Loads a checkpoint as a 4-bit model with its tokenizer, and audits what is in memory.

Owns dtype and attention for the hardware and the audit after loading. Knows nothing of adapters, data or run folders.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.place import at
from qlora_helpers.base.text import Say
from qlora_helpers.model.allocator import use_expandable_segments
from qlora_helpers.model.audit import LoadAudit, audit
from qlora_helpers.model.blueprint import model_class
from qlora_helpers.model.checkpoints import Checkpoint, find_checkpoint
from qlora_helpers.model.load_errors import load_errors_explained
from qlora_helpers.model.loading_folder import loading_folder
from qlora_helpers.model.nf4 import (
    compute_dtype,
    falcon_linears_as_plain,
    keep_gradients_exact_on_cpu,
    quantization_settings,
    set_compute_dtype,
    unpack_rightly_on_cpu,
)
from qlora_helpers.model.placement import Spread, device_map_argument, memory_limits, on_a_gpu
from qlora_helpers.model.stored_formats import is_stored_in_nf4, left_out_of_nf4
from qlora_helpers.model.tokenizers import tokenizer_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qlora_helpers.model.sharding import PartKeeper
    from qlora_helpers.model.shares import Sharing


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
def load_model(
    config: ModelConfig, *, spread: Spread = lambda gpus: None, sharing: Sharing | None = None, say: Say = print
) -> LoadedModel:
    """Loads a model, places it on the devices and audits what is in memory.

    Args:
        config: name, quantisation, dtype, attention and placement.
        spread: returns how many decoder layers each of so many GPUs gets, or None to leave it to accelerate.
        sharing: how the processes share the model, which have joined; None where each has the whole model.
        say: receives a line before anything that takes long.

    Raises:
        ModelError: the checkpoint can't be found or does not fit, or the loaded model is not what was asked for.
    """
    import torch

    from qlora_helpers.model.sharding import PartKeeper, share_layers
    from qlora_helpers.model.short_convolutions import keep_rows_apart

    if torch.cuda.is_available():
        use_expandable_segments()
    unpack_rightly_on_cpu()
    checkpoint = find_checkpoint(config, say=say)
    tokenizer = tokenizer_of(checkpoint)
    dtype = compute_dtype(config)
    attention = None if config.attention == "auto" else config.attention
    mesh = None if sharing is None else sharing.mesh("cuda" if on_a_gpu(config) else "cpu")
    keeper = None if mesh is None else PartKeeper(mesh)
    one_gpu = sharing is not None and sharing.one_gpu
    if mesh is not None and config.quantization != "nf4":
        raise ModelError(
            "only 4-bit weights are shared out over several processes",
            got=f"model.quantization={config.quantization}",
            next_step="Set model.quantization=nf4, or train.share=copies.",
        )
    if checkpoint.shape is not None:
        from transformers import AutoConfig

        from qlora_helpers.model.random_weights import build_random_model

        places = device_map_argument(AutoConfig.for_model(**checkpoint.shape), config, spread, one_gpu=one_gpu)
        model = build_random_model(
            checkpoint.shape, config, dtype=dtype, attention=attention, places=places, keeper=keeper
        )
    else:
        model = _from_pretrained(checkpoint, config, dtype, attention, spread, keeper, one_gpu)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.use_cache = False
    _check_vocabulary(model, tokenizer)
    keep_rows_apart(model)
    keep_gradients_exact_on_cpu(model)
    if mesh is not None:
        share_layers(model, mesh)
    left_out = left_out_of_nf4(checkpoint.folder) if config.quantization == "nf4" else ()
    return LoadedModel(model, tokenizer, checkpoint, audit(model, config, left_out=left_out))


def _from_pretrained(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    attention: str | None,
    spread: Spread,
    keeper: PartKeeper | None,
    one_gpu: bool,
) -> PreTrainedModel:
    from transformers import AutoConfig

    from qlora_helpers.model.quantizer import stacks_quantised

    packed = config.quantization == "nf4" and is_stored_in_nf4(checkpoint.folder)  # then its own settings are right
    with (
        load_errors_explained(checkpoint.name),
        falcon_linears_as_plain(),
        stacks_quantised(keeper),
        keeper.loading() if keeper else nullcontext(),
        loading_folder(checkpoint) as folder,
    ):
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        more = {} if packed else {"quantization_config": quantization_settings(config, dtype)}
        model, found = model_class(shape).from_pretrained(
            folder,
            **more,
            dtype=dtype,
            attn_implementation=attention,
            device_map=device_map_argument(shape, config, spread, one_gpu=one_gpu),
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
    _refuse_unread_parts(checkpoint.name, model, sorted(found["unexpected_keys"]))
    set_compute_dtype(model, dtype)
    return model


def _refuse_unread_parts(name: str, model: PreTrainedModel, unread: list[str]) -> None:
    """Refuses a checkpoint that has more of a linear layer than its weight and bias, such as the scale of a packed weight."""
    import torch

    linears = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    parts = [key for key in unread if any(key.startswith(f"{path}.") for path in _parents(key) if path in linears)]
    if parts:
        raise ModelError(
            f"{name} holds {len(parts)} parts of linear layers that would not be read, {parts[0]} first",
            next_step="Its weights are packed in a form that its config.json does not name: choose the unquantised checkpoint.",
        )


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


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
