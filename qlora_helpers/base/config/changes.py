"""Changes settings by their full names: reads them, checks them one by one and together, and collects all mistakes."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config.data import DataConfig
from qlora_helpers.base.config.evaluation import EvaluationConfig
from qlora_helpers.base.config.model import AdapterConfig, ModelConfig
from qlora_helpers.base.config.train import TRACKERS, TrainConfig
from qlora_helpers.base.errors import ConfigError
from qlora_helpers.base.setting_values import checked_value, plain_text

if TYPE_CHECKING:
    from qlora_helpers.base.config.run import RunConfig


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "evaluation": EvaluationConfig,
}


# Settings that run folders of earlier versions hold under other names
RENAMED = {"train.recompute_layers": "train.checkpointed_layers"}

# Values of settings that they hold under other names
RENAMED_VALUES = {
    ("data.loss_on", "summary"): "answer",
    ("data.long_rows", "trim"): "trim_end",
}


def changed(
    config: RunConfig, settings: Iterable[str] | Mapping[str, Any], problems: list[str] | None = None
) -> RunConfig:
    """Returns a copy of a configuration with some settings changed.

    Args:
        config: the configuration.
        settings: as for `RunConfig.with_settings`.
        problems: mistakes that were found before; the message lists them first.

    Raises:
        ConfigError: names are unknown, values are wrong, or there were mistakes before; the message lists all of them.
    """
    problems = list(problems or [])
    changes: dict[str, dict[str, Any]] = {}
    for name, value, is_text in _pairs(settings, problems):
        if name == "profile":
            try:
                config = replace(config, profile=plain_text(value))
            except ValueError as error:
                problems.append(f"profile: {error}")
            continue
        section, _, key = RENAMED.get(name, name).partition(".")
        value = value_today(name, value)
        known = {item.name: item for item in dataclasses.fields(SECTIONS[section])} if section in SECTIONS else {}
        if key not in known:
            problems.append(f"{name}: unknown{_did_you_mean(name)}")
            continue
        try:
            changes.setdefault(section, {})[key] = checked_value(SECTIONS[section], known[key], value, is_text)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    _replace_limits(config.data, changes.get("data", {}))
    for section, values in changes.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    problems += _contradictions(config)
    if problems:
        raise ConfigError(problems)
    return config


def value_today(name: str, value: Any) -> Any:
    """Returns a setting's value under today's name, if run folders of earlier versions hold it under another."""
    return RENAMED_VALUES.get((name, value), value) if isinstance(value, str) else value


def _replace_limits(data: DataConfig, changes: dict[str, Any]) -> None:
    """Takes away a profile's limit on the embedded corpus's rows where a person sets or changes the limit on all rows."""
    for split in ("train", "eval", "test"):
        name, own = f"{split}_rows", f"embedded_{split}_rows"
        if name in changes:
            given, changed = own in changes, changes[name] != getattr(data, name)
            if not given or (changed and changes[own] == getattr(data, own)):
                changes[own] = None


def _pairs(settings: Iterable[str] | Mapping[str, Any], problems: list[str]) -> list[tuple[str, Any, bool]]:
    if isinstance(settings, Mapping):
        return [(name, value, False) for name, value in settings.items()]
    pairs = []
    for text in [settings] if isinstance(settings, str) else settings:
        name, equals, value = text.partition("=")
        if equals:
            pairs.append((name.strip(), value.strip(), True))
        else:
            problems.append(f"{text}: expected section.name=value, such as train.max_steps=20")
    return pairs


def _did_you_mean(name: str) -> str:
    known = [f"{section}.{item.name}" for section, kind in SECTIONS.items() for item in dataclasses.fields(kind)]
    by_key = [full for full in known if full.split(".")[1] == name.split(".")[-1]]
    close = by_key or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; the sections are {', '.join(SECTIONS)}"


def _contradictions(config: RunConfig) -> list[str]:
    problems = []
    if unknown := [name for name in config.train.report_to or () if name not in TRACKERS]:
        problems.append(f"train.report_to: expected some of {', '.join(TRACKERS)}, or none, got {', '.join(unknown)}")
    tensorboard = config.train.tensorboard
    if tensorboard not in ("local", "off"):
        bucket, _, prefix = tensorboard.removeprefix("s3://").partition("/")
        if not tensorboard.startswith("s3://") or not bucket or not prefix:
            problems.append(
                f"train.tensorboard: expected local, off or s3://bucket/prefix (a prefix is needed), got {tensorboard!r}"
            )
    if config.evaluation.max_new_tokens >= config.data.seq_len_tokens:
        problems.append(
            f"evaluation.max_new_tokens: expected less than data.seq_len_tokens ({config.data.seq_len_tokens}), so that a "
            f"prompt has room, got {config.evaluation.max_new_tokens}"
        )
    return problems
