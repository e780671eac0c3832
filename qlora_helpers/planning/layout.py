"""How a training uses several GPUs: who holds which part of the model, and who reads which rows.

The names are those of `train.share`. Knows nothing of bytes or seconds. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

ONE, COPIES, SHARDS, COPIES_OF_SHARDS, SPREAD = "one", "copies", "shards", "copies of shards", "spread"
WAYS = (ONE, COPIES, SHARDS, COPIES_OF_SHARDS, SPREAD)
MEANING = {
    ONE: "a single GPU does all the work",
    COPIES: "each GPU has the whole 4-bit model and its own rows",
    SHARDS: "each GPU holds a part of every layer, gathers the rest when it computes that layer, and has its own rows",
    COPIES_OF_SHARDS: "each machine holds a copy, shared out over its GPUs, and has its own rows",
    SPREAD: "the layers lie one after another on the GPUs, which work one after another",
}
"""What each way means, for a reader."""


@dataclass(frozen=True)
class Layout:
    """One way to use the GPUs.

    Attributes:
        copies: how often the whole model is held.
        shards: GPUs that hold a part of every layer of one copy.
        spread: GPUs on which the layers of one copy lie one after another.
    """

    copies: int = 1
    shards: int = 1
    spread: int = 1

    @property
    def share(self) -> str:
        """Its name, as `train.share` has it."""
        return share_of(self.copies, self.shards, self.spread)

    @property
    def gpus(self) -> int:
        """How many GPUs it uses."""
        return self.copies * self.shards * self.spread

    @property
    def processes(self) -> int:
        """How many processes it takes; each reads rows of its own."""
        return self.copies * self.shards


def share_of(copies: int, shards: int, spread: int) -> str:
    """Returns the name of a way to use several GPUs."""
    if shards > 1:
        return COPIES_OF_SHARDS if copies > 1 else SHARDS
    return COPIES if copies > 1 else SPREAD if spread > 1 else ONE


def layouts(gpus: int, machines: int, sequences: int) -> tuple[Layout, ...]:
    """Lists the ways in which some GPUs can share a step's sequences evenly, in the order of `WAYS`.

    Args:
        gpus: of all machines together.
        machines: how many machines they are in, evenly.
        sequences: of an optimizer step.
    """
    found = [Layout()]
    sharing = copies_sharing(sequences, gpus)
    if sharing > 1:
        found += [Layout(copies=sharing), Layout(shards=sharing)]
    a_machine = gpus // machines
    if machines > 1 and a_machine > 1 and sequences % gpus == 0:
        found.append(Layout(copies=machines, shards=a_machine))
    if machines == 1 and gpus > 1:
        found.append(Layout(spread=gpus))
    return tuple(found)


def layout_of_processes(share: str, processes: int, on_each_machine: int) -> Layout:
    """Returns what several running processes hold.

    Args:
        share: `train.share`; where it is `auto`, several processes hold copies.
        processes: of all machines together, each with a GPU.
        on_each_machine: of one machine.
    """
    if share == SHARDS:
        return Layout(shards=processes)
    if share == COPIES_OF_SHARDS:
        return Layout(copies=max(1, processes // on_each_machine), shards=on_each_machine)
    return Layout(copies=processes)


def copies_sharing(sequences: int, gpus: int) -> int:
    """Returns the most GPUs that can share a step's sequences evenly."""
    return max(count for count in range(1, gpus + 1) if sequences % count == 0)
