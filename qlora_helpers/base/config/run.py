"""All settings of one run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_helpers.base.config.changes import SECTIONS, changed
from qlora_helpers.base.config.data import DataConfig
from qlora_helpers.base.config.evaluation import EvaluationConfig
from qlora_helpers.base.config.model import AdapterConfig, ModelConfig
from qlora_helpers.base.config.option import option
from qlora_helpers.base.config.train import TrainConfig
from qlora_helpers.base.errors import ConfigError


@dataclass(frozen=True)
class RunConfig:
    """All settings of one run; what `config.json` holds."""

    profile: str = option("demo", "The profile that the run started from.")
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain values, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def with_settings(self, settings: Iterable[str] | Mapping[str, Any]) -> RunConfig:
        """Returns a copy with some settings changed.

        Args:
            settings: `["train.max_steps=20", ...]` as on the command line, or `{"train.max_steps": 20, ...}`.

        Raises:
            ConfigError: names are unknown or values are wrong; the message lists all of them.
        """
        return changed(self, settings)


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Builds a `RunConfig` from nested plain values, as `config.json` holds them; missing settings take their defaults.

    Raises:
        ConfigError: names are unknown or values are wrong; the message lists all of them.
    """
    if not isinstance(values, Mapping):
        raise ConfigError([f"config: expected an object with {', '.join(SECTIONS)}, got {type(values).__name__}"])
    flat: dict[str, Any] = {}
    problems = []
    for name, value in values.items():
        if name == "profile":
            flat["profile"] = value
        elif name in SECTIONS and isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        elif name in SECTIONS:
            problems.append(f"{name}: expected an object, got {json.dumps(value, default=str)}")
        else:
            problems.append(f"{name}: unknown; the sections are {', '.join(SECTIONS)}")
    return changed(RunConfig(), flat, problems)
