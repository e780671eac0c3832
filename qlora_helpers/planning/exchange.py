"""What GPUs send each other in a training step, and how long they wait for it, by arithmetic alone.

Shards are gathered a layer ahead, while the layer before computes; adapters' gradients are added up. `machine.links` has the rates;
what NCCL reaches of them is assumed. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_helpers.machine.hardware import Hardware
from qlora_helpers.machine.links import Link, slower
from qlora_helpers.model.shapes.decoder import ModelSizes
from qlora_helpers.planning.memory import packed_bytes
from qlora_helpers.planning.speed import StepTime
from qlora_helpers.planning.step_settings import SINGLE, StepSettings


@dataclass(frozen=True)
class Exchange:
    """What is sent, and how long that takes.

    Attributes:
        gathered_bytes: of one layer, packed, that a GPU is sent in each direction of a pass; 0 where nothing is sharded.
        gather_s: time of that.
        waits_s: of a forward and backward pass: how long the GPU waits for layers and their gradients.
        average_s: of an optimizer step: averaging the adapters' gradients between copies.
        link: over which layers are gathered, or gradients averaged where nothing is sharded.
    """

    gathered_bytes: float = 0.0
    gather_s: float = 0.0
    waits_s: float = 0.0
    average_s: float = 0.0
    link: Link | None = None


def exchange(sizes: ModelSizes, step: StepSettings, hardware: Hardware, time: StepTime) -> Exchange:
    """Works out what the GPUs send each other.

    Args:
        sizes: of the model.
        step: its `copies` and `shards` count.
        hardware: whose links count.
        time: what a pass takes on one GPU without the others.
    """
    inside = hardware.link
    across = slower(inside, hardware.between_machines) if hardware.machines > 1 else inside
    gradients = SINGLE * step.adapter_parameters
    copies, shards = step.copies, step.shards
    if shards == 1:
        average = 2 * (copies - 1) / copies * gradients / across.bytes_s
        return Exchange(average_s=average, link=across if copies > 1 else None)
    link = inside if shards <= hardware.gpus_per_machine else across
    sent = (shards - 1) / shards
    gathered = sent * packed_bytes(sizes, step)
    gather = gathered / link.bytes_s
    late = max(0.0, gather - time.forward_s / sizes.layers) + max(0.0, gather - time.backward_s / sizes.layers)
    waits = 2 * gather + (sizes.layers - 1) * late + sent * gradients / link.bytes_s
    # each machine's GPUs hold the parts of one copy, and send them all through its one network
    average = 2 * (copies - 1) / copies * gradients / across.bytes_s
    return Exchange(gathered, gather, waits, average, link)
