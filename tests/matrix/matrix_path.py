"""The whole path of one family: what a person does with a model, from its files to a merged export, on a tiny configuration."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from matrix_configurations import LONGEST, tiny_config

STAGES = ("build", "load", "adapters", "data", "plain", "fast", "certificate", "evaluation", "reload", "export")
"""In this order, each after those before it have passed; the plan stands beside them."""
SETTINGS = (
    *(f"data.seq_len_tokens={LONGEST}", "data.train_rows=8", "data.eval_rows=1", "data.test_rows=2"),
    *("train.max_steps=3", "train.eval_steps=3", "train.save_steps=3", "train.activation_checkpointing=true"),
    *("train.tensorboard=off", "adapter.lora_dropout=0", "adapter.r=4", "evaluation.max_new_tokens=4"),
    *("evaluation.few_shot=0", "evaluation.chat_baseline=false"),
)
LOSS_TOLERANCE = 1e-4  # of a loss, in float32; a soft-cap that is left out moves it by ten times as much
MERGED_TOLERANCE = 2**-8  # of a weight: a rounding to bfloat16


class FailedError(Exception):
    """A stage came to its end with a wrong result."""


def judge(
    family: str,
    folder: Path,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
    stages: tuple[str, ...] = STAGES,
) -> dict[str, Any]:
    """Takes a family down the whole path.

    Args:
        family: a key of transformers' causal-LM mapping.
        folder: an empty folder for the model and its runs.
        keep: called with what was found so far, after each stage.
        stages: the path, or its beginning.

    Returns:
        `family`, `reached` (the last stage that passed), `passed`, and what each stage found; where one failed, `failed` with its
        name, the error's class and sentence, and whether the package refused it by itself.
    """
    found: dict[str, Any] = {"family": family, "reached": None, "passed": False, "seconds": {}}
    path = _Path(family, folder, found)
    for stage in stages:
        started = time.process_time()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                getattr(path, stage)()
        except Exception as error:
            found["failed"] = _failure(stage, error)
        found["seconds"][stage] = round(time.process_time() - started, 2)
        if "failed" in found:
            break
        found["reached"] = stage
        keep(found)
    else:
        found["passed"] = True
    keep(found)
    return found


def _failure(stage: str, error: Exception) -> dict[str, Any]:
    import traceback

    from qlora_helpers.base.errors import UserError

    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in frame.filename]
    text = " ".join(str(error).split())
    return {
        "stage": stage,
        "error": type(error).__name__,
        "sentence": text[:500],
        "refused": isinstance(error, UserError),
        "place": f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "",
    }


def compared(sizes: Any, loaded: Any) -> dict[str, Any]:
    """The plan's parameters and bytes beside those of a loaded model, which computes in bfloat16.

    Returns:
        `off`, of the parameters, and `bytes_off`, of the weights with their quantisation constants; both relative. Tables of
        codes are left out: a kilobyte for each weight, whatever its size.
    """
    from qlora_helpers.planning.memory import StepMemory
    from qlora_helpers.planning.step_settings import StepSettings

    settings = StepSettings(
        seq_len_tokens=1, micro_batch_size=1, checkpointed=0, compiled=False, r=1, adapter_parameters=0
    )
    planned = StepMemory(sizes, settings).stage(layers=sizes.layers, checkpointed=0, first=True, last=True).weights
    held = sum(weight_bytes(parameter) for parameter in loaded.model.parameters())
    parameters = sizes.parameters + sizes.beside_text
    return {
        "off": round(parameters / loaded.audit.parameters - 1, 6),
        "bytes": planned,
        "bytes_off": round(planned / held - 1, 6),
    }


def weight_bytes(parameter: Any) -> int:
    """The bytes of a parameter and of its quantisation constants."""
    size, state = parameter.numel() * parameter.element_size(), getattr(parameter, "quant_state", None)
    while state is not None:
        size += state.absmax.numel() * state.absmax.element_size()
        state = state.state2
    return size


class _Path:
    """The stages, each a method that raises where it fails and writes what it found into `found`."""

    def __init__(self, family: str, folder: Path, found: dict[str, Any]) -> None:
        self.family, self.folder, self.found = family, folder, found
        self.model: Any = None
        self.loaded: Any = None
        self.run: Any = None
        self.losses: dict[str, list[float]] = {}

    def build(self) -> None:
        """The model's files, with random weights and the corpus tokenizer."""
        import torch
        from transformers import AutoModelForImageTextToText

        from qlora_helpers.model.blueprint import model_class
        from qlora_helpers.model.checkpoints import corpus_tokenizer

        config = tiny_config(self.family)
        torch.manual_seed(0)
        model = model_class(config).from_config(config, dtype=torch.bfloat16)
        if type(model.config) is not type(config):  # the text part alone; a checkpoint holds all parts
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        for each in model.modules():  # new tables have zeros for padding, a trained checkpoint has not
            if isinstance(each, torch.nn.Embedding) and each.padding_idx is not None:
                torch.nn.init.normal_(each.weight.data[each.padding_idx], std=0.02)
        self.found |= {"class": type(model).__name__, "parameters": sum(each.numel() for each in model.parameters())}
        if self.found["parameters"] > 40e6:
            raise FailedError(f"{self.found['parameters']:,} parameters are not tiny")
        text = config.get_text_config()
        kinds = list(getattr(text, "layer_types", None) or [])
        self.found["layers"] = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)} or {
            "all": getattr(text, "num_hidden_layers", None)
        }
        model.save_pretrained(self.folder / "model")
        corpus_tokenizer().save_pretrained(self.folder / "model")

    def load(self) -> None:
        """The plan from `config.json`; then the model in NF4, with every weight accounted for."""
        from qlora_helpers.model.loading import load_model

        self.found["plan"], sizes = self._plan()
        self.run = self._opened("plain", "train.fast_step=false")
        if sizes is not None:
            as_on_a_gpu = replace(self.run.config().model, compute_dtype="bfloat16")
            self.found["plan"] |= compared(sizes, load_model(as_on_a_gpu, say=lambda text: None))
        self.loaded = self._load()
        audit = self.loaded.audit
        self.found |= {
            "attention": audit.attention,
            "not_in_4_bits": round(sum(each.values for each in audit.unquantised) / audit.parameters, 4),
            "reasons": {each.reason: round(each.values / audit.parameters, 4) for each in audit.unquantised},
        }

    def adapters(self) -> None:
        """At the recipe's dropout, which peft refuses for some layers, and then without."""
        from qlora_helpers import workflow

        self.model = workflow.add_adapters(self.run, self.loaded)
        self.found["adapters"] = sum("lora_A" in name for name, _ in self.model.named_parameters())
        if not self.found["adapters"]:
            raise FailedError("no layer has an adapter")

    def data(self) -> None:
        from qlora_helpers import workflow

        data = workflow.prepare_data(
            self.run, self.loaded.tokenizer, shape=self.loaded.shape, model=self.model, say=lambda text: None
        )
        self.found["packed"] = data.packed
        if not data.packed:
            self.found["why_padded"] = self._why_padded()

    def plain(self) -> None:
        self.losses["plain"] = self._train()

    def fast(self) -> None:
        """The same three steps in the fast way, on the same model with adapters that start anew."""
        from qlora_helpers import workflow

        self.run = self._opened("fast", "train.fast_step=true")
        self.loaded = self._load()
        self.model = workflow.add_adapters(self.run, self.loaded)
        self.losses["fast"] = self._train()
        apart = max(
            abs(one - other) / abs(one) for one, other in zip(self.losses["plain"], self.losses["fast"], strict=True)
        )
        self.found |= {"losses": self.losses, "losses_apart": float(f"{apart:.1e}")}
        if not apart <= LOSS_TOLERANCE:
            raise FailedError(f"the losses of plain and fast steps differ by {apart:.2%}: {self.losses}")

    def certificate(self) -> None:
        from qlora_helpers.export.certificate import read_certificate

        found = read_certificate(self.run.adapter_dir)
        if found is None or not found.passed:
            raise FailedError("; ".join(found.problems) if found else "there is none")

    def evaluation(self) -> None:
        from qlora_helpers import workflow

        workflow.evaluate(self.run, model=self.model, loaded=self.loaded, say=lambda text: None)

    def reload(self) -> None:
        from qlora_helpers import workflow

        workflow.check_reload(self.run, self.model, self.loaded, prompts=2, say=lambda text: None)

    def export(self) -> None:
        """Merged, and each weight of the merged model compared with what peft itself makes of base and adapter."""
        from qlora_helpers import workflow
        from qlora_helpers.model.adapter_loading import load_adapter
        from qlora_helpers.model.loading import load_model

        self.loaded = self.model = None
        report = workflow.export_run(self.run, drift=False, say=lambda text: None)
        whole = replace(self.run.config().model, quantization="none")
        base = load_model(whole, say=lambda text: None).model
        merged = load_model(replace(whole, name=str(report.folder / "merged")), say=lambda text: None).model
        expected = dict(load_adapter(base, self.run.adapter_dir).merge_and_unload().named_parameters())
        found = dict(merged.named_parameters())
        if found.keys() != expected.keys():
            raise FailedError(f"other weights: {sorted(found.keys() ^ expected.keys())[:3]}")
        apart = {
            name: float(((found[name] - value).abs() - MERGED_TOLERANCE * value.abs()).max())
            for name, value in expected.items()
        }
        worst = max(apart, key=lambda name: apart[name])
        if not apart[worst] <= 1e-6:
            raise FailedError(f"the merged model's {worst} is off by {apart[worst]:.2g}")

    def _opened(self, name: str, *more: str) -> Any:
        from qlora_helpers import workflow

        return workflow.open_run(
            str(self.folder / "runs" / name),
            profile="tiny",
            settings=[f"model.name={self.folder / 'model'}", *SETTINGS, *more],
        )

    def _load(self) -> Any:
        from qlora_helpers import workflow

        return workflow.load(self.run, say=lambda text: None)

    def _train(self) -> list[float]:
        from qlora_helpers import workflow
        from qlora_helpers.runs.progress import Progress

        workflow.train(self.run, model=self.model, loaded=self.loaded, show_progress=False, say=lambda text: None)
        return [each["loss"] for each in Progress(self.run.progress_path).read(to_end=True) if "loss" in each]

    def _plan(self) -> tuple[dict[str, Any], Any]:
        """What the plan says of `config.json`, and the sizes; None where it refuses."""
        from qlora_helpers.base.errors import UserError
        from qlora_helpers.model.shapes.config_file import read_config_file
        from qlora_helpers.model.shapes.sizes import model_sizes

        try:
            sizes = model_sizes(read_config_file(self.folder / "model" / "config.json", self.family))
        except UserError as error:
            return {"refused": " ".join(str(error).split())[:300]}, None
        return {"counted": sizes.counted, "parameters": sizes.parameters + sizes.beside_text}, sizes

    def _why_padded(self) -> str:
        from qlora_helpers.training.row_isolation import packing_refusal

        config = self.run.config()
        return packing_refusal(self.model, config.data.seq_len_tokens, config.train.micro_batch_size) or "?"
