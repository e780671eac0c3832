"""A new run's settings while they are decided: each with its value and its reason. What a person has set stays.

Knows nothing of data, models or hardware. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.runs.plan_file import DecidedSetting

BY_HAND = "set by hand"


@dataclass
class Decided:
    """The settings of a new run while they are decided, and afterwards.

    Attributes:
        config: the settings so far.
        by_hand: full names of the settings that a person has given; these stay.
        decisions: what was decided, in order.
        notes: what a person should know besides.
    """

    config: RunConfig
    by_hand: Collection[str] = ()
    decisions: list[DecidedSetting] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, setting: str, value: Any, reason: str) -> None:
        """Takes a value for a setting, unless it was set by hand."""
        self.take_all({setting: (value, reason)})

    def take_all(self, wanted: dict[str, tuple[Any, str]]) -> None:
        """Takes values for settings that only make sense together: setting -> value and reason."""
        free = {name: value for name, (value, _) in wanted.items() if name not in self.by_hand}
        self.config = self.config.with_settings(free)
        for name, (_, reason) in wanted.items():
            self.decisions.append(DecidedSetting(name, self.value(name), reason if name in free else BY_HAND))

    def value(self, setting: str) -> Any:
        """Returns the value that a setting has now."""
        section, _, name = setting.partition(".")
        return getattr(getattr(self.config, section), name)
