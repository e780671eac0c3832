"""What the proofs on a loaded model share: their rows, how far rounding alone moves values, and the sentence where one fails.

Two ways of computing the same sum round differently at every layer. How much that changes at the end depends on the model, its
depth and its data type, so it is measured: the output of each decoder layer is multiplied by random factors as far from one as a
rounding takes it, and whatever is computed from it moves by as much as a rounding in every layer would move it. A mixture's router
chooses between experts, and a rounding may change its choice, after which nothing is alike: so a row's choices can be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from qlora_helpers.model.attention import UnsupportedAttentionError
from qlora_helpers.model.wiring import decoder_layers
from qlora_helpers.training.rank_failures import is_of_exchange

ROUNDINGS = 8
"""How many times the effect of one rounding in every layer two ways of computing may lie apart: a layer rounds several times
(norms, projections, attention, MLP), and the roundings of two ways add up."""


class NotProvedError(Exception):
    """A proof on the loaded model failed; the message says why, in a sentence."""


def why_it_fails(attempt: Callable[[], object], what: str) -> str | None:
    """Tries something on a model's own code, which may fail in any way; returns why it failed, or None where it did not.

    Args:
        attempt: what is tried.
        what: the beginning of the sentence about an error that nobody foresaw.
    """
    try:
        attempt()
    except torch.OutOfMemoryError:
        raise
    except (NotProvedError, UnsupportedAttentionError) as error:
        return str(error)
    except Exception as error:
        if is_of_exchange(error):  # another process has ended, which says nothing of the model
            raise
        return f"{what} ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]})"
    return None


def random_rows(model: torch.nn.Module, *lengths: int) -> list[list[int]]:
    """Returns rows of random tokens of a model's vocabulary, always the same; each has an embedding and a logit."""
    head = model.get_output_embeddings()
    vocabulary = min(model.get_input_embeddings().num_embeddings, getattr(head, "out_features", None) or 2**31)
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(2, vocabulary, (length,), generator=draw).tolist() for length in lengths]


class Choices(TorchFunctionMode):
    """The experts that routers chose for the tokens of a row; later passes are made to choose the same ones for it.

    The first pass that is watched is written down: each call of `torch.topk` over the last dimension, with a line for each token.
    Passes of other rows that end with this row take its choices for its tokens; the values follow, and autograd through them.

    Args:
        tokens: of the row.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.kept: list[torch.Tensor] = []
        self._next: int | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While open, one pass goes through the model: the first is written down, the others choose as it did."""
        self._next = 0 if self.kept else None
        with self:
            yield

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function not in (torch.topk, torch.Tensor.topk) or found.indices.numel() < self.tokens:
            return found
        indices = found.indices.flatten(0, -2)
        if len(indices) < self.tokens:  # over something else than tokens
            return found
        if self._next is None:
            self.kept.append(indices[-self.tokens :].clone())
            return found
        if self._next >= len(self.kept):
            return found
        same, self._next = self.kept[self._next], self._next + 1
        if same.shape[1:] != indices.shape[1:]:
            return found
        indices = torch.cat([indices[: -self.tokens], same]).view(found.indices.shape)
        return torch.return_types.topk((args[0].gather(-1, indices), indices))


@contextmanager
def values_rounded_anew(model: torch.nn.Module, *, seed: int = 0) -> Iterator[None]:
    """While open, what each decoder layer and the output layer return is off by a random rounding of its data type.

    Args:
        model: a transformers model, without peft's wrapper around it.
        seed: of the random factors.
    """
    draw = torch.Generator().manual_seed(seed)

    def rounded(module: torch.nn.Module, args: tuple, output: Any) -> Any:
        values = output[0] if isinstance(output, tuple) else output
        if not isinstance(values, torch.Tensor) or not values.is_floating_point():
            return output
        # The factors are made where the generator is, so that they are the same on every device.
        signs = torch.rand(values.shape, generator=draw).mul_(2).sub_(1).to(values.device)
        exact = torch.promote_types(values.dtype, torch.float32)
        moved = (values.to(exact) * (1 + signs.to(exact) * torch.finfo(values.dtype).eps)).to(values.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    places = [*decoder_layers(model), model.get_input_embeddings(), model.get_output_embeddings()]
    with ExitStack() as undo:
        for place in places:
            if place is not None:
                undo.callback(place.register_forward_hook(rounded).remove)
        yield
