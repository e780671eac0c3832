"""How large a model is and what its layers are made of, from its `config.json` alone: no torch, no download.

Counts what transformers 5 builds and what bitsandbytes then stores in 4 bits: the `nn.Linear` modules of the decoder layers and
nothing else. How a family is wired is in `wirings`. Knows nothing of bytes, devices or training; the memory planner builds on it.
"""

from __future__ import annotations

from collections.abc import Iterable

from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.shapes.counted import counted_sizes
from qlora_helpers.model.shapes.decoder import LinearLayer, ModelSizes
from qlora_helpers.model.shapes.expert_targets import EXPERTS, ends, named_stacks
from qlora_helpers.model.shapes.families import adapter_targets
from qlora_helpers.model.shapes.values import Shape, family_of
from qlora_helpers.model.shapes.wirings import DEFAULTS, WIRINGS


def model_sizes(config: Shape) -> ModelSizes:
    """Returns the sizes of a model: by arithmetic for listed families, else counted on what transformers builds of it.

    Args:
        config: a model's `config.json`, raw or with its defaults filled in. Of a multimodal model the text part is meant: the
            vision tower that transformers loads with it is counted apart (`beside_text`).

    Raises:
        ModelError: a size is missing or larger than any model's, or transformers does not build such a model.
    """
    family = family_of(config)
    if family not in WIRINGS or not _uniform(family, config):
        return counted_sizes(config)
    return WIRINGS[family](family, DEFAULTS.get(family, {}) | config | {"model_type": family})


def _uniform(family: str, config: Shape) -> bool:
    """Whether all decoder layers have the same parts: Qwen's mixtures may have some without experts."""
    sparse = config.get("decoder_sparse_step")
    return family != "qwen3_moe" or (sparse in (None, 1) and not config.get("mlp_only_layers"))


def adapter_parameters(config: Shape, r: int, target_modules: tuple[str, ...] | None, use_dora: bool) -> int:
    """Counts trainable weights of LoRA adapters: `r * (in + out)` a linear layer or expert, with DoRA `out` magnitudes more.

    Hu et al. 2021, arXiv:2106.09685; DoRA: Liu et al. 2024, arXiv:2402.09353.

    Args:
        config: the model's `config.json`.
        r: rank.
        target_modules: names or paths of layers; None takes the family's own, or all linear layers where none are listed.
        use_dora: whether each output of a linear layer also gets a magnitude.

    Raises:
        ModelError: no layer has one of the names, or a size is missing.
    """
    sizes = model_sizes(config)
    available = {layer.name for layer in sizes.linears}
    stacks = adapted_stacks(sizes, target_modules)
    unknown = _unknown(sizes, target_modules or ())
    if unknown:
        raise ModelError(
            "target_modules names layers that the model does not have",
            expected="some of " + ", ".join(sorted(available) + [EXPERTS] * bool(sizes.expert_stacks)),
            got=", ".join(unknown),
            next_step="Set adapter.target_modules=none to take the architecture's own.",
        )
    named = target_modules or adapter_targets(config) or available
    of_linears = [name for name in named if not adapted_stacks(sizes, (name,))]
    wanted = {name.rpartition(".")[2] for name in of_linears}  # of a path, all layers of its last name: a few too many
    linears = [layer for layer in sizes.linears if layer.name in wanted]
    weights = sum(layer.per_layer * r * (layer.in_features + layer.out_features) for layer in (*linears, *stacks))
    magnitudes = use_dora * sum(layer.per_layer * layer.out_features for layer in linears)
    return round(sizes.layers * (weights + magnitudes))


def adapted_stacks(sizes: ModelSizes, target_modules: tuple[str, ...] | None) -> tuple[LinearLayer, ...]:
    """Returns the stacks of experts that get an adapter; of a path, the stacks of its name in all layers."""
    stacks, linears = {layer.name: layer for layer in sizes.expert_stacks}, [layer.name for layer in sizes.linears]
    ends_of_paths = [_shortened(name, stacks) for name in target_modules or ()]
    return tuple(stacks[name] for name in named_stacks(ends_of_paths, linears, list(stacks)))


def _shortened(name: str, stacks: Iterable[str]) -> str:
    """Returns the stack, or its holder, in which a path ends; other names as they are."""
    known = {*stacks, *(stack.rpartition(".")[0] for stack in stacks)}
    return next((each for each in sorted(known, key=len, reverse=True) if each and ends(name, each)), name)


def _unknown(sizes: ModelSizes, names: tuple[str, ...]) -> list[str]:
    linears = {layer.name for layer in sizes.linears}
    return sorted(
        name for name in names if name.rpartition(".")[2] not in linears and not adapted_stacks(sizes, (name,))
    )
