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
        waits_s: of a forward and backward pass: how long the GPU waits for layers.
        average_s: of an optimizer step: averaging the adapters' gradients over all processes.
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
    processes = step.copies * step.shards
    together = inside if processes <= hardware.gpus_per_machine else across
    gradients = SINGLE * step.adapter_parameters  # adapters are whole in every process
    average = 2 * (processes - 1) / processes * gradients / together.bytes_s
    if step.shards == 1:
        return Exchange(average_s=average, link=together if processes > 1 else None)
    link = inside if step.shards <= hardware.gpus_per_machine else across
    gathered = (step.shards - 1) / step.shards * packed_bytes(sizes, step)
    gather = gathered / link.bytes_s
    late = max(0.0, gather - time.forward_s / sizes.layers) + max(0.0, gather - time.backward_s / sizes.layers)
    return Exchange(gathered, gather, 2 * gather + (sizes.layers - 1) * late, average, link)
