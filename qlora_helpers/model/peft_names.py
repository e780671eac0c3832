"""Makes peft take the names of a model's layers literally, when adapters are added and when they are read again.

For families whose experts were linear layers in transformers 4, peft rewrites `gate_proj`, `up_proj` and `down_proj` to stacks of
experts (`peft/utils/transformers_weight_conversion.py`), so that adapters made with transformers 4 can be read. Dense and shared
layers of these names would then lose their adapters without a word. Here the names are those of the loaded model already. The
functions are wrapped once and leave alone every model that is not marked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "takes_names_literally"


def take_names_literally(model: Any) -> None:
    """Marks a model, so that peft changes neither the targets of its adapters nor the names of their weights."""
    setattr(model, _MARK, True)
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # a version that rewrites nothing
        return
    _wrap(conversion, "convert_peft_config_for_transformers", _unchanged_settings)
    _wrap(conversion, "convert_peft_adapter_state_dict_for_transformers", _unchanged_weights)


def _wrap(module: Any, name: str, instead: Callable[..., Any]) -> None:
    own = getattr(module, name, None)
    if own is None or hasattr(own, _MARK):
        return

    @functools.wraps(own)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        models = [value for value in (*args, *kwargs.values()) if hasattr(value, "named_modules")]
        return (instead if any(getattr(model, _MARK, False) for model in models) else own)(*args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(module, name, wrapped)


def _unchanged_settings(*args: Any, **kwargs: Any) -> None:
    return None


def _unchanged_weights(
    model: Any, peft_config: Any, adapter_state_dict: dict[str, Any], adapter_name: str = "default"
) -> dict[str, Any]:
    return adapter_state_dict
