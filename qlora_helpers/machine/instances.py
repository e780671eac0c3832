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
        """What connects it with other instances. The p family reaches its network's rate with EFA alone."""
        _, family, size = self.name.split(".")
        return network(_FAMILIES[family][1][size][1], NETWORK_SOURCE)


_MID_2026_EAST = ("us-east-1", "mid 2026", "third-party transcription of the AWS price list")
_MID_2026_WEST = ("us-west-2", "mid 2026", "third-party transcription of the AWS price list")
_AUGUST = ("us-east-1", "2026-08-17", "third-party transcription of the AWS price list")
_SEPTEMBER = ("us-east-1", "2026-09-27", "third-party transcription of the AWS price list")

_Sizes = dict[str, tuple[int, float]]  # size -> number of GPUs, and its network's rate, Gbit/s

_G5_AND_G6: _Sizes = {
    "xlarge": (1, 10),
    "2xlarge": (1, 10),
    "4xlarge": (1, 25),
    "8xlarge": (1, 25),
    "12xlarge": (4, 40),
    "16xlarge": (1, 25),
    "24xlarge": (4, 50),
    "48xlarge": (8, 100),
}
_FAMILIES: dict[str, tuple[str, _Sizes]] = {
    "g4dn": (
        "T4",
        {
            "xlarge": (1, 25),
            "2xlarge": (1, 25),
            "4xlarge": (1, 25),
            "8xlarge": (1, 50),
            "12xlarge": (4, 50),
            "16xlarge": (1, 50),
        },
    ),
    "g5": ("A10G", _G5_AND_G6),
    "g6": ("L4", _G5_AND_G6),
    "g6e": (
        "L40S",
        {
            "xlarge": (1, 20),
            "2xlarge": (1, 20),
            "4xlarge": (1, 20),
            "8xlarge": (1, 25),
            "12xlarge": (4, 100),
            "16xlarge": (1, 35),
            "24xlarge": (4, 200),
            "48xlarge": (8, 400),
        },
    ),
    "p4d": ("A100-40GB", {"24xlarge": (8, 400)}),
    "p4de": ("A100-80GB", {"24xlarge": (8, 400)}),
    "p5": ("H100", {"4xlarge": (1, 100), "48xlarge": (8, 3200)}),
    "p5e": ("H200", {"48xlarge": (8, 3200)}),
    "p5en": ("H200", {"48xlarge": (8, 3200)}),
}
"""Family -> its GPU, a key in `GPUS`, and its sizes, smallest first."""
NETWORK_SOURCE = "AWS, network specifications of accelerated computing instances; 'up to' figures are bursts"

_PRICES: dict[str, tuple[float, str, str, str]] = {
    "ml.g4dn.xlarge": (0.7364, *_SEPTEMBER),
    "ml.g4dn.2xlarge": (0.94, *_SEPTEMBER),
    "ml.g4dn.12xlarge": (4.89, *_SEPTEMBER),
    "ml.g5.xlarge": (1.408, *_AUGUST),
    "ml.g5.2xlarge": (1.515, *_AUGUST),
    "ml.g5.4xlarge": (2.03, *_SEPTEMBER),
    "ml.g5.12xlarge": (7.09, *_MID_2026_EAST),
    "ml.g5.24xlarge": (10.18, *_SEPTEMBER),
    "ml.g5.48xlarge": (20.36, *_SEPTEMBER),
    "ml.g6.xlarge": (1.127, *_SEPTEMBER),
    "ml.g6.2xlarge": (1.222, *_SEPTEMBER),
    "ml.g6.12xlarge": (5.75, *_MID_2026_EAST),
    "ml.g6.48xlarge": (16.688, *_SEPTEMBER),
    "ml.g6e.xlarge": (2.61, *_AUGUST),
    "ml.g6e.2xlarge": (2.8, *_AUGUST),
    "ml.g6e.12xlarge": (13.12, *_MID_2026_EAST),
    "ml.g6e.48xlarge": (37.66, *_SEPTEMBER),
    "ml.p4d.24xlarge": (25.25, *_MID_2026_WEST),
    "ml.p4de.24xlarge": (31.5641, *_SEPTEMBER),
    "ml.p5.4xlarge": (7.912, *_SEPTEMBER),
    "ml.p5.48xlarge": (63.3, *_MID_2026_WEST),
}
"""Instance -> USD an hour on demand, where and when that was read, and its source."""

INSTANCES: dict[str, Instance] = {
    name: Instance(name, gpu, gpus, *_PRICES.get(name, ()))
    for family, (gpu, sizes) in _FAMILIES.items()
    for size, (gpus, _) in sizes.items()
    for name in [f"ml.{family}.{size}"]
}
"""SageMaker's instances of these families, smallest first. Prices change: a plan shows their date, and a user may give another."""
