"""Adds LoRA adapters to a loaded model, and removes and compares them.

Takes a model and a small `AdapterConfig`, and returns peft's model. `adapter_loading` adds a saved adapter, and `parameter_counts`
counts. Knows nothing of data, training or run folders.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers.base.config import AdapterConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.text import Say
from qlora_helpers.model.nf4 import keep_gradients_exact_on_cpu, unpack_rightly_on_cpu

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel


def target_modules(model: torch.nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """Returns names of the linear layers that get an adapter, as peft matches them (`targets.target_paths`, `targets.shortened`).

    Raises:
        ModelError: a name that the user gave is not a linear layer of the model, or the model has none.
    """
    from qlora_helpers.model import targets

    return targets.shortened(model, targets.target_paths(model, config), config.target_modules)


def linear_layer_names(model: torch.nn.Module) -> set[str]:
    """Returns the last parts of the names of the linear layers that may have an adapter, such as `{"q_proj", ...}`."""
    from qlora_helpers.model import targets

    return set(targets.last_names(targets.linear_layers(model)))


def add_adapters(model: torch.nn.Module, config: AdapterConfig, *, seed: int, say: Say = print) -> PeftModel:
    """Freezes the model and adds LoRA adapters in float32 beside the chosen layers.

    B starts at zero, so the adapted model answers as before until it is trained (Hu et al. 2021, section 4.1).

    Args:
        model: a causal language model, 4-bit or not.
        config: rank, scale, dropout and targets.
        seed: for the random values of A.
        say: receives a line on layers that get no adapter because training would not reach them.

    Raises:
        ModelError: unknown target layers, the model has adapters already, or it can't be trained.
    """
    import torch

    from qlora_helpers.model import targets
    from qlora_helpers.model.peft_names import take_names_literally

    _refuse_unfit(model, config)
    model.requires_grad_(False)
    unpack_rightly_on_cpu()  # as `load_model` does: the model may have been loaded otherwise
    keep_gradients_exact_on_cpu(model)
    linears, stacks = _reached_targets(model, config, say)
    settings = _peft_settings(model, config, linears, stacks)
    torch.manual_seed(seed)
    take_names_literally(model)
    adapted = _adapted(model, settings, stacks)
    if not any(parameter.is_meta for parameter in model.parameters()):
        with removed_on_error(adapted):
            targets.refuse_what_adapters_break(adapted)
    return adapted


def _refuse_unfit(model: torch.nn.Module, config: AdapterConfig) -> None:
    """Refuses a model that has adapters already, and DoRA where no process has whole weights."""
    from qlora_helpers.model.sharding import is_sharded

    if hasattr(model, "peft_config"):
        raise ModelError(
            "the model has adapters already", next_step="Load the model again (notebook 01), then add them."
        )
    if config.use_dora and is_sharded(model):
        raise ModelError(
            "DoRA reads whole weights, which no process has where layers are shared out",
            next_step="Set adapter.use_dora=false, or train.share=copies.",
        )


def _peft_settings(
    model: torch.nn.Module, config: AdapterConfig, linears: tuple[str, ...], stacks: tuple[str, ...]
) -> LoraConfig:
    """Returns peft's settings for adapters on these linear layers and stacks of experts, given by their paths."""
    from peft import LoraConfig

    from qlora_helpers.model import targets

    names = targets.shortened(model, linears, config.target_modules)
    return LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(names),
        fan_in_fan_out=_is_transposed(model, names),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias="none",
        task_type="CAUSAL_LM",
        target_parameters=targets.shortened_stacks(model, stacks) or None,
    )


def _adapted(model: torch.nn.Module, settings: LoraConfig, stacks: tuple[str, ...]) -> PeftModel:
    """Adds the adapters, and explains peft's refusal as a `ModelError`."""
    from peft import get_peft_model

    from qlora_helpers.model.expert_adapters import open_all, stacks_adapted

    open_all(model, stacks)
    try:
        with without_deprecation_noise(), stacks_adapted(model):
            return get_peft_model(model, settings)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:  # as for Mamba's convolutions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"adapters can't be added to this model ({reason})",
            next_step="Set adapter.target_modules to other layers, or choose another model.",
        ) from error


def _reached_targets(
    model: torch.nn.Module, config: AdapterConfig, say: Say
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the linear layers and the stacks to adapt that a backward pass reaches, and says which it does not reach."""
    from qlora_helpers.model import targets
    from qlora_helpers.model.shapes.expert_targets import refuse_on_experts

    linears, stacks = targets.target_paths(model, config), targets.stack_paths(model, config)
    if stacks:
        refuse_on_experts(config)
    for name in targets.without_experts(model, config):
        say(f"{name} means the linear layers of that name; the experts' are experts.{name}")
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    holders = dict.fromkeys(path.rpartition(".")[0] for path in stacks)
    paths = (*linears, *holders)
    apart = [] if on_meta else targets.without_gradient(model, paths)
    if len(apart) == len(paths):
        raise ModelError(
            "no gradient reaches the layers that were to get adapters",
            got=", ".join(targets.last_names(apart)),
            next_step="Set adapter.target_modules=none, or choose another model.",
        )
    if apart:
        say(f"{len(apart)} layers get no adapter, because no gradient reaches them: {', '.join(apart[:3])} ...")
    return tuple(path for path in linears if path not in apart), tuple(
        path for path in stacks if path.rpartition(".")[0] not in apart
    )


def _is_transposed(model: torch.nn.Module, names: tuple[str, ...]) -> bool:
    """Whether the layers keep their weights as `(in, out)`, as GPT-2's do where they are not in 4 bits."""
    from transformers.pytorch_utils import Conv1D

    return any(
        isinstance(module, Conv1D) and path.rpartition(".")[2] in {name.rpartition(".")[2] for name in names}
        for path, module in model.named_modules()
    )


def remove_adapters(model: PeftModel) -> None:
    """Removes the adapters from a base model, which then is as before `add_adapters` except that it stays frozen."""
    base = model.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config


@contextlib.contextmanager
def removed_on_error(model: PeftModel) -> Iterator[None]:
    """Removes the adapters if the block fails, so that the next attempt can add its own."""
    try:
        yield
    except BaseException:
        remove_adapters(model)
        raise


def adapter_difference(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> float:
    """Returns the largest difference between corresponding weights of two saved adapters; 0.0 if they are equal to the bit.

    Args:
        first, second: folders that hold `adapter_model.safetensors`.

    Raises:
        ModelError: they have different layers or ranks.
    """
    from safetensors.torch import load_file

    one, other = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (first, second))
    shapes = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in (one, other)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            "the two adapters can't be compared",
            expected="the same layers and ranks",
            next_step="Compare adapters of runs with the same adapter settings.",
        )
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


@contextlib.contextmanager
def without_deprecation_noise() -> Iterator[None]:
    """Silences a warning that a reader can do nothing about: peft uses transformers' old names for activation checkpointing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield
