"""How large a model is and what its layers are made of, from its `config.json` alone: no torch, no download.

Counts what transformers 5 builds and what bitsandbytes then stores in 4 bits: the `nn.Linear` modules of the decoder layers and
nothing else. How a family is wired is in `wirings`. Knows nothing of bytes, devices or training; the memory planner builds on it.
"""

from __future__ import annotations

from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.shapes.counted import counted_sizes
from qlora_helpers.model.shapes.decoder import ModelSizes
from qlora_helpers.model.shapes.families import adapter_targets
from qlora_helpers.model.shapes.values import Shape, family_of
from qlora_helpers.model.shapes.wirings import DEFAULTS, WIRINGS


def model_sizes(config: Shape) -> ModelSizes:
    """Returns the sizes of a model: by arithmetic for listed families, else counted on what transformers builds of it.

    Args:
        config: a model's `config.json`, raw or with its defaults filled in. Of a multimodal model the text part is meant: the
            vision tower that transformers loads with it is counted apart where it is known (`beside_text`).

    Raises:
        ModelError: a size is missing or larger than any model's, or transformers does not build such a model.
    """
    family = family_of(config)
    if family == "gemma3":
        family, config = "gemma3_text", config.get("text_config") or {}
        if not isinstance(config, dict):
            raise ModelError(
                "the text_config of a config.json is not an object", next_step="Give the model's own config.json."
            )
    if family not in WIRINGS or not _uniform(family, config):
        return counted_sizes(config)
    return WIRINGS[family](family, DEFAULTS.get(family, {}) | config | {"model_type": family})


def _uniform(family: str, config: Shape) -> bool:
    """Whether all decoder layers have the same parts: Qwen's mixtures may have some without experts."""
    sparse = config.get("decoder_sparse_step")
    return family != "qwen3_moe" or (sparse in (None, 1) and not config.get("mlp_only_layers"))


def adapter_parameters(config: Shape, r: int, target_modules: tuple[str, ...] | None, use_dora: bool) -> int:
    """Counts trainable weights of LoRA adapters: `r * (in + out)` a linear layer, and `out` magnitudes more with DoRA.

    Hu et al. 2021, arXiv:2106.09685; DoRA: Liu et al. 2024, arXiv:2402.09353.

    Args:
        config: the model's `config.json`.
        r: rank.
        target_modules: names or paths of linear layers; None takes the family's own, or all where none are listed.
        use_dora: whether each output also gets a magnitude.

    Raises:
        ModelError: no linear layer has one of the names, or a size is missing.
    """
    sizes = model_sizes(config)
    available = {layer.name for layer in sizes.linears}
    named = target_modules or adapter_targets(config) or available
    wanted = {name.rpartition(".")[2] for name in named}  # of a path, all layers of its last name: a few too many
    if target_modules and not wanted <= available:
        raise ModelError(
            "target_modules names layers that the model does not have",
            expected="some of " + ", ".join(sorted(available)),
            got=", ".join(sorted(wanted - available)),
            next_step="Set adapter.target_modules=none to take the architecture's own.",
        )
    return round(
        sizes.layers
        * sum(
            layer.per_layer * (r * (layer.in_features + layer.out_features) + use_dora * layer.out_features)
            for layer in sizes.linears
            if layer.name in wanted
        )
    )
