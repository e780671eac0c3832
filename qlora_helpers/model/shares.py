"""How the processes of one training share a model, from the setting `train.share` and the number of processes.

Knows nothing of models: `sharding` shares out the weights over the mesh that is made here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_helpers.base.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SHARDED = ("shards", "copies of shards")


@dataclass(frozen=True)
class Sharing:
    """How many processes there are, and how many of them share one copy of the model.

    Attributes:
        copies: how many copies of the model there are.
        shards: how many processes share one copy; 1 where each has the whole model.
        one_gpu: whether a single process takes one GPU of several, instead of spreading the layers over all.
    """

    copies: int = 1
    shards: int = 1
    one_gpu: bool = False

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return self.copies * self.shards

    def mesh(self, device: str) -> DeviceMesh | None:
        """Returns the processes that share this process's copy, in one dimension; None where it has the whole model.

        Frozen weights need no exchange between copies, so only the dimension of the shards is FSDP2's.

        Args:
            device: `cuda` or `cpu`; the processes have joined.
        """
        if self.shards == 1:
            return None
        from torch.distributed.device_mesh import init_device_mesh

        if self.copies == 1:
            return init_device_mesh(device, (self.shards,), mesh_dim_names=("shard",))
        return init_device_mesh(device, (self.copies, self.shards), mesh_dim_names=("copy", "shard"))["shard"]


def sharing(share: str) -> Sharing:
    """Returns how this training's processes share the model.

    With `copies of shards` each machine holds a copy, shared out over its processes, between which links are fastest.

    Args:
        share: the setting `train.share`.

    Raises:
        ConfigError: the setting does not go with the number of processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(processes)))
    if processes == 1:
        return Sharing(one_gpu=share == "one")
    if share in ("one", "spread"):
        raise ConfigError([f"train.share: {share} takes one process, got {processes}; copies and shards take several"])
    if share == "shards":
        return Sharing(1, processes)
    if share != "copies of shards":
        return Sharing(processes, 1)
    if processes % here:
        raise ConfigError(
            [
                f"train.share: copies of shards takes machines with as many processes each, got {processes} with {here} here"
            ]
        )
    return Sharing(processes // here, here)
