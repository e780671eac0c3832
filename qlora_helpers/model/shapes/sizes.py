"""How large a model is and what its layers are made of, from its `config.json` alone: no torch, no download.

Counts what transformers 5 builds and what bitsandbytes then stores in 4 bits: the `nn.Linear` modules of the decoder layers and
nothing else. How a family is wired is in `wirings`. Knows nothing of bytes, devices or training; the memory planner builds on it.
"""

from __future__ import annotations

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.text import plain
from qlora_helpers.model.shapes.decoder import ModelSizes
from qlora_helpers.model.shapes.families import adapter_targets
from qlora_helpers.model.shapes.values import Shape, family_of
from qlora_helpers.model.shapes.wirings import DEFAULTS, WIRINGS, like_llama


def model_sizes(config: Shape) -> ModelSizes:
    """Returns the sizes of a model; an unknown `model_type` with Llama's keys is assumed to be a Llama (`assumed`).

    Args:
        config: a model's `config.json`, raw or with its defaults filled in. Of Gemma 3 with vision the text decoder is meant:
            the vision tower (417 M weights) that transformers loads with it is not counted.

    Raises:
        ModelError: a size is missing or larger than any model's, or the family is unknown and has experts.
    """
    family = family_of(config)
    if family == "gemma3":
        family, config = "gemma3_text", config.get("text_config") or {}
        if not isinstance(config, dict):
            raise ModelError(
                "the text_config of a config.json is not an object", next_step="Give the model's own config.json."
            )
    if family not in WIRINGS and (surprises := [key for key in config if "expert" in key]):
        raise ModelError(
            f"a mixture of experts of the family {family} is not supported",
            expected="mixtral, qwen3_moe, or a model without experts",
            got=", ".join(plain(key)[:60] for key in sorted(surprises)[:5]),
            next_step="Choose another model, or measure this one by loading it.",
        )
    return WIRINGS.get(family, like_llama)(family, DEFAULTS.get(family, {}) | config | {"model_type": family})


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
    return sizes.layers * sum(
        layer.per_layer * (r * (layer.in_features + layer.out_features) + use_dora * layer.out_features)
        for layer in sizes.linears
        if layer.name in wanted
    )


# families


"""Values of `model_type` whose sizes are exact; each is compared with transformers' own model in the tests."""
