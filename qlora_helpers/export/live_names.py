"""Where a checkpoint's files keep the weights of the model in memory, by transformers' own rules for loading it.

Names in files and in memory differ: parts are renamed (`language_model.model.` and `model.language_model.`), several matrices are
put together as one, or one is cut into several; GPT-2's layers keep `(in, out)`. Loads no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    """

    stored: str
    first: int = 0
    first_live: int = 0
    rows: int | None = None
    transposed: bool = False


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
        if not read_json(base / "config.json").get("model_type"):
            self._found = {name: [Place(name)] for name in shapes}
            return
        model = _described_model(base)
        self._transposed = _transposed_layers(model)
        self._read(model, shapes)

    def of(self, layer: str) -> list[Place]:
        """Returns the places of a layer's weight; empty where the files don't have it.

        Raises:
            ModelError: the weight is stored in another order of its values.
        """
        name = f"{layer}.weight"
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
        parts: dict[tuple[str, int], dict[str, str]] = {}
        for name in sorted(shapes, key=dot_natural_key):  # the order in which transformers reads them
            found, pattern = rename_source_key(name, renamings, converters, prefix, live)
            if found not in live and name in live:
                found, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=live)
            if pattern is None:
                transposed = found.removesuffix(".weight") in self._transposed
                self._found[found] = [Place(name, transposed=transposed)]
                continue
            number = next(index for index, rule in enumerate(converters) if pattern in rule.source_patterns)
            parts.setdefault((found, number), {})[pattern] = name
        for (found, number), names in parts.items():
            self._converted(converters[number], found, names, shapes)

    def _converted(self, rule: Any, live: str, names: dict[str, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Notes where a weight is that transformers puts together from several tensors, or cuts from one."""
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
        if steps == [("Concatenate", 0)]:
            rows, self._found[live] = 0, []
            for pattern in rule.source_patterns:
                count = shapes[names[pattern]][0]
                self._found[live].append(Place(names[pattern], 0, rows, count))
                rows += count
        elif steps == [("Chunk", 0)]:
            (name,) = names.values()
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
