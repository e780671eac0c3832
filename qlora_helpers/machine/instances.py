"""SageMaker's instances with GPUs: which, how many, how they are linked, and dated prices. Asks no price list."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_helpers.machine.links import Link, network


@dataclass(frozen=True)
class Instance:
    """A SageMaker instance with GPUs.

    Attributes:
        name: such as `ml.g5.12xlarge`.
        gpu: key in `GPUS`.
        gpus: how many.
        price_usd_per_hour: on demand, or None where no dated figure was found.
        region: where that price holds.
        priced_on: when it was read.
        source: where it was published.
    """

    name: str
    gpu: str
    gpus: int
    price_usd_per_hour: float | None = None
    region: str = ""
    priced_on: str = ""
    source: str = ""

    @property
    def network(self) -> Link:
        """What connects it with other instances."""
        return network(NETWORK_GBIT_S[self.name], NETWORK_SOURCE)


_MID_2026_EAST = ("us-east-1", "mid 2026", "third-party transcription of the AWS price list")
_MID_2026_WEST = ("us-west-2", "mid 2026", "third-party transcription of the AWS price list")
_AUGUST = ("us-east-1", "2026-08-17", "third-party transcription of the AWS price list")
_SEPTEMBER = ("us-east-1", "2026-09-27", "third-party transcription of the AWS price list")

INSTANCES: dict[str, Instance] = {
    instance.name: instance
    for instance in (
        Instance("ml.g4dn.xlarge", "T4", 1, 0.7364, *_SEPTEMBER),
        Instance("ml.g4dn.2xlarge", "T4", 1, 0.94, *_SEPTEMBER),
        Instance("ml.g4dn.4xlarge", "T4", 1),
        Instance("ml.g4dn.8xlarge", "T4", 1),
        Instance("ml.g4dn.12xlarge", "T4", 4, 4.89, *_SEPTEMBER),
        Instance("ml.g4dn.16xlarge", "T4", 1),
        Instance("ml.g5.xlarge", "A10G", 1, 1.408, *_AUGUST),
        Instance("ml.g5.2xlarge", "A10G", 1, 1.515, *_AUGUST),
        Instance("ml.g5.4xlarge", "A10G", 1, 2.03, *_SEPTEMBER),
        Instance("ml.g5.8xlarge", "A10G", 1),
        Instance("ml.g5.12xlarge", "A10G", 4, 7.09, *_MID_2026_EAST),
        Instance("ml.g5.16xlarge", "A10G", 1),
        Instance("ml.g5.24xlarge", "A10G", 4, 10.18, *_SEPTEMBER),
        Instance("ml.g5.48xlarge", "A10G", 8, 20.36, *_SEPTEMBER),
        Instance("ml.g6.xlarge", "L4", 1, 1.127, *_SEPTEMBER),
        Instance("ml.g6.2xlarge", "L4", 1, 1.222, *_SEPTEMBER),
        Instance("ml.g6.4xlarge", "L4", 1),
        Instance("ml.g6.8xlarge", "L4", 1),
        Instance("ml.g6.12xlarge", "L4", 4, 5.75, *_MID_2026_EAST),
        Instance("ml.g6.16xlarge", "L4", 1),
        Instance("ml.g6.24xlarge", "L4", 4),
        Instance("ml.g6.48xlarge", "L4", 8, 16.688, *_SEPTEMBER),
        Instance("ml.g6e.xlarge", "L40S", 1, 2.61, *_AUGUST),
        Instance("ml.g6e.2xlarge", "L40S", 1, 2.80, *_AUGUST),
        Instance("ml.g6e.4xlarge", "L40S", 1),
        Instance("ml.g6e.8xlarge", "L40S", 1),
        Instance("ml.g6e.12xlarge", "L40S", 4, 13.12, *_MID_2026_EAST),
        Instance("ml.g6e.16xlarge", "L40S", 1),
        Instance("ml.g6e.24xlarge", "L40S", 4),
        Instance("ml.g6e.48xlarge", "L40S", 8, 37.66, *_SEPTEMBER),
        Instance("ml.p4d.24xlarge", "A100-40GB", 8, 25.25, *_MID_2026_WEST),
        Instance("ml.p4de.24xlarge", "A100-80GB", 8, 31.5641, *_SEPTEMBER),
        Instance("ml.p5.4xlarge", "H100", 1, 7.912, *_SEPTEMBER),
        Instance("ml.p5.48xlarge", "H100", 8, 63.30, *_MID_2026_WEST),
        Instance("ml.p5e.48xlarge", "H200", 8),
        Instance("ml.p5en.48xlarge", "H200", 8),
    )
}
"""SageMaker's instances of these families, smallest first. Prices change: a plan shows their date, and a user may give another."""

NETWORK_SOURCE = "AWS, network specifications of accelerated computing instances; 'up to' figures are bursts"
_NETWORKS = {
    "g4dn": {"xlarge": 25, "2xlarge": 25, "4xlarge": 25, "8xlarge": 50, "12xlarge": 50, "16xlarge": 50},
    "g5": {
        **{"xlarge": 10, "2xlarge": 10, "4xlarge": 25, "8xlarge": 25, "12xlarge": 40, "16xlarge": 25},
        **{"24xlarge": 50, "48xlarge": 100},
    },
    "g6": {
        **{"xlarge": 10, "2xlarge": 10, "4xlarge": 25, "8xlarge": 25, "12xlarge": 40, "16xlarge": 25},
        **{"24xlarge": 50, "48xlarge": 100},
    },
    "g6e": {
        **{"xlarge": 20, "2xlarge": 20, "4xlarge": 20, "8xlarge": 25, "12xlarge": 100, "16xlarge": 35},
        **{"24xlarge": 200, "48xlarge": 400},
    },
    "p4d": {"24xlarge": 400},
    "p4de": {"24xlarge": 400},
    "p5": {"4xlarge": 100, "48xlarge": 3200},
    "p5e": {"48xlarge": 3200},
    "p5en": {"48xlarge": 3200},
}
NETWORK_GBIT_S: dict[str, float] = {
    f"ml.{family}.{size}": rate for family, sizes in _NETWORKS.items() for size, rate in sizes.items()
}
"""Instance -> its network's rate, Gbit/s. The p family reaches it with EFA alone."""
