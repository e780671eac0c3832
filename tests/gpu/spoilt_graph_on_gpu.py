"""A CUDA graph that can't be captured, on a real GPU: the step is taken as it is, and what comes after is not spoiled by it.

    python tests/gpu/spoilt_graph_on_gpu.py

Dropout must draw numbers afterwards, another step must be recorded and played, and the pool of the spoilt one must take no memory.
Without a GPU it says so and ends.
"""

from __future__ import annotations

import torch

from qlora_helpers.evaluation.fast_answers.graphs import CapturedStep


def main() -> None:
    """Spoils a recording by a look at a value, and goes on."""
    if not torch.cuda.is_available():
        print("no GPU: nothing was tried")
        return
    state = torch.zeros(4, device="cuda")
    ones = torch.ones(1 << 20, device="cuda")

    def looks(rows: int, length: int) -> None:
        state.add_(1)
        float(ones.sum())  # waits for the GPU: not permitted while recording

    def plain(rows: int, length: int) -> None:
        state.add_(torch.ones_like(state))

    for attempt in range(2):
        state.zero_()
        spoilt = CapturedStep(looks, [state])
        spoilt(4, 4)
        spoilt(4, 4)
        assert spoilt.refusal and spoilt.captured == 0, spoilt.refusal
        assert state.tolist() == [2.0] * 4, state
        spoilt.release()
        kept = torch.nn.functional.dropout(ones, 0.5, training=True).ne(0).float().mean()
        assert 0.4 < float(kept) < 0.6
        good = CapturedStep(plain, [state])
        good(4, 4)
        good(4, 4)
        torch.cuda.synchronize()
        assert good.captured == 1, good.refusal
        assert state.tolist() == [4.0] * 4, state
        good.release()
        print(f"{attempt + 1}: {spoilt.refusal}; dropout and the next graph work")
    del spoilt, good
    before = torch.cuda.memory_reserved()
    large = torch.empty(1 << 28, device="cuda")
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before, "memory went into the pool of a graph that is gone"
    print("as promised")


if __name__ == "__main__":
    main()
