"""Where a checkpoint's files keep the weights of the model in memory, by transformers' own rules for loading it.

Names in files and in memory differ: parts are renamed (`language_model.model.` and `model.language_model.`), several matrices are
put together as one, or one is cut into several; GPT-2's layers keep `(in, out)`; the experts of a layer are one stack in memory,
and in most files a matrix each. Loads no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.files import read_json
from qlora_helpers.model.load_errors import load_errors_explained


@dataclass(frozen=True)
class Place:
    """Rows of a weight in memory that are rows of a tensor in a file.

    Attributes:
        stored: name of the tensor in the file.
        first: the first of its rows.
        first_live: the first of the rows in memory.
        rows: how many; None for all.
        transposed: whether the file, and transformers' layer, keep `(in, out)`.
        expert: whose matrix of a stack in memory it is, which the tensor holds alone; None where it holds the same as memory.
    """

    stored: str
    first: int = 0
    first_live: int = 0
    rows: int | None = None
    transposed: bool = False
    expert: int | None = None


@dataclass(frozen=True)
class LiveStack:
    """The experts of a layer in memory.

    Attributes:
        shape: `(experts, out, in)`, or `(experts, in, out)`.
        transposed: whether it is the latter, as its module says; peft asks it the same.
        places: where the files hold it.
    """

    shape: tuple[int, ...]
    transposed: bool
    places: list[Place]


class Places:
    """Answers where each weight of a model is stored."""

    def __init__(self, base: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Reads a checkpoint's configuration; without a `model_type`, the names in its files are those in memory.

        Args:
            base: the checkpoint's folder.
            shapes: of the tensors in its files.
        """
        self._found: dict[str, list[Place]] = {}
        self._odd: dict[str, str] = {}
        self._model: Any = None
        if not read_json(base / "config.json").get("model_type"):
            self._found = {name: [Place(name)] for name in shapes}
            return
        self._model = model = _described_model(base)
        self._transposed = _transposed_layers(model)
        self._read(model, shapes)

    def of(self, layer: str) -> list[Place]:
        """Returns the places of a layer's weight; empty where the files don't have it.

        Raises:
            ModelError: the weight is stored in another order of its values.
        """
        return self._of(f"{layer}.weight", layer)

    def of_stack(self, layer: str, targets: Sequence[str]) -> LiveStack | None:
        """Returns the stack that an adapter's layer is for, and its places; None where it is for none.

        peft wraps a module once for each of its parameters that is adapted, the last one outermost: the adapters are called
        `experts`, `experts.base_layer` and so on.

        Args:
            layer: the adapter's name for it.
            targets: names of the parameters that are adapted, as in the adapter's `target_parameters`.

        Raises:
            ModelError: the stack is stored in another order of its values.
        """
        holder, inside = layer, 0
        while holder.endswith(".base_layer"):
            holder, inside = holder.removesuffix(".base_layer"), inside + 1
        try:
            module = self._model.get_submodule(holder)
        except AttributeError:  # no such module, or no model is known
            return None
        own = [
            (f"{holder}.{name}", tuple(value.shape))
            for name, value in module.named_parameters(recurse=False)
            if any(f".{holder}.{name}".endswith(f".{target}") for target in targets)
        ][::-1]
        if inside >= len(own) or len(own[inside][1]) != 3:
            return None
        name, shape = own[inside]
        return LiveStack(shape, bool(getattr(module, "is_transposed", False)), self._of(name, name))

    def _of(self, name: str, layer: str) -> list[Place]:
        if name in self._odd:
            raise ModelError(
                f"the adapter on {layer} can't be merged into this checkpoint's files",
                expected="a weight that is stored as it is in memory, or in parts",
                got=f"one that transformers converts by {self._odd[name]}",
                next_step="Serve base model and adapter side by side.",
            )
        return self._found.get(name, [])

    def _read(self, model: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        live, prefix = model.state_dict(), model.base_model_prefix
        parts: dict[tuple[str, int], dict[str, list[str]]] = {}
        for name in sorted(shapes, key=dot_natural_key):  # the order in which transformers reads them
            found, pattern = rename_source_key(name, renamings, converters, prefix, live)
            if found not in live and name in live:
                found, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=live)
            if pattern is None:
                transposed = found.removesuffix(".weight") in self._transposed
                self._found[found] = [Place(name, transposed=transposed)]
                continue
            number = next(index for index, rule in enumerate(converters) if pattern in rule.source_patterns)
            parts.setdefault((found, number), {}).setdefault(pattern, []).append(name)
        for (found, number), names in parts.items():
            self._converted(converters[number], found, names, shapes)

    def _converted(
        self, rule: Any, live: str, names: dict[str, list[str]], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Notes where a weight is that transformers puts together from several tensors, or cuts from one."""
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
        of_experts = steps[:1] == [("MergeModulelist", 0)]
        sources = [names[pattern] for pattern in rule.source_patterns if pattern in names]
        whole = len(sources) == len(rule.source_patterns)
        if whole and (steps == [("Concatenate", 0)] or (of_experts and steps[1:] in ([], [("Concatenate", 1)]))):
            rows, self._found[live] = 0, []
            for tensors in sources:
                for expert, name in enumerate(tensors if of_experts else tensors[-1:]):
                    count = shapes[name][0]
                    self._found[live].append(Place(name, 0, rows, count, expert=expert if of_experts else None))
                rows += count
        elif steps == [("Chunk", 0)]:
            ((name,),) = names.values()
            rows = shapes[name][0] // len(rule.target_patterns)
            for number, target in enumerate(rule.target_patterns):
                own = live.replace(rule.target_patterns[0], target)
                self._found[own] = [Place(name, number * rows, 0, rows)]
        else:
            for target in rule.target_patterns:
                self._odd[live.replace(rule.target_patterns[0], target)] = ", ".join(step for step, _ in steps)


def _described_model(base: Path) -> Any:
    from transformers import AutoConfig

    from qlora_helpers.model.blueprint import meta_model

    with load_errors_explained(base.name):
        return meta_model(AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False))


def _transposed_layers(model: Any) -> set[str]:
    from transformers.pytorch_utils import Conv1D

    modules: Iterable[tuple[str, Any]] = model.named_modules()
    return {name for name, module in modules if isinstance(module, Conv1D)}
