"""Counts the parameters of a model and of its adapters: 4-bit layers by their shape before they were packed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import AdapterConfig
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.model.blueprint import meta_model
from qlora_helpers.model.lora import add_adapters
from qlora_helpers.model.nf4 import unpacked_numel

if TYPE_CHECKING:
    import torch


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
        """The share that is trained, %, of all parameters."""
        return 100 * self.trainable / self.total

    @property
    def published_percent(self) -> float:
        """The share that is trained, %, of the parameters as they were published."""
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


@dataclass(frozen=True)
class AdapterSize:
    """The adapters on all layers of one name and size.

    Attributes:
        name: last part of the layers' names; of stacks of experts, the last two.
        in_features, out_features: of one layer, or of one expert.
        layers: how many layers, or stacks, there are.
        parameters: of all their adapters: `r * (in + out)` per layer or expert, and with DoRA `out` magnitudes more.
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
    from qlora_helpers.model import targets

    found: dict[tuple[str, int, int], int] = {}
    for path in targets.target_paths(model, config):
        key = (path.rsplit(".", 1)[-1], *targets.sizes(model.get_submodule(path)))
        found[key] = found.get(key, 0) + 1
    sizes = [
        AdapterSize(name, inputs, outputs, layers, layers * (config.r * (inputs + outputs) + config.use_dora * outputs))
        for (name, inputs, outputs), layers in found.items()
    ]
    shapes, stacks = targets.stacks(model), Counter[tuple[str, int, int, int]]()
    for path in targets.stack_paths(model, config):
        experts, rows, columns = shapes[path]
        turned = getattr(model.get_submodule(path.rpartition(".")[0]), "is_transposed", False)
        name = ".".join(path.split(".")[-2:])
        stacks[(name, experts, rows, columns) if turned else (name, experts, columns, rows)] += 1
    return (
        *sizes,
        *(
            AdapterSize(name, inputs, outputs, layers, layers * experts * config.r * (inputs + outputs))
            for (name, experts, inputs, outputs), layers in stacks.items()
        ),
    )


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
    from transformers import AutoConfig

    model = meta_model(AutoConfig.for_model(**shape))
    head = model.get_output_embeddings()
    packed = sum(
        module.weight.numel() // 2
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    with torch.device("meta"):
        count = count_parameters(add_adapters(model, config, seed=0))
    return ParameterCount(count.trainable, count.total, count.total - packed)
