"""How GPUs reach each other: NVLink, PCI Express or a network, as plain facts with their source. Looks at no machine."""

from __future__ import annotations

from dataclasses import dataclass

THROUGH_HOST = "the cards can't read each other's memory, so every transfer goes through the host's"


@dataclass(frozen=True)
class Link:
    """What connects a GPU, or a whole machine, with the others.

    Attributes:
        name: for a reader, such as `NVLink 4`.
        gb_s: of one direction, by the datasheet, GB/s (10⁹ bytes); of each GPU, or of a machine where it is a network.
        collective_share: of that rate which NCCL's collectives reach. Assumed, and not measured in this project.
        source: where `gb_s` was published.
    """

    name: str
    gb_s: float
    collective_share: float
    source: str

    @property
    def bytes_s(self) -> float:
        """Bytes a second of a collective, as it is assumed."""
        return self.gb_s * 1e9 * self.collective_share

    def __str__(self) -> str:
        return f"{self.name} ({self.gb_s:g} GB/s each way)"


_NVIDIA = "NVIDIA's datasheets, both directions divided by two"
_PCI = "PCI-SIG: 16 lanes"
NVLINK_3 = Link("NVLink 3", 300.0, 0.75, f"{_NVIDIA}: A100, 600 GB/s")
NVLINK_4 = Link("NVLink 4", 450.0, 0.75, f"{_NVIDIA}: H100 and H200, 900 GB/s")
NVLINK_5 = Link("NVLink 5", 900.0, 0.75, f"{_NVIDIA}: B200, 1,800 GB/s")
PCIE_3 = Link("PCIe 3", 15.75, 0.3, f"{_PCI} of 8 GT/s")
PCIE_4 = Link("PCIe 4", 31.5, 0.3, f"{_PCI} of 16 GT/s")
PCIE_5 = Link("PCIe 5", 63.0, 0.3, f"{_PCI} of 32 GT/s")
PCIE = {3: PCIE_3, 4: PCIE_4, 5: PCIE_5}
"""By generation."""
LINKS: dict[str, Link] = {
    "T4": PCIE_3,
    "A10G": PCIE_4,
    "L4": PCIE_4,
    "L40S": PCIE_4,
    "A100-40GB": NVLINK_3,
    "A100-80GB": NVLINK_3,
    "H100": NVLINK_4,
    "H200": NVLINK_4,
    "H100-PCIE": PCIE_5,
    "H100-NVL": PCIE_5,
    "B200": NVLINK_5,
    "RTX-PRO-6000": PCIE_5,
    "RTX-5080": PCIE_5,
    "RTX-5090": PCIE_5,
    **dict.fromkeys(("A10", "A40", "L40", "RTX-A6000", "RTX-6000-Ada"), PCIE_4),
    **dict.fromkeys(("RTX-3060", "RTX-3080", "RTX-3090", "RTX-4070", "RTX-4080", "RTX-4090"), PCIE_4),
}
"""Card -> how several of them in one machine are linked; A100, H100 and H200 are the SXM cards. A pair of RTX
3090, A40, RTX A6000 or H100 NVL may have an NVLink bridge, which is not counted on."""
UNNAMED_LINK = PCIE_4
"""Between cards of which only the memory is known."""
NETWORK_SHARE = 0.7


def network(gbit_s: float, source: str) -> Link:
    """Returns a machine's network.

    Args:
        gbit_s: of one direction, Gbit/s.
        source: where that was published.
    """
    return Link(f"{gbit_s:g} Gbit/s network", gbit_s / 8, NETWORK_SHARE, source)


UNKNOWN_NETWORK = network(10, "assumed: no network was named")


def slower(one: Link, other: Link) -> Link:
    """Returns the link over which a collective takes longer."""
    return one if one.bytes_s <= other.bytes_s else other
