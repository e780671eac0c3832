"""Measures how far the merged model is from the adapter on its 4-bit base, on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.text import Say
from qlora_helpers.base.units import gib
from qlora_helpers.evaluation.comparison import answered, compared
from qlora_helpers.export.adapter import load_adapter
from qlora_helpers.model.run_model import RunModel
from qlora_helpers.model.stored_tensors import stored_tensors
from qlora_helpers.planning import out_of_memory
from qlora_helpers.runs.folder import Run

if TYPE_CHECKING:
    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.model.loading import LoadedModel


DRIFT_PROMPTS = 8
MEMORY_MARGIN = 1.2  # times the size of the unquantised model that is loaded here


@dataclass(frozen=True)
class Drift:
    """How far two forms of the tuned model are apart, on the run's held-out prompts.

    Attributes:
        first, second: the names of the two forms.
        prompts: how many prompts were asked.
        largest_difference: between next-token logits.
        kl_nats: mean of KL(first || second) over the next token's probabilities, nats.
        same_answers: short greedy answers that are equal to the letter.
    """

    first: str
    second: str
    prompts: int
    largest_difference: float
    kl_nats: float
    same_answers: int


def measured_drift(
    run: Run, merged: Path, *, prepare: Callable[[LoadedModel], PreparedData], say: Say
) -> tuple[tuple[Drift, ...], str]:
    """Asks the adapter on 4-bit weights, on bfloat16 weights and the merged model in turn; or returns the reason why not.

    Args:
        run: a run with a saved adapter.
        merged: the folder of the merged model.
        prepare: returns the run's prepared data for a loaded model; its held-out prompts are asked.
        say: receives a line before each form is asked.
    """
    config = run.config()
    needed = MEMORY_MARGIN * _loaded_bytes(merged)
    free = _free_bytes()
    if needed > free:
        return (
            (),
            f"drift not measured: the unquantised model takes {gib(needed):.1f} GiB, {gib(free):.1f} GiB are free",
        )
    plain = replace(config.model, quantization="none")
    forms: dict[str, Callable[[], RunModel]] = {
        "adapter on 4 bits": lambda: _with_adapter(run, config.model),
        "adapter on 16 bits": lambda: _with_adapter(run, plain),
        "merged": lambda: _alone(run, replace(plain, name=str(merged), revision=None)),
    }
    if config.model.quantization == "none":
        del forms["adapter on 4 bits"]
    found = {}
    for name, load in forms.items():
        say(f"Asking the {name} ...")
        try:
            found[name] = _answers_of(load, prepare)
        except Exception as error:
            if not out_of_memory.is_out_of_memory(error):
                raise
            out_of_memory.release_frames(error)
        out_of_memory.free_memory()
        if name not in found:  # the merged model may have taken hours and is kept
            return (), f"drift not measured: asking the {name} ran out of memory"
    names = list(found)
    pairs = [(first, names[-1]) for first in names[:-1]] + ([(names[0], names[1])] if len(names) > 2 else [])
    return tuple(_drift(first, second, found[first], found[second]) for first, second in pairs), ""


def _answers_of(load: Callable[[], RunModel], prepare: Callable[[LoadedModel], PreparedData]) -> tuple[list, list]:
    """What a form answers to the run's held-out prompts; the model is gone afterwards."""
    asked = load()
    return answered(asked, prepare(asked.loaded), DRIFT_PROMPTS)


def _with_adapter(run: Run, config: Any) -> RunModel:
    from qlora_helpers.model.loading import load_model

    loaded = load_model(config, say=lambda text: None)
    return RunModel(run, load_adapter(run, loaded), loaded)


def _alone(run: Run, config: Any) -> RunModel:
    from qlora_helpers.model.loading import load_model

    loaded = load_model(config, say=lambda text: None)
    return RunModel(run, loaded.model, loaded)


def _drift(first: str, second: str, one: tuple[list, list], other: tuple[list, list]) -> Drift:
    import torch

    kl = []
    for a, b in zip(one[0], other[0], strict=True):
        log_a, log_b = torch.log_softmax(a.double(), -1), torch.log_softmax(b.double(), -1)
        kl.append(float((log_a.exp() * (log_a - log_b)).sum()))
    shared = compared(one, other)
    return Drift(
        first, second, shared["prompts"], shared["largest_difference"], sum(kl) / len(kl), shared["same_answers"]
    )


def _loaded_bytes(folder: Path) -> int:
    """Returns the bytes of the unquantised model in memory: bfloat16 on a GPU, float32 on a CPU."""
    import torch

    values = sum(tensor.values for tensor in stored_tensors(folder).values())
    return values * (2 if torch.cuda.is_available() else 4)


def _free_bytes() -> int:
    import psutil
    import torch

    if torch.cuda.is_available():
        return sum(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    return psutil.virtual_memory().available
