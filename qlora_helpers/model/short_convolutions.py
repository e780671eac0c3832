"""Short causal convolutions that keep packed rows apart where the package that transformers would use is not installed.

Hybrids (LFM2, Qwen3.5, Qwen3-Next, Kimi Linear) mix a token with the few before it by a convolution along the sequence.
transformers hands it `seq_idx`, the row of each token, and has a kernel for that only with `causal_conv1d`, which is compiled from
source. The same sum of a few shifted copies, each without the tokens of other rows, needs no package. Knows nothing of training.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

NAME = "causal_conv1d_fn"  # of the function in transformers' model files
Convolve = Callable[..., torch.Tensor]


def convolve_within_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    seq_idx: torch.Tensor,
) -> torch.Tensor:
    """Computes a depthwise causal convolution in which a token sees only the tokens of its own row.

    Args:
        hidden: `(batch, channels, tokens)`.
        weight: `(channels, taps)`; the last tap is the token's own.
        bias: `(channels,)`, or None.
        activation: a name in transformers' `ACT2FN`, or None.
        seq_idx: `(batch, tokens)`, the row of each token.

    Returns:
        `(batch, channels, tokens)`, summed in float32 at least.
    """
    from transformers.activations import ACT2FN

    tokens, taps = hidden.shape[-1], weight.shape[-1]
    sums = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    values, factors = hidden.to(sums), weight.to(sums)
    out = values * factors[:, -1:]
    for back in range(1, min(taps, tokens)):
        before = F.pad(values, (back, 0))[..., :tokens]
        same_row = F.pad(seq_idx, (back, 0), value=-1)[:, :tokens] == seq_idx
        out = out + before.masked_fill(~same_row[:, None], 0.0) * factors[:, taps - 1 - back, None]
    if bias is not None:
        out = out + bias.to(sums)[:, None]
    out = out.to(weight.dtype)
    if activation is not None:
        out = ACT2FN[activation](out)
    return out.to(hidden.dtype)


def keep_rows_apart(model: torch.nn.Module) -> int:
    """Makes the short convolutions of a model's family take packed rows; without `seq_idx` they compute what they did.

    The change is to transformers' modules of this family, for as long as the process lives, and is made once.

    Args:
        model: a transformers model.

    Returns:
        How many of these modules compute their convolutions here.
    """
    changed = 0
    for name in sorted({type(module).__module__ for module in model.modules()}):
        module = sys.modules.get(name)
        convolve = getattr(module, NAME, None)
        if convolve is None or not name.startswith("transformers."):
            continue
        if not hasattr(convolve, "keeps_rows_apart") and _refuses_rows(convolve):
            setattr(module, NAME, _with_rows(convolve))
        changed += hasattr(getattr(module, NAME), "keeps_rows_apart")
    return changed


def _refuses_rows(convolve: Convolve) -> bool:
    """Whether a function refuses rows; a kernel of a package refuses the CPU instead, or computes."""
    try:
        convolve(torch.zeros(1, 1, 2), torch.zeros(1, 2), None, seq_idx=torch.zeros(1, 2, dtype=torch.int32))
    except ValueError:
        return True
    except Exception:  # whatever a kernel says of a CPU's tensors
        return False
    return False


def _with_rows(convolve: Convolve) -> Convolve:
    @functools.wraps(convolve)
    def by_rows(
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        seq_idx: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        if seq_idx is None:
            return convolve(hidden_states, weight, bias, activation=activation, **more)
        return convolve_within_rows(hidden_states, weight, bias, activation, seq_idx=seq_idx)

    by_rows.keeps_rows_apart = True  # type: ignore[attr-defined]
    return by_rows
