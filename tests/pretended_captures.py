"""Captures of passes without a GPU, for tests of what is done with them."""

from __future__ import annotations

import torch


class PretendedCapture:
    """Replays by running again: results go where the first run's were, and a forward pass destroys the gradients there."""

    def __init__(self) -> None:
        self.captures, self.freed, self.full = 0, 0, None

    def refusal(self):
        return self.full

    def __call__(self, run_forward, run_backward):
        self.captures += 1
        passes = run_forward.__self__
        run_forward()
        loss = passes._loss.detach().clone()
        run_backward()
        places = passes._gradients
        for each in places:
            each.fill_(torch.nan)  # a capture computes nothing

        graphs = []

        def forward():
            for each in places:
                each.fill_(torch.nan)
            with torch.enable_grad():
                run_forward()
            graphs[:] = [passes._loss]
            loss.copy_(passes._loss.detach())
            passes._loss = loss  # the same memory at every replay

        def backward():
            passes._loss = graphs.pop()
            with torch.enable_grad():
                run_backward()
            for place, found in zip(places, passes._gradients, strict=True):
                place.copy_(found)
            passes._gradients, passes._loss = places, loss

        return [forward, backward]

    def free(self):
        self.freed += 1
