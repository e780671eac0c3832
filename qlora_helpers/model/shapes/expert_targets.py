"""Which names of `adapter.target_modules` mean a mixture's experts, and what adapters on these can't have. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qlora_helpers.base.config import AdapterConfig
from qlora_helpers.base.errors import ModelError

EXPERTS = "experts"  # names all experts of a mixture, whatever their family calls them


def ends(path: str, name: str) -> bool:
    """Whether a path ends in a name, which may have several parts: `mlp.experts.down_proj` in `experts.down_proj`."""
    return f".{path}".endswith(f".{name}")


def named_stacks(names: Sequence[str] | None, linears: Collection[str], stacks: Collection[str]) -> tuple[str, ...]:
    """Returns the stacks of experts that some names mean, by default none.

    `experts` means all of them. Another name means a stack, or the module that holds it; where linear layers have the name too, as
    the shared experts' `down_proj`, it means these alone, and `experts.down_proj` the stack.

    Args:
        names: as in `AdapterConfig.target_modules`.
        linears: paths of the model's linear layers, or the ends of paths.
        stacks: paths of its stacks, or the ends of paths.
    """
    meant = [name for name in names or () if name == EXPERTS or not any(ends(path, name) for path in linears)]
    return tuple(path for path in stacks if any(_means(name, path) for name in meant))


def _means(name: str, stack: str) -> bool:
    holder = stack.rpartition(".")[0]
    return name == EXPERTS or ends(stack, name) or ends(holder, name)


def refuse_on_experts(config: AdapterConfig) -> None:
    """Refuses what adapters on experts can't have: each is added to its expert's weight, so it has no input of its own.

    Raises:
        ModelError: the settings have it.
    """
    refused = ["adapter.use_dora=true"] * config.use_dora
    refused += [f"adapter.lora_dropout={config.lora_dropout:g}"] * (config.lora_dropout > 0)
    if refused:
        raise ModelError(
            "adapters on a mixture's experts have neither dropout nor DoRA",
            expected="adapter.lora_dropout=0 and adapter.use_dora=false",
            got=", ".join(refused),
            next_step="Set these, or leave the experts out of adapter.target_modules.",
        )
