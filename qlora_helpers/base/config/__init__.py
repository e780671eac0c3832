"""The settings of a run: frozen dataclasses that are read from and written to JSON, with a text for each field.

A field's text serves the notebooks' tables, the command line's help and the widgets' tooltips. Validation collects all mistakes
and raises them in one `ConfigError`. This room knows nothing of torch, models or files.
"""

from qlora_helpers.base.config.changes import RENAMED, RENAMED_VALUES, SECTIONS, value_today
from qlora_helpers.base.config.data import DataConfig
from qlora_helpers.base.config.evaluation import EvaluationConfig
from qlora_helpers.base.config.model import AdapterConfig, ModelConfig
from qlora_helpers.base.config.option import describe, option
from qlora_helpers.base.config.run import RunConfig, config_from_dict
from qlora_helpers.base.config.train import TRACKERS, TrainConfig

__all__ = [
    "RENAMED",
    "RENAMED_VALUES",
    "SECTIONS",
    "TRACKERS",
    "AdapterConfig",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "config_from_dict",
    "describe",
    "option",
    "value_today",
]
