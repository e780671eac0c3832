"""The ways to use several GPUs side by side, each with what it takes, and the reason for the plan's choice in plain words.

Imports no torch; knows nothing of runs on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_helpers.base.tables import Table
from qlora_helpers.base.units import duration, gib
from qlora_helpers.machine.hardware import Hardware
from qlora_helpers.planning.candidate import Candidate
from qlora_helpers.planning.candidates import all_candidates, fitting_candidates
from qlora_helpers.planning.layout import COPIES, COPIES_OF_SHARDS, MEANING, SHARDS, SPREAD, WAYS
from qlora_helpers.planning.workload import Workload

MEASURED = {(COPIES, "H200"), (SPREAD, "H200")}
"""Ways that were measured on a card, with two of them (`benchmarks/two_gpus.json`); all others are arithmetic."""
NEARLY = 1.05  # times as fast; less is about as fast, and the simpler way is taken


@dataclass(frozen=True)
class Way:
    """One way to use the GPUs.

    Attributes:
        share: its name, as `train.share` has it.
        best: the fastest that fits, else what holds least; None where the GPUs can't be used so.
        fits: whether that fits.
        why_not: why they can't be used so; empty where they can.
        measured: whether this way was measured in this project, on these cards.
    """

    share: str
    best: Candidate | None
    fits: bool
    why_not: str = ""
    measured: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        found: dict[str, Any] = {"share": self.share, "fits": self.fits, "measured": self.measured}
        if self.best is None:
            return found | {"why_not": self.why_not}
        return found | {
            "gpus": self.best.layout.gpus,
            "processes": self.best.processes,
            "peak_gib": [gib(each.total) for each in self.best.memory],
            "tokens_per_s": self.best.tokens_per_s,
            "seconds": self.best.seconds,
            "dollars": self.best.dollars,
            "gather_s": self.best.exchange.gather_s,
            "waits_s": self.best.exchange.waits_s,
        }


def find_ways(workload: Workload) -> tuple[Way, ...]:
    """Works out each way to use the GPUs; none where there is one GPU or one process.

    Raises:
        ModelError: the shape lacks a size, or a target layer is unknown.
    """
    hardware = workload.hardware
    if workload.one_process or workload.only is not None or hardware.gpus == 1:
        return ()
    possible = {each.share: each for each in workload.possible_layouts}
    found = []
    for share in WAYS:
        if share not in possible:
            found.append(Way(share, None, False, _why_not(share, workload)))
            continue
        candidates = all_candidates(workload, [possible[share]])
        fitting = fitting_candidates(candidates, hardware.usable_gib)
        best = fitting[0] if fitting else min(candidates, key=lambda each: each.peak_gib)
        card = hardware.gpu.name if hardware.gpu else ""
        found.append(Way(share, best, bool(fitting), measured=(share, card) in MEASURED))
    return tuple(found)


def simplest_of_the_fastest(fitting: Sequence[Candidate]) -> Candidate | None:
    """Returns the fastest candidate, or a simpler way to use the GPUs that is about as fast; None of none.

    Args:
        fitting: what fits, the one that ends first before the others.
    """
    if not fitting:
        return None
    fast = [each for each in fitting if each.seconds <= NEARLY * fitting[0].seconds]
    return min(fast, key=lambda each: WAYS.index(each.share))  # of one way the first is the fastest


def _why_not(share: str, workload: Workload) -> str:
    machines = workload.hardware.machines
    if share == SPREAD and machines > 1:
        return "one process can't reach the GPUs of another machine"
    if share in (SHARDS, COPIES_OF_SHARDS) and workload.not_shared:
        return workload.not_shared
    if share == COPIES_OF_SHARDS and machines == 1:
        return "takes several machines; within one it is the same as shards"
    if share == COPIES_OF_SHARDS and workload.hardware.gpus_per_machine == 1:
        return "takes several GPUs in each machine"
    sequences = workload.sequences_per_step
    return f"an optimizer step of {sequences} sequence{'s' * (sequences != 1)} can't be shared evenly"


def reason(ways: Sequence[Way], choice: Candidate | None, hardware: Hardware) -> str:
    """Says in plain words why a way was chosen; empty where there is nothing to choose."""
    if choice is None or not ways:
        return ""
    others = {each.share: each for each in ways if each.share != choice.share and each.best is not None}
    said = [f"{choice.share} was chosen, in which {MEANING[choice.share]}"]
    copies = others.get(COPIES)
    if choice.share != COPIES and copies and copies.best and not copies.fits:
        said.append(
            f"a whole copy would take {copies.best.peak_gib:.1f} GiB on each GPU, of {hardware.usable_gib:.1f} usable"
        )
    if choice.share in (SHARDS, COPIES_OF_SHARDS):
        said.append(_gathering(choice))
    fitting = [each.best for each in others.values() if each.best and each.fits]
    if fitting:
        said.append(_compared(choice, min(fitting, key=lambda each: each.seconds)))
    else:
        said.append("nothing else fits")
    return "; ".join(said)


def _gathering(choice: Candidate) -> str:
    sent = choice.exchange
    pass_s = choice.optimizer_step_s / choice.gradient_accumulation_steps
    hidden = sent.waits_s < 0.1 * pass_s
    wait = "hidden behind the layer before" if hidden else f"so that {sent.waits_s / pass_s:.0%} of a pass is waiting"
    assert sent.link is not None
    rate = f"{sent.link.bytes_s / 1e9:.3g} GB/s, which is what is assumed to be reached of {sent.link}"
    return f"each layer's {gib(sent.gathered_bytes):.2f} GiB arrive in {1000 * sent.gather_s:.3g} ms at {rate}, {wait}"


def _compared(choice: Candidate, other: Candidate) -> str:
    times = other.seconds / choice.seconds
    if times < NEARLY:
        return f"{other.share} would be about as fast"
    return f"{times:.1f} times as fast as {other.share}, the next that fits"


def ways_table(ways: Sequence[Way], choice: Candidate | None) -> Table:
    """Returns a row for each way, with what every GPU holds, the speed, time and price."""
    rows = [_row(way, choice) for way in ways]
    header = ["way", "GPUs", "GiB on each GPU", "tokens/s", "time", "USD", ""]
    return Table(header, rows, caption="ways to use the GPUs", numbers=(1, 3, 5))


def _row(way: Way, choice: Candidate | None) -> list[str]:
    best = way.best
    if best is None:
        return [way.share, "", "", "", "", "", way.why_not]
    held = [gib(each.total) for each in best.memory]
    same = best.layout.gpus if len(held) == 1 else 0
    on_each = f"{held[0]:.1f}" if same else " ".join(f"{value:.1f}" for value in held)
    if not way.fits:
        return [way.share, str(best.layout.gpus), on_each, "", "", "", "does not fit"]
    chosen = "chosen; " if choice is not None and choice.share == way.share else ""
    return [
        way.share,
        str(best.layout.gpus),
        on_each,
        f"{best.tokens_per_s:,.0f}",
        duration(best.seconds),
        "-" if best.dollars is None else f"{best.dollars:,.2f}",
        chosen + ("measured on these cards" if way.measured else "predicted, never measured"),
    ]
