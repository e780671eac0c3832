"""Adds LoRA adapters to a loaded model, and counts parameters as they were before they were packed.

Takes a model and a small `AdapterConfig`, and returns peft's model. Knows nothing of data, training or run folders.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import AdapterConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.model.adapter_files import check_adapter
from qlora_helpers.model.nf4 import unpacked_numel
from qlora_helpers.model.shapes.families import adapter_targets

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


@dataclass(frozen=True)
class ParameterCount(Tabular):
    """Parameters of a model with adapters.

    Attributes:
        trainable: adapter parameters.
        total: all parameters, two for each byte of a 4-bit layer.
        published_total: all parameters as the 2023 recipe published them and as peft's `print_trainable_parameters` counts for
            some storage types: each stored byte of a 4-bit layer as one parameter, so two weights as one.
    """

    trainable: int
    total: int
    published_total: int

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total

    @property
    def published_percent(self) -> float:
        return 100 * self.trainable / self.published_total

    def table(self) -> Table:
        """Returns the counts, and the share that is trained by either way of counting."""
        rows = [
            ["trainable", f"{self.trainable:,}", ""],
            ["all parameters", f"{self.total:,}", f"{self.percent:.4f} % trained"],
            [
                "published way",
                f"{self.published_total:,}",
                f"{self.published_percent:.4f} % (counts two 4-bit weights as one)",
            ],
        ]
        return Table((), rows, numbers=(1,))


def target_modules(model: torch.nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """Returns the names of the layers that get an adapter: the user's choice, else the architecture's, else all linear layers.

    Raises:
        ModelError: a name that the user gave is not a linear layer of the model, or the model has none.
    """
    available = linear_layer_names(model)
    if config.target_modules is None:
        known = adapter_targets(model.config.to_dict()) or ()
        found = tuple(name for name in known if name in available) or tuple(sorted(available))
        if not found:
            raise ModelError("the model has no linear layers in its decoder layers", next_step="Choose another model.")
        return found
    unknown = [name for name in config.target_modules if name not in available]
    if unknown:
        raise ModelError(
            "adapter.target_modules names layers that the model does not have",
            expected="some of " + ", ".join(sorted(available)),
            got=", ".join(unknown),
            next_step="Set adapter.target_modules=none to take the architecture's default.",
        )
    return config.target_modules


def linear_layer_names(model: torch.nn.Module) -> set[str]:
    """Returns the last parts of the names of all linear layers but the output head, such as `{"q_proj", ...}`, 4-bit or not."""
    import torch

    head = model.get_output_embeddings()
    return {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and not name.endswith("lm_head")
    }


@dataclass(frozen=True)
class AdapterSize:
    """The adapters on all layers of one name and size.

    Attributes:
        name: last part of the layers' names.
        in_features, out_features: of one layer.
        layers: how many layers there are.
        parameters: of all their adapters: `r * (in + out)` per layer, and with DoRA `out` magnitudes more.
    """

    name: str
    in_features: int
    out_features: int
    layers: int
    parameters: int


def adapter_sizes(model: torch.nn.Module, config: AdapterConfig) -> tuple[AdapterSize, ...]:
    """Computes the sizes of the adapters that a model would get, without adding them.

    Raises:
        ModelError: unknown target layers.
    """
    import torch

    targets = target_modules(model, config)
    found: dict[tuple[str, int, int], int] = {}
    for path, module in model.named_modules():
        name = path.rsplit(".", 1)[-1]
        if name in targets and isinstance(module, torch.nn.Linear):
            key = (name, module.in_features, module.out_features)
            found[key] = found.get(key, 0) + 1
    return tuple(
        AdapterSize(name, inputs, outputs, layers, layers * (config.r * (inputs + outputs) + config.use_dora * outputs))
        for (name, inputs, outputs), layers in found.items()
    )


def add_adapters(model: torch.nn.Module, config: AdapterConfig, *, seed: int) -> PeftModel:
    """Freezes the model and adds LoRA adapters in float32 beside the chosen layers.

    B starts at zero, so the adapted model answers as before until it is trained (Hu et al. 2021, section 4.1).

    Args:
        model: a causal language model, 4-bit or not.
        config: rank, scale, dropout and targets.
        seed: for the random values of A.

    Raises:
        ModelError: unknown target layers, or the model has adapters already.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    if hasattr(model, "peft_config"):
        raise ModelError(
            "the model has adapters already", next_step="Load the model again (notebook 01), then add them."
        )
    torch.manual_seed(seed)
    model.requires_grad_(False)
    settings = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(target_modules(model, config)),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with _without_deprecation_noise():
            return get_peft_model(model, settings)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:  # as for Mamba's convolutions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"adapters can't be added to this model ({reason})",
            next_step="Set adapter.target_modules to other layers, or choose another model.",
        ) from error


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


def load_adapter(model: torch.nn.Module, folder: str | os.PathLike[str]) -> PeftModel:
    """Adds a saved adapter to a freshly loaded base model.

    Args:
        model: the base model, without adapters.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ModelError: the files are damaged, or belong to an adapter for another model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        check_adapter(Path(folder))
        with _without_deprecation_noise():
            return PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    except ModelError as error:
        raise ModelError(
            f"the saved adapter could not be loaded ({error.problem})",
            expected=error.expected,
            got=error.got,
            next_step=error.next_step,
        ) from error
    except (SafetensorError, ValueError, TypeError, RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the saved adapter could not be loaded ({reason})",
            next_step="Train the run again: it takes its newest good checkpoint and saves the adapter once more.",
        ) from error


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
def _without_deprecation_noise() -> Iterator[None]:
    """Silences a warning that a reader can do nothing about: peft uses transformers' old names for activation checkpointing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield


def count_parameters(model: torch.nn.Module) -> ParameterCount:
    """Counts a model's parameters: 4-bit layers by their shape before they were packed, tied weights once."""
    trainable = total = published = 0
    for parameter in model.parameters():
        stored = parameter.numel()
        total += unpacked_numel(parameter)
        published += stored
        trainable += stored if parameter.requires_grad else 0
    return ParameterCount(trainable, total, published)


def count_from_shape(shape: dict[str, Any], config: AdapterConfig) -> ParameterCount:
    """Counts the parameters of a model from its shape, on the meta device: it needs no memory and no weights.

    Args:
        shape: the model's `config.json`.
        config: rank and targets of the adapters.

    Returns:
        The count; `published_total` as if every linear layer of the decoder layers were packed, two weights to a byte.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    model.tie_weights()
    head = model.get_output_embeddings()
    packed = sum(
        module.weight.numel() // 2
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    with torch.device("meta"):
        count = count_parameters(add_adapters(model, config, seed=0))
    return ParameterCount(count.trainable, count.total, count.total - packed)
