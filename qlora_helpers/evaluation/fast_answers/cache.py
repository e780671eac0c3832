"""Keys and values of many answers at once: each answer has a slot, which is filled up to a place of its own.

transformers' caches move all rows of a batch forward together, so a row that has ended stays until the last one has. Here a slot
whose answer has ended takes the next prompt, and the shapes of a step stay the same, as a CUDA graph needs them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache


class SlotCache(Cache):
    """Holds each layer's keys and values, `(slots, heads, capacity, head_dim)` on its device, allocated when first filled.

    Args:
        slots: answers held at once.
        capacity: tokens of the longest prompt with its answer.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.slots, self.capacity = slots, capacity
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._chosen: Any = None  # slots of the prompts being read; None while answers grow
        self._places: Any = None  # where each row's next key goes
        self._length = 0

    def read_prompts(self, slots: torch.Tensor) -> None:
        """Prepares for a forward pass that reads whole prompts into these slots, `(rows,)`, from their first place on."""
        self._chosen, self._places, self._length = slots, None, 0

    def take_step(self, places: torch.Tensor, length: int) -> None:
        """Prepares for a forward pass that adds one token to each of the first slots.

        Args:
            places: `(rows,)`, where the token goes in each slot.
            length: how many places the layers see.
        """
        self._chosen, self._places, self._length = None, places, length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores keys and values, `(rows, heads, tokens, head_dim)` each, and returns those that the layer attends to."""
        device = key_states.device
        if self._chosen is not None:
            for buffers, states in ((self.keys, key_states), (self.values, value_states)):
                if layer_idx == len(buffers):
                    rows, heads, _, width = states.shape
                    buffers.append(states.new_zeros(self.slots, heads, self.capacity, width))
                buffers[layer_idx][self._chosen.to(device), :, : states.shape[2]] = states
            return key_states, value_states
        places = self._places.to(device)
        rows = torch.arange(places.shape[0], device=device)
        self.keys[layer_idx][rows, :, places] = key_states[:, :, 0]
        self.values[layer_idx][rows, :, places] = value_states[:, :, 0]
        seen = slice(0, places.shape[0]), slice(None), slice(0, self._length)
        return self.keys[layer_idx][seen], self.values[layer_idx][seen]

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copies the source slots to the target slots."""
        for buffer in (*self.keys, *self.values):
            buffer[torch.tensor(targets, device=buffer.device)] = buffer[torch.tensor(sources, device=buffer.device)]

    def bytes_a_token(self) -> int:
        """Bytes of one token of one answer, over all layers."""
        return sum(b.shape[1] * b.shape[3] * b.element_size() for b in (*self.keys, *self.values))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before those of this pass. Models that get positions and a mask use it only for shapes."""
        return max(0, self._length - 1)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int | torch.Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """How many places a layer sees in this pass, and the first of them."""
        tokens = query_length if isinstance(query_length, int) else query_length.shape[0]
        return (self._length or tokens), 0
