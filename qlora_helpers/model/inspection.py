"""Shows what is in a checkpoint and what 4-bit storage does to it.

Owns the count of a model's weights before anything is loaded, and the comparison of a quantised layer with its original. Loads no
model, and knows nothing of adapters, data or run folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.units import gib
from qlora_helpers.model.blueprint import meta_model
from qlora_helpers.model.checkpoints import Checkpoint
from qlora_helpers.model.load_errors import load_errors_explained
from qlora_helpers.model.loading_folder import model_config
from qlora_helpers.model.nf4 import is_nf4, stored_bytes
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.model.shapes.wirings import KNOWN_FAMILIES
from qlora_helpers.model.stored_tensors import weight_files

if TYPE_CHECKING:
    import torch


def read_shape(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the model's `config.json` with defaults filled in, as `count_weights` and `workflow.prepare_data` take it."""
    from transformers import AutoConfig

    if checkpoint.shape is not None:
        return AutoConfig.for_model(**checkpoint.shape).to_dict()
    with load_errors_explained(checkpoint.name):
        return model_config(checkpoint).to_dict()


@dataclass(frozen=True)
class WeightCounts(Tabular):
    """How many weights a model has.

    Attributes:
        linear: in the linear layers and the stacks of experts of its decoder layers, which QLoRA stores in 4 bits.
        other: everything else (embedding, output head, norms), which is not quantised; tied weights count once.
    """

    linear: int
    other: int

    def gib(self, *, linear_bits: float, other_bits: float) -> float:
        """Returns the GiB that the weights take with these numbers of bits each."""
        return gib((self.linear * linear_bits + self.other * other_bits) / 8)

    def table(self) -> Table:
        """Returns the counts, each with its share of all weights."""
        total = self.linear + self.other
        rows = [
            ["linear layers", f"{self.linear:,}", f"{self.linear / total:.1%}"],
            ["everything else", f"{self.other:,}", f"{self.other / total:.1%}"],
            ["all weights", f"{total:,}", ""],
        ]
        return Table((), rows, numbers=(1, 2))


def count_weights(shape: dict[str, Any]) -> WeightCounts:
    """Counts a model's weights from its shape: by arithmetic for known families, on the meta device for others.

    Args:
        shape: the model's `config.json`.
    """
    if shape.get("model_type") not in KNOWN_FAMILIES:
        return _count_on_meta(shape)
    sizes = model_sizes(shape)
    linear = round(sizes.layers * sizes.quantized_parameters_per_layer)
    return WeightCounts(linear, sizes.parameters - linear)


def _count_on_meta(shape: dict[str, Any]) -> WeightCounts:
    import torch
    from transformers import AutoConfig

    from qlora_helpers.model.quantizer import stacks_of

    model = meta_model(AutoConfig.for_model(**shape))
    head = model.get_output_embeddings()
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    linear += sum(module._parameters[name].numel() for module, names in stacks_of(model) for name in names)
    return WeightCounts(linear, sum(parameter.numel() for parameter in model.parameters()) - linear)


@dataclass(frozen=True, repr=False)
class LayerComparison:
    """A 4-bit layer beside its original.

    Attributes:
        name: of the weight.
        original: the weight in the checkpoint, `(out_features, in_features)`, float32.
        restored: the weight as the matrix multiplication sees it, of the same shape and type.
        bits: stored for each weight, constants and tables included.
    """

    name: str
    original: torch.Tensor
    restored: torch.Tensor
    bits: float

    @property
    def relative_error(self) -> float:
        """Root mean square of the error, relative to that of the weights."""
        error = (self.restored - self.original).square().mean()
        return float((error / self.original.square().mean()).sqrt())

    def __repr__(self) -> str:
        outputs, inputs = self.original.shape
        largest = float((self.restored - self.original).abs().max())
        return (
            f"{self.name}, {outputs} x {inputs}\n"
            f"stored in {self.bits:.3f} bits a weight\n"
            f"error {self.relative_error:.1%} of the weights' size (root mean square), {largest:.4f} at most"
        )


def compare_layer(model: torch.nn.Module, checkpoint: Checkpoint) -> LayerComparison:
    """Compares the first 4-bit layer of a loaded model with its weights in the checkpoint.

    Raises:
        ModelError: the model has no 4-bit layer, or no file of the checkpoint holds its weights.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit

    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    name, layer = next(((name, module) for name, module in linears if is_nf4(module)), ("", None))
    if layer is None:
        raise ModelError("the model has no layer in 4 bits", next_step="Set model.quantization=nf4.")
    original = _read_weight(checkpoint, f"{name}.weight").float()
    packed = layer.weight
    restored = dequantize_4bit(packed.data, packed.quant_state).float().cpu()
    return LayerComparison(f"{name}.weight", original, restored, 8 * stored_bytes(packed) / original.numel())


def _read_weight(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    from safetensors import safe_open

    for path in weight_files(checkpoint.folder):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                return file.get_tensor(name)
    raise ModelError(
        f"{checkpoint.name} has no file with the weight {name}",
        next_step="Random weights at true size are drawn in memory: look at random:falcon-tiny instead.",
    )
