"""Plain facts about hardware: GPUs, SageMaker instances and dated prices.

Owns how hardware is named (`4x24GiB`, `2xA100-80GB`, `ml.g5.12xlarge`). Looks at no machine and asks no price list.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.units import gib


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


# usable_gib: "total capacity" in PyTorch's out-of-memory messages in public reports; H100 as measured here
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
        Gpu("RTX-3090", 24, 23.67, 71, 936),
        Gpu("RTX-4090", 24, 23.52, 165, 1008, fp8_tflops=330),
    )
}
"""GPUs by short name. H100 and H200 are the SXM cards, as are both A100."""
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
    """Finds the catalogue's entry for a driver's name: `NVIDIA A100-SXM4-80GB` is an A100-80GB."""
    words = driver_name.replace(" ", "-").upper().split("-")
    called = [gpu for gpu in GPUS.values() if all(part in words for part in gpu.name.upper().split("-"))]
    return max(called, key=lambda gpu: len(gpu.name), default=None)


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


@dataclass(frozen=True)
class Hardware:
    """The GPUs that a plan is for.

    Attributes:
        label: as the user named it, in the catalogue's spelling.
        gpus: how many.
        usable_gib: of one GPU, before the CUDA context.
        gpu: its facts, or None where only an amount of memory was given.
        price_usd_per_hour: of all of it, or None where it is not known.
        price_note: where the price is from; empty where there is none.
    """

    label: str
    gpus: int
    usable_gib: float
    gpu: Gpu | None
    price_usd_per_hour: float | None
    price_note: str

    @property
    def priced(self) -> str:
        """Name and price, for a reader."""
        if self.price_usd_per_hour is None:
            return f"{self.label}, price not known"
        return f"{self.label}, ${self.price_usd_per_hour:.2f} an hour; {self.price_note}"


MAX_GPUS = 64  # of one machine
_COUNTED = re.compile(r"(?:(\d+)\s*[x×]\s*)?(\S.*)", re.IGNORECASE)
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB)", re.IGNORECASE)


def parse_gpus(text: str, price: float | None = None) -> Hardware:
    """Reads hardware as people write it.

    Args:
        text: an amount (`24GiB`, `4x24GiB`; GB is 1000³ bytes), GPUs of the catalogue (`H100`, `2xA100-80GB`), or a SageMaker
            instance (`ml.g5.12xlarge`). An amount is taken as usable; a GPU's usable memory is less than what it is sold as.
        price: USD per hour for all of it, instead of the catalogue's.

    Raises:
        UserError: it is none of these, or the price is negative or not a number.
    """
    if price is not None and not 0 <= price < math.inf:
        raise UserError("this is not a price", expected="USD per hour, 0 or more", got=str(price))
    wanted = text.strip().lower()
    gpu: Gpu | None
    if instance := INSTANCES.get(wanted):
        gpu = GPUS[instance.gpu]
        label, count, known = instance.name, instance.gpus, instance.price_usd_per_hour
        usable, note = gpu.usable_gib, f"{instance.region}, {instance.priced_on} ({instance.source})" if known else ""
    else:
        if (counted := _counted_gpus(wanted)) is None:
            raise _unknown_hardware(text)
        count, label, gpu, usable = counted
        label, known, note = f"{count}x{label}" if count > 1 else label, None, ""
    if price is not None:
        known, note = price, "as given"
    return Hardware(label, count, usable, gpu, known, note)


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
