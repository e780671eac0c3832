"""The tables of what each notebook takes, for its first cell (`tools/bands.py`) and for docs/bands.md (`documents.py`)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

from notebook_bands import (
    DISK_BYTES_S,
    NOTEBOOKS,
    WORK,
    OnGpu,
    config_of,
    first_step_s,
    measured,
    preparing_s,
    quantising_s,
    slower_than_computed,
)
from records import record

from qlora_helpers.machine.hardware import INSTANCES, Hardware, parse_gpus
from qlora_helpers.planning.speed import COMPILE_S

ONE_GPU = {
    "T4": "ml.g4dn.xlarge",
    "A10G": "ml.g5.xlarge",
    "L4": "ml.g6.xlarge",
    "L40S": "ml.g6e.xlarge",
    "A100 (8 are paid)": "ml.p4d.24xlarge",
    "H100": "ml.p5.4xlarge",
}
"""The cheapest SageMaker instance with such a GPU; A100s are let by eight, of which a notebook uses one and all are paid."""
FOR_FALCON = {
    "4 x T4": "ml.g4dn.12xlarge",
    "4 x A10G": "ml.g5.12xlarge",
    "4 x L4": "ml.g6.12xlarge",
    "L40S": "ml.g6e.xlarge",
    "A100 (8 are paid)": "ml.p4d.24xlarge",
    "H100": "ml.p5.4xlarge",
}
"""As many of each kind as Falcon-40B's training takes."""


@dataclass(frozen=True)
class Band:
    """What a notebook takes on one machine.

    Attributes:
        machine, profile: for a reader.
        seconds: from its first cell to its last, without a person's reading and without downloads.
        gib: of the fullest GPU; of the computer's memory where there is no GPU. 0 where a GPU stays empty.
        usd_per_hour: of the machine; 0 for a laptop.
        how: `measured` or `computed`.
        usable_gib: of one GPU.
    """

    machine: str
    profile: str
    seconds: float
    gib: float
    usd_per_hour: float
    how: str
    usable_gib: float = math.inf

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.gib <= self.usable_gib

    @property
    def dollars(self) -> float:
        """What the machine costs meanwhile, USD."""
        return self.usd_per_hour * self.seconds / 3600


def machine(label: str, instance: str, gpus: int | None = None) -> Hardware:
    """An instance's GPUs, or some of them, with the price of the whole instance."""
    found = parse_gpus(instance)
    return found if gpus is None else replace(found, gpus=gpus, label=label)


def on_laptop(name: str) -> list[Band]:
    """The laptop's rows: measured in both profiles, in one where they do the same; computed in `demo` where it was not measured."""
    rows = []
    for profile in ("tiny", "demo"):
        if found := measured(name, profile):
            rows.append(Band("laptop, one core", profile, found["cpu_s"], found["peak_gib"], 0.0, "measured"))
    if len(rows) == 1 and same_in_all(name):
        return [replace(rows[0], profile="every")]
    if len(rows) == 1:
        found_on = OnGpu(name, config_of(name, "demo"), machine("T4", ONE_GPU["T4"], gpus=1), planned=False)
        most = max(measured(each, "demo").get("peak_gib", 0.0) for each in WORK)  # as the notebook that takes most
        rows.append(Band("laptop, one core", "demo", found_on.seconds_on_a_core(), most, 0.0, "computed"))
    return rows


def same_in_all(name: str) -> bool:
    """Whether a notebook does the same in every profile."""
    work = WORK[name]
    return bool(work.always) or not (work.uses_gpu or work.prepares)


def on_gpus(name: str, profile: str = "demo") -> list[Band]:
    """The rows of the six kinds of GPU."""
    rows, work = [], WORK[name]
    planned = profile == "falcon-40b"
    for label, instance in (FOR_FALCON if planned else ONE_GPU).items():
        hardware = machine(label, instance, gpus=None if label.startswith("4") else 1)
        price = INSTANCES[instance].price_usd_per_hour
        assert price is not None, f"{instance} has no price"
        found = OnGpu(name, config_of(name, work.always or profile), hardware, planned)
        shown = "every" if same_in_all(name) else profile
        rows.append(Band(label, shown, found.seconds(), found.gib(), price, "computed", hardware.usable_gib))
    return rows


def table(name: str) -> str:
    """A notebook's table, as its first cell shows it."""
    rows = [_row(each) for each in on_laptop(name)]
    for row in map(_row, on_gpus(name)):
        if rows[-1][1:] == row[1:]:  # the same on several machines
            rows[-1][0] += f", {row[0]}"
        else:
            rows.append(row)
    return _table(("machine", "profile", "time", "memory", "price", "figures"), rows)


def falcon_table() -> str:
    """What each notebook that works with the profile's model or data takes with Falcon-40B."""
    names = [name for name in WORK if not same_in_all(name)]
    columns = {name: on_gpus(name, "falcon-40b") for name in names}
    rows = []
    for place, label in enumerate(FOR_FALCON):
        bands = [columns[name][place] for name in names]
        cells = [
            f"{duration_text(each.seconds)}, {_dollars(each.dollars)}"
            if each.fits
            else f"does not fit: {each.gib:.1f} GiB"
            for each in bands
        ]
        most = max(each.gib for each in bands if each.fits)
        rows.append([f"{label}, {FOR_FALCON[label]}", *cells, f"{most:.1f} GiB"])
    return _table(("GPUs", *(name.partition("_")[0] for name in names), "fullest GPU"), rows)


def parts_table(name: str = "06_evaluate") -> str:
    """What a notebook's time on a GPU is made of, as an example."""
    rows = []
    for label, instance in ONE_GPU.items():
        parts = OnGpu(name, config_of(name, "demo"), machine(label, instance, gpus=1), planned=False).parts()
        rows.append([label, *(f"{seconds:.1f} s" for seconds in parts.values())])
    return _table(("GPU", *parts), rows)


def prices_table() -> str:
    """The machines and their prices."""
    found = [(label, INSTANCES[name]) for label, name in {**ONE_GPU, **FOR_FALCON}.items()]
    rows = [
        [label, each.name, f"{each.price_usd_per_hour:.2f} USD", f"{each.region}, {each.priced_on}"]
        for label, each in found
    ]
    return _table(("GPUs", "machine", "an hour", "where and when"), rows)


def document_values() -> dict[str, str]:
    """What `templates/bands.md` is filled with."""
    machine_of = record("notebook_cost_two_cores")["machine"]
    return {
        "bands_notebooks": "\n\n".join(f"### {title(name)}\n\n{table(name)}" for name in WORK),
        "bands_falcon": falcon_table(),
        "bands_parts": parts_table(),
        "bands_prices": prices_table(),
        "bands_disk": f"{DISK_BYTES_S / 1e6:.0f} MB",
        "bands_quantising": f"{quantising_s() * 1e9:.1f} s",
        "bands_first_step": f"{first_step_s():.1f} s",
        "bands_compile": f"{COMPILE_S:.0f} s",
        "bands_slower": f"{slower_than_computed():.1f}",
        "bands_preparing": f"{preparing_s() * 1e6:.1f} s",
        "bands_cpu": f"{machine_of['processor']}, {machine_of['system']}",
        "bands_two_cores": f"{record('demo_two_cores')['runs'][0]['measured']['seconds']:.0f} s",
        "bands_demo_seconds": f"{record('demo_one_gpu')['measured']['seconds']:.0f} s",
    }


def title(name: str) -> str:
    """A notebook's title, as a link to it."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    heading = "".join(cells[0]["source"]).splitlines()[0].lstrip("# ")
    return f"[{heading}](../notebooks/{name}.ipynb)"


def _row(band: Band) -> list[str]:
    return [
        band.machine,
        band.profile if band.profile == "every" else f"`{band.profile}`",
        duration_text(band.seconds),
        (f"{band.gib:.1f} GiB" + (" of GPU memory" if band.usd_per_hour else "")) if band.gib else "no GPU memory",
        _dollars(band.dollars) if band.usd_per_hour else "none",
        band.how,
    ]


def _table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def duration_text(seconds: float) -> str:
    """Formats a time, rounded as a forecast is: seconds, minutes from 100 seconds on, hours from 100 minutes on."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _dollars(dollars: float) -> str:
    """Formats a price; without the sign, two of which JupyterLab would read as a formula between them."""
    return "under 0.01 USD" if dollars < 0.01 else f"{dollars:.2f} USD"
