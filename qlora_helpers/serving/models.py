"""The models behind one server: a base model in 4 bits, and the adapters of one or more runs that were trained on it.

They are loaded once; nothing is loaded for a request. Knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.text import Say
from qlora_helpers.planning import run_plan
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.locks import MODEL_IN_USE
from qlora_helpers.serving.refusal import Refusal
from qlora_helpers.serving.served_run import ServedRun
from qlora_helpers.serving.together import refuse_other_bases, served_names

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_helpers.model.loading import LoadedModel


class ServedModels:
    """Loads the base model of some runs and their adapters, and answers requests, one at a time.

    Args:
        runs: the runs; the first one's settings say how the base model is loaded.
        say: called with a line on what takes long.

    Raises:
        UserError: they can't be served together, or a model can't be loaded.
    """

    def __init__(self, runs: Sequence[Run], *, say: Say = print) -> None:
        from qlora_helpers.export.adapter import load_adapter
        from qlora_helpers.model import adapter_loading
        from qlora_helpers.model.checkpoints import base_fingerprint
        from qlora_helpers.model.loading import load_model

        self.names = served_names(runs)
        certificates = refuse_other_bases(runs)
        config = runs[0].config()
        self.loaded: LoadedModel = load_model(
            config.model, spread=lambda gpus: run_plan.layers_per_gpu(config, gpus), say=say
        )
        fingerprint = base_fingerprint(self.loaded.checkpoint.folder)
        if fingerprint != certificates[0].base_sha256:
            raise ModelError(
                f"{self.loaded.checkpoint.name} is not the base model that {runs[0].name!r} was trained on",
                expected=(certificates[0].base_sha256 or "none")[:12],
                got=(fingerprint or "none")[:12],
                next_step="Get the model's files again as they were, or train the run again.",
            )
        self.model: PeftModel = load_adapter(runs[0], self.loaded)
        adapters = ["default"]
        for number, run in enumerate(runs[1:], start=2):
            adapters.append(f"adapter{number}")
            adapter_loading.load_adapter(self.model, run.adapter_dir, name=adapters[-1])
        served = [
            ServedRun(run, adapter, self, certificate.weights_sha256)
            for run, adapter, certificate in zip(runs, adapters, certificates, strict=True)
        ]
        base = ServedRun(runs[0], None, self, fingerprint or "")
        self._by_name = dict(zip(self.names, (base, *served), strict=True))

    def named(self, name: str) -> ServedRun:
        """Returns the model of a name.

        Raises:
            Refusal: none of that name is served; nothing is ever loaded for a request.
        """
        if name not in self._by_name:
            names = ", ".join(self.names)
            raise Refusal(
                f"There is no model {name[:100]!r} here, but: {names}.",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self._by_name[name]

    @contextlib.contextmanager
    def answering(self, adapter: str | None) -> Iterator[None]:
        """While open, this adapter answers, or the base model where it is None."""
        with MODEL_IN_USE:
            if adapter is None:
                with self.model.disable_adapter():
                    yield
            else:
                self.model.set_adapter(adapter)
                yield
