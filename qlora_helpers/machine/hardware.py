"""Plain facts about hardware: GPUs, and what a person names as the hardware of a plan.

Owns how hardware is named (`4x24GiB`, `2xA100-80GB`, `ml.g5.12xlarge`, `2xml.g5.12xlarge` for two machines). Looks at no machine and asks no price list.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.units import gib
from qlora_helpers.machine.instances import INSTANCES
from qlora_helpers.machine.links import LINKS, UNKNOWN_NETWORK, UNNAMED_LINK, Link


@dataclass(frozen=True)
class Gpu:
    """A GPU as its datasheet and CUDA describe it.

    Attributes:
        name: short name, as in `GPUS`.
        memory_gib: what it is sold as, the number on the box.
        usable_gib: what `torch.cuda.get_device_properties(0).total_memory` gives, in GiB: the lowest figure seen, since it varies a
            little with the driver. ECC and the driver take the rest; the CUDA context takes its part of this.
        bf16_tflops: dense matrix multiplications in bfloat16 with float32 sums, by the datasheet; float16 where there is no bfloat16.
        bandwidth_gb_s: of its memory, by the datasheet.
        supports_bf16: whether it has bfloat16 tensor cores.
        measured: whether speed was measured in this project; on all other GPUs it is extrapolated.
        fp8_tflops: the same as `bf16_tflops` in FP8 (e4m3), also with float32 sums; 0 where there is none.
        fp8_measured: whether steps in FP8 were measured in this project.
    """

    name: str
    memory_gib: float
    usable_gib: float
    bf16_tflops: float
    bandwidth_gb_s: float
    supports_bf16: bool = True
    measured: bool = False
    fp8_tflops: float = 0.0
    fp8_measured: bool = False


# usable_gib: "total capacity" in PyTorch's out-of-memory messages in public reports; H100 as measured here. bf16_tflops of GeForce
# cards: NVIDIA's architecture papers (GA102, Ada, RTX Blackwell), tensor cores with float32 sums, which are twice the float32 rate
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 16, 14.58, 65, 320, supports_bf16=False),
        Gpu("A10G", 24, 21.99, 70, 600),
        Gpu("L4", 24, 22.03, 121, 300, fp8_tflops=242),
        Gpu("L40S", 48, 44.40, 362, 864, fp8_tflops=733),
        Gpu("A100-40GB", 40, 39.39, 312, 1555),
        Gpu("A100-80GB", 80, 79.14, 312, 2039),
        Gpu("H100", 80, 79.11, 989, 3350, measured=True, fp8_tflops=1979),
        Gpu("H200", 141, 139.8, 989, 4800, measured=True, fp8_tflops=1979, fp8_measured=True),
        Gpu("H100-PCIE", 80, 79.1, 756, 2039, fp8_tflops=1513),
        Gpu("H100-NVL", 94, 93.1, 835, 3938, fp8_tflops=1671),
        Gpu("B200", 180, 178.3, 2250, 8000, fp8_tflops=4500),
        Gpu("A10", 24, 21.98, 125, 600),
        Gpu("A40", 48, 44.35, 150, 696),
        Gpu("L40", 48, 44.39, 181, 864, fp8_tflops=362),
        Gpu("RTX-A6000", 48, 47.4, 155, 768),
        Gpu("RTX-6000-Ada", 48, 44.43, 364, 960, fp8_tflops=728),
        Gpu("RTX-PRO-6000", 96, 94.9, 504, 1792, fp8_tflops=1008),
        Gpu("RTX-3060", 12, 11.76, 25, 360),
        Gpu("RTX-3080", 10, 9.78, 60, 760),
        Gpu("RTX-3090", 24, 23.67, 71, 936),
        Gpu("RTX-4070", 12, 11.7, 58, 504, fp8_tflops=117),
        Gpu("RTX-4080", 16, 15.7, 97, 717, fp8_tflops=195),
        Gpu("RTX-4090", 24, 23.52, 165, 1008, fp8_tflops=330),
        Gpu("RTX-5080", 16, 15.4, 113, 960, fp8_tflops=225),
        Gpu("RTX-5090", 32, 31.36, 209, 1792, fp8_tflops=419),
    )
}
"""GPUs by short name. H100 and H200 are the SXM cards, as are both A100. Cards with little memory and laptops' are left out."""
ALSO_CALLED = {
    "a100": "A100-40GB",
    "a100-80": "A100-80GB",
    "a100-80g": "A100-80GB",
    "a100-80gib": "A100-80GB",
    "a100-40": "A100-40GB",
    "a100-40g": "A100-40GB",
    "a100-40gib": "A100-40GB",
    "h100-80gb": "H100",
    "h200-141gb": "H200",
}
"""Names that a card has beside `GPUS`' own, as `_plain_name` writes them; a bare A100 is the smaller one: what fits
there fits on both."""
UNSUPPORTED = {
    "mi": "an AMD GPU: weights in 4 bits and the fast step's kernels were made for CUDA and never tried on ROCm",
    "radeon": "an AMD GPU: weights in 4 bits and the fast step's kernels were made for CUDA and never tried on ROCm",
    "gaudi": "an Intel accelerator, which has no CUDA",
    "arc": "an Intel GPU, which has no CUDA",
    "tpu": "a TPU, which has no CUDA",
    "trn": "AWS Trainium, which has no CUDA",
    "trainium": "AWS Trainium, which has no CUDA",
    "inf": "AWS Inferentia, which has no CUDA",
    "inferentia": "AWS Inferentia, which has no CUDA",
}
"""Start of a name, before its number -> why it can't be planned."""
_ONE_LETTER = {
    "m": "an Apple chip, which has no CUDA",
    "p": "a GPU without tensor cores, for which 4-bit weights and the fast step were not made",
    "k": "a GPU that CUDA no longer supports",
}


def find_gpu(driver_name: str) -> Gpu | None:
    """Finds the catalogue's entry for a driver's name: `NVIDIA A100-SXM4-80GB` is an A100-80GB.

    A word that may mean another card (Ti, SUPER, D, Laptop, Max-Q, MIG) makes it an unknown one.
    """
    words = driver_name.replace(" ", "-").upper().split("-")
    parts = {name: name.upper().split("-") for name in GPUS}
    called = [gpu for name, gpu in GPUS.items() if all(part in words for part in parts[name])]
    found = max(called, key=lambda gpu: len(gpu.name), default=None)
    if found is None:
        return None
    rest = set(words) - set(parts[found.name]) - _DRIVERS_WORDS
    return None if any(not _MEMORY_WORD.fullmatch(word) for word in rest if word) else found


_DRIVERS_WORDS = frozenset(
    ("NVIDIA", "TESLA", "GEFORCE", "RTX", "SXM", "SXM4", "SXM5", "PCIE", "HBM2", "HBM2E", "HBM3", "HBM3E")
    + ("GENERATION", "ADA", "BLACKWELL", "WORKSTATION", "SERVER", "EDITION")
)
"""What drivers write beside a card's name without meaning another one."""
_MEMORY_WORD = re.compile(r"\d+GI?B")


@dataclass(frozen=True)
class Hardware:
    """The GPUs that a plan is for.

    Attributes:
        label: as the user named it, in the catalogue's spelling.
        gpus: how many, on all machines together.
        usable_gib: of one GPU, before the CUDA context.
        gpu: its facts, or None where only an amount of memory was given.
        price_usd_per_hour: of all of it, or None where it is not known.
        price_note: where the price is from; empty where there is none.
        machines: how many machines they are in, evenly.
        network: what connects the machines; None takes `UNKNOWN_NETWORK`.
        found_link: how the GPUs of a machine are linked, where that was looked up; else the catalogue counts.
    """

    label: str
    gpus: int
    usable_gib: float
    gpu: Gpu | None
    price_usd_per_hour: float | None
    price_note: str
    machines: int = 1
    network: Link | None = None
    found_link: Link | None = None

    @property
    def link(self) -> Link:
        """How the GPUs of one machine are linked."""
        return self.found_link or LINKS.get(self.gpu.name if self.gpu else "", UNNAMED_LINK)

    @property
    def between_machines(self) -> Link:
        """What connects the machines."""
        return self.network or UNKNOWN_NETWORK

    @property
    def gpus_per_machine(self) -> int:
        """GPUs of one machine."""
        return max(1, self.gpus // self.machines)

    @property
    def priced(self) -> str:
        """Name and price, for a reader."""
        if self.price_usd_per_hour is None:
            return f"{self.label}, price not known"
        return f"{self.label}, ${self.price_usd_per_hour:.2f} an hour; {self.price_note}"


MAX_GPUS = 64  # of one machine
MAX_MACHINES = 64
_COUNTED = re.compile(r"(?:(\d+)\s*[x×]\s*)?(\S.*)", re.IGNORECASE)
_COUNTED_INSTANCES = re.compile(r"(?:(\d{1,4})\s*[x×]\s*)?(ml\.\S+)")
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB)", re.IGNORECASE)


def parse_gpus(text: str, price: float | None = None) -> Hardware:
    """Reads hardware as people write it.

    Args:
        text: an amount (`24GiB`, `4x24GiB`; GB is 1000³ bytes), GPUs of the catalogue (`H100`, `2xA100-80GB`), or a SageMaker
            instance (`ml.g5.12xlarge`), or several of one kind (`2xml.g5.12xlarge`). An amount is taken as usable; a GPU's usable
            memory is less than what it is sold as.
        price: USD per hour for all of it, instead of the catalogue's.

    Raises:
        UserError: it is none of these, or the price is negative or not a number.
    """
    if price is not None and not 0 <= price < math.inf:
        raise UserError("this is not a price", expected="USD per hour, 0 or more", got=str(price))
    wanted = text.strip().lower()
    machines, network = 1, None
    gpu: Gpu | None
    counted_instances = _COUNTED_INSTANCES.fullmatch(wanted)
    if counted_instances and (instance := INSTANCES.get(counted_instances[2])):
        machines = int(counted_instances[1] or 1)
        if not 1 <= machines <= MAX_MACHINES:
            raise _unknown_hardware(text)
        gpu, network = GPUS[instance.gpu], instance.network
        one, label = instance.price_usd_per_hour, instance.name if machines == 1 else f"{machines}x{instance.name}"
        known, count = None if one is None else one * machines, instance.gpus * machines
        usable, note = gpu.usable_gib, f"{instance.region}, {instance.priced_on} ({instance.source})" if known else ""
    else:
        if (counted := _counted_gpus(wanted)) is None:
            raise _unknown_hardware(text)
        count, label, gpu, usable = counted
        label, known, note = f"{count}x{label}" if count > 1 else label, None, ""
    if price is not None:
        known, note = price, "as given"
    return Hardware(label, count, usable, gpu, known, note, machines, network)


def _counted_gpus(wanted: str) -> tuple[int, str, Gpu | None, float] | None:
    """Returns how many GPUs, the name of one, its facts and its usable GiB; None where the text is none of these."""
    match = _COUNTED.fullmatch(wanted)
    count = int(match[1] or 1) if match and len(match[1] or "") <= len(str(MAX_GPUS)) else 0
    if match is None or not 1 <= count <= MAX_GPUS:
        return None
    gpu = named_gpu(match[2])
    if gpu is not None:
        return count, gpu.name, gpu, gpu.usable_gib
    amount = _AMOUNT.fullmatch(match[2])
    number = float(amount[1]) if amount else 0
    if not amount or number <= 0:
        return None
    if amount[2].lower() == "gib":
        return count, f"{amount[1]}GiB", None, number
    return count, f"{amount[1]}GB", None, gib(number * 1e9)


def named_gpu(text: str) -> Gpu | None:
    """Finds a GPU by the name that people give it: `A100`, `RTX4090`, `4090`, `rtx 3090`, `A100 80GB`, `NVIDIA L40S`."""
    wanted = _plain_name(text)
    return next(
        (gpu for name, gpu in GPUS.items() if wanted in (_plain_name(name), name.lower())),
        GPUS.get(ALSO_CALLED.get(wanted, "")),
    )


def _plain_name(text: str) -> str:
    """Returns a card's name without maker, line and form, so that `GeForce RTX 4090`, `RTX-4090` and `4090` are one."""
    words = re.split(r"[\s_-]+", text.strip().lower())
    kept = [re.sub(r"^(?:rtx|gtx)(?=\d)", "", word) for word in words]
    return "-".join(
        word for word in kept if word not in ("nvidia", "tesla", "geforce", "rtx", "gpu", "sxm", "sxm4", "sxm5")
    )


def _unsupported(text: str) -> str | None:
    """Why a known kind of hardware can't be planned, or None where the name is simply not known."""
    counted = _COUNTED.fullmatch(text.strip())
    name = (
        _plain_name(counted[2] if counted else text)
        .removeprefix("amd-")
        .removeprefix("intel-")
        .removeprefix("instinct-")
    )
    if re.fullmatch(r"[mpk]\d+(?:-\w+)*", name):
        return _ONE_LETTER[name[0]]
    start = re.match(r"(?:ml\.)?([a-z]+)(?=[\d.-]|$)", name)
    return UNSUPPORTED.get(start[1]) if start else None


def _unknown_hardware(text: str) -> UserError:
    """Returns the error for hardware that is not known: why, the sizes of a known family of instances, or near names."""
    if reason := _unsupported(text):
        return UserError(
            f"{text.strip()[:40]} can't be planned: it is {reason}",
            expected="an NVIDIA GPU from the T4 on, such as " + ", ".join(GPUS),
            got=text.strip()[:80],
            next_step="Choose one of them, or a SageMaker instance such as ml.g5.12xlarge.",
        )
    family = text.strip().lower().removeprefix("ml.").split(".")[0]
    if sizes := [name for name in INSTANCES if name.startswith(f"ml.{family}.")]:
        return UserError(
            f"no instance ml.{family} of that size is known",
            expected=", ".join(sizes),
            got=text.strip(),
            next_step="Choose one of these, or give its GPUs, such as 4xA10G.",
        )
    counted = _COUNTED.fullmatch(text.strip().lower())
    names = {_plain_name(name): name for name in GPUS}
    close = difflib.get_close_matches(_plain_name(counted[2]) if counted else "", names, n=3, cutoff=0.5)
    return UserError(
        "these GPUs are not known",
        expected=f"NxMGiB such as 4x24GiB, a number (1 to {MAX_GPUS}) of {', '.join(GPUS)} such as 2xL4, or a SageMaker instance such as ml.g5.12xlarge",
        got=text.strip() or "nothing",
        next_step=(f"Did you mean {' or '.join(names[each] for each in close)}? " if close else "")
        + "Give the memory of one GPU as an amount if yours is not listed.",
    )
