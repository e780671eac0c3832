"""Counts a model on the layers that transformers builds from its configuration: on the meta device, so without weights or memory.

`python -m qlora_helpers.model.built_sizes` reads a `config.json` from standard input and prints the sizes as JSON; `shapes.counted`
runs it with limits on time and memory, since a configuration may come from anywhere. Only transformers' own classes are built,
never code that a checkpoint brings along. Of a multimodal model the text part is counted.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import resource
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_helpers.model.config_sizes import experts_of, largest, state_values
from qlora_helpers.model.nf4 import falcon_linears_as_plain
from qlora_helpers.model.quantizer import packed_weights
from qlora_helpers.model.shapes.decoder import LinearLayer, ModelSizes
from qlora_helpers.model.wiring import decoder_layers, text_decoder

SMALLEST_SIDE = (
    32  # a matrix with a shorter side is a router or a gate, whose few outputs no activations are counted for
)
_RECURRENT = re.compile(r"mamba|delta|recurrent|lightning|linearattention|rwkv|mlstm", re.I)
_MIXER = re.compile(r"attn|attention|mixer|mamba|conv|recurrent|temporal|ssm|mlstm|\bdense\b|query_key_value", re.I)
_MLP = re.compile(r"mlp|feed_forward|ffn|\bff\b|expert|moe|dense_h_to_4h|dense_4h_to_h|\bfc\d|\bw\d\b", re.I)
_BACK = re.compile(r"down|w2\b|fc2|fc_out|4h_to_h|c_proj|wo\b|output_linear|linear_2|dense_out|out_proj", re.I)


def build(config: dict[str, Any]) -> nn.Module:
    """Builds the model of a `config.json` on the meta device, with tied weights, as loading reads and builds it.

    Raises:
        ValueError: transformers knows no language model of that kind, or the configuration does not fit it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    plain = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    with tempfile.TemporaryDirectory() as folder:  # only a file's infinities and lists come out as they do in loading
        Path(folder, "config.json").write_text(json.dumps(plain), encoding="utf-8")
        read = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    for loader in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(read) in loader._model_mapping:
            # accelerate's `init_empty_weights` allocates each weight before it drops it
            with falcon_linears_as_plain(), torch.device("meta"):
                model: nn.Module = loader.from_config(read, dtype=torch.bfloat16, trust_remote_code=False)
            model.tie_weights()
            return model
    raise ValueError(f"transformers has no causal language model of the kind {config['model_type']}")


@dataclasses.dataclass
class _Layer:
    """What one decoder layer is made of; counts in weights, widths in values a token."""

    linears: Counter[tuple[str, int, int, bool]] = dataclasses.field(default_factory=Counter)
    stacks: Counter[tuple[str, int, int]] = dataclasses.field(default_factory=Counter)
    experts: int = 0
    expert_inner: int = 0
    expert_gated: bool = False
    expert_kept: float = 0.0
    inner: int = 0
    inner_outputs: int = 0
    mixer: int = 0
    norms: int = 0
    layer_norm: bool = False
    qk_norm: bool = False
    recurrent: bool = False
    recurrent_kept: float | None = None
    packages: frozenset[str] = frozenset()
    parameters: int = 0


def _matrix(module: nn.Module) -> tuple[int, int] | None:
    """Returns the input and output features of a linear layer, GPT-2's `Conv1D` included; None for other modules."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if isinstance(module, Conv1D) else None


def _measure(layer: nn.Module, hidden: int, seen: set[int], packed: set[int], per_token: int, experts: int) -> _Layer:
    """Counts one layer; a weight that an earlier layer holds too counts there alone."""
    found = _Layer()
    for name, module in layer.named_modules():
        own = [part for part in module.parameters(recurse=False) if id(part) not in seen]
        seen.update(id(part) for part in own)
        found.parameters += sum(part.numel() for part in own)
        kind, last = type(module).__name__, name.rpartition(".")[2]
        found.recurrent |= bool(_RECURRENT.search(kind)) or isinstance(module, nn.Conv1d)
        if (matrix := _matrix(module)) is not None:
            if own:
                _add_linear(found, name, module, matrix, id(module.weight) in packed, hidden, per_token, experts)
        elif "norm" in kind.lower() and len(own) and own[0].numel() == hidden and not last.startswith(("q_", "k_")):
            found.norms += 1
            found.layer_norm |= getattr(module, "bias", None) is not None
        elif "norm" in kind.lower():
            found.qk_norm |= last.startswith(("q_", "k_", "query_", "key_"))
        elif isinstance(module, nn.modules.conv._ConvNd):
            found.mixer += 2 * module.out_channels  # before and after its non-linearity
        else:
            _add_stacks(found, name, module, [part for part in own if id(part) in packed], hidden, per_token)
    return found


def _is_recurrent_mixer(part: nn.Module) -> bool:
    by_name = bool(_RECURRENT.search(type(part).__name__))
    return by_name or any(isinstance(child, nn.Conv1d) for child in part.children())


def _count_without_kernels(layers: Any, measured: list[_Layer], hidden: int) -> None:
    """Adds to recurrent layers what their mixer keeps without a kernel: run once for each class, since all of one are alike."""
    known: dict[type, tuple[float | None, frozenset[str]]] = {}
    for layer, found in zip(layers, measured, strict=True):
        mixer = next((part for part in layer.modules() if part is not layer and _is_recurrent_mixer(part)), None)
        if mixer is None or not found.recurrent:
            continue
        kind = type(mixer)
        if kind not in known:
            packages = _kernel_packages(mixer)
            known[kind] = (_kept_without_kernels(mixer, hidden) if packages else None, packages)
        found.recurrent_kept, found.packages = known[kind]


def _add_linear(
    found: _Layer,
    name: str,
    module: nn.Module,
    matrix: tuple[int, int],
    packed: bool,
    hidden: int,
    per_token: int,
    experts: int,
) -> None:
    inputs, outputs = matrix
    last = name.rpartition(".")[2]
    if re.search(r"experts\.\d+\.", name):  # a list of experts, each with linear layers of its own
        found.experts += inputs * outputs if packed else 0
        if _BACK.search(last):
            found.expert_inner += round(inputs * per_token / max(1, experts))
        return
    if packed:
        found.linears[last, inputs, outputs, getattr(module, "bias", None) is not None] += 1
    if min(inputs, outputs) < SMALLEST_SIDE:
        return
    back = bool(_BACK.search(last)) or (outputs == hidden and inputs != hidden)
    if _MLP.search(name) and not re.search(r"attn|attention", name):
        found.inner += inputs if back else 0
        found.inner_outputs += 0 if back else outputs
    else:
        found.mixer += inputs if back or last in ("o_proj", "dense", "wo") else outputs


def _add_stacks(found: _Layer, name: str, module: nn.Module, own: list[Any], hidden: int, per_token: int) -> None:
    names = {id(part): part_name for part_name, part in module.named_parameters(recurse=False)}
    if any(part.ndim == 3 for part in own):
        found.expert_kept = max(found.expert_kept, _kept_for_each(module))
    for part in own:
        found.experts += part.numel()
        if re.search("expert", f"{name} {type(module).__name__}", re.I):  # as `targets.stacks` finds them
            rows, columns = part.shape[1:]
            inputs, outputs = (rows, columns) if getattr(module, "is_transposed", False) else (columns, rows)
            found.stacks[f"{name.rpartition('.')[2]}.{names[id(part)]}", inputs, outputs] += part.shape[0]
        path = f"{name.rpartition('.')[2]}.{names[id(part)]}"
        other = part.shape[1] if part.shape[2] == hidden else part.shape[2]
        if _BACK.search(path):
            found.expert_inner += other * per_token
        elif "gate" in path or "input_linear" in path:
            found.expert_gated = True


def _kept_for_each(module: nn.Module) -> float:
    """Counts what experts keep for each inner value: their own activation is run on values without memory."""
    apply = getattr(module, "_apply_gate", None)
    if apply is None:
        return 0.0
    width, kept = 64, dict[int, int]()

    def look(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes() // tensor.element_size()
        held.append(tensor)
        return tensor

    held: list[torch.Tensor] = []
    branches = torch.empty(1, 2 * width, device="meta", requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        apply(branches)
    return sum(kept.values()) / width


def _kept_without_kernels(mixer: nn.Module, hidden: int) -> float | None:
    """Counts the values a token that a recurrent mixer keeps as transformers computes it here, on values without memory.

    Weights are frozen, so what adapters keep is not in it. None where it can't be run so, as with a kernel that is installed.
    """
    tokens, kept, held = 1024, dict[int, int](), list[torch.Tensor]()

    def look(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        if id(tensor) not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    own = list(mixer.parameters())
    weights = {id(part) for part in own}
    for part in own:
        part.requires_grad_(False)
    given = torch.empty(1, tokens, hidden, device="meta", dtype=torch.bfloat16, requires_grad=True) * 1
    try:
        with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
            mixer(given)
    except Exception:  # of a kernel, or of a layer that asks for more
        return None
    of_weights = {part.untyped_storage()._cdata for part in own}
    return sum(size for storage, size in kept.items() if storage not in of_weights) / tokens / given.element_size()


def _kernel_packages(mixer: nn.Module) -> frozenset[str]:
    """Which packages transformers looks for in the file that defines a mixer; short convolutions are computed here without."""
    source = inspect.getsource(sys.modules[type(mixer).__module__])
    found = re.findall(r'use_kernel_func_from_hub_with_fallback\(\s*"\w+",\s*"(\w+)"', source)
    return frozenset(found) - {"causal_conv1d"}


def count(model: nn.Module, family: str) -> ModelSizes:
    """Counts a model's text part.

    Args:
        model: as `build` gives it.
        family: the `model_type`.

    Raises:
        ValueError: it has no decoder layers, or no output head.
    """
    decoder, layers = text_decoder(model), decoder_layers(model)
    config: Any = model.config.get_text_config(decoder=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not layers or head is None or embedding is None:
        raise ValueError("it is not made of an embedding, decoder layers and an output head")
    vocab, hidden = head.weight.shape
    per_token, experts = experts_of(config)
    seen: set[int] = set()
    packed = packed_weights(model)
    measured = [_measure(layer, hidden, seen, packed, per_token, experts) for layer in layers]
    _count_without_kernels(layers, measured, hidden)
    if not any(each.experts for each in measured):
        per_token = experts = 0
    everything = {id(part): part.numel() for part in model.parameters()}
    of_text = set(everything) if config is model.config else _ids(decoder, embedding, head)
    total = sum(everything[part] for part in of_text)
    in_head = sum(part.numel() for part in head.parameters() if id(part) not in seen | _ids(embedding))
    return _sizes(
        measured,
        config,
        family=family,
        hidden=hidden,
        vocab=vocab,
        tied=any(id(part) in _ids(embedding) for part in head.parameters()),
        other_parameters=total - sum(each.parameters for each in measured) - in_head,
        other_quantized=sum(everything[part] for part in (packed & of_text) - seen),
        head_parameters=in_head,
        experts=experts,
        experts_per_token=per_token,
        beside_text=sum(everything.values()) - total,
        beside_quantized=sum(everything[part] for part in packed - of_text),
        float32_parameters=_in_float32(model, packed),
    )


def _in_float32(model: Any, packed: set[int]) -> int:
    """Counts the unquantised weights that transformers keeps in float32: by a part of their name, or as built."""
    names = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    kept = re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in sorted(names)) or "(?!)")
    return sum(
        part.numel()
        for name, part in model.named_parameters()
        if id(part) not in packed and (part.dtype == torch.float32 or kept.search(name))
    )


def _ids(*modules: nn.Module) -> set[int]:
    return {id(part) for module in modules for part in module.parameters()}


def _sizes(measured: list[_Layer], config: Any, **found: Any) -> ModelSizes:
    count_of, hidden = len(measured), found["hidden"]
    heads = largest(config, "num_attention_heads", "n_head", "num_heads") or 1
    head_dim = largest(config, "head_dim") or max(1, hidden // heads)
    linears: Counter[tuple[str, int, int, bool]] = Counter()
    for each in measured:
        linears.update(each.linears)
    stacks: Counter[tuple[str, int, int]] = Counter()
    for each in measured:
        stacks.update(each.stacks)
    matrices = sum(times * inputs * outputs for (_, inputs, outputs, _), times in linears.items())
    in_experts = sum(each.experts for each in measured)
    inner = [each.inner + each.expert_inner for each in measured]
    gated = sum(each.inner_outputs for each in measured) > 1.5 * sum(each.inner for each in measured)
    norms = _mean([each.norms for each in measured])
    states = state_values(config)
    mixers = [
        each.mixer + (0 if each.recurrent else 2 * heads) + (states if each.recurrent else 0) for each in measured
    ]
    plain = [
        max(mixer, each.recurrent_kept or 0.0) if each.recurrent else mixer
        for each, mixer in zip(measured, mixers, strict=True)
    ]
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return ModelSizes(
        layers=count_of,
        heads=heads,
        kv_heads=largest(config, "num_key_value_heads") or heads,
        head_dim=head_dim,
        intermediate=max(1, round(_mean(inner) / max(1, found["experts_per_token"]))),
        linears=tuple(
            LinearLayer(name, inputs, outputs, per_layer=_share(times, count_of), bias=bias)
            for (name, inputs, outputs, bias), times in sorted(linears.items())
        ),
        other_parameters_per_layer=_share(sum(each.parameters for each in measured) - matrices - in_experts, count_of),
        gated_mlp=gated or any(each.expert_gated for each in measured),
        parallel_attention=norms < 1.5,
        norm="layer" if any(each.layer_norm for each in measured) else "rms",
        norms_per_layer=norms,
        qk_norm=any(each.qk_norm for each in measured),
        attention_softcap=getattr(config, "attn_logit_softcapping", None),
        logit_softcap=float(cap) if isinstance(cap, int | float) and cap > 0 else None,
        expert_parameters_per_layer=_share(in_experts, count_of),
        expert_stacks=tuple(
            LinearLayer(name, inputs, outputs, per_layer=_share(times, count_of))
            for (name, inputs, outputs), times in sorted(stacks.items())
        ),
        widest_experts=max(each.experts for each in measured),
        inner_per_token=_mean(inner),
        widest_inner=max(inner),
        expert_inner=_mean([each.expert_inner for each in measured]),
        expert_kept=max(each.expert_kept for each in measured) or ModelSizes.expert_kept,
        mixer_values=_mean(mixers),
        mixer_without_kernels=round(_mean(plain), 1) if plain != mixers else None,
        mixer_packages=tuple(sorted(frozenset().union(*(each.packages for each in measured)))),
        recurrent_share=_mean([each.recurrent for each in measured]),
        counted="built",
        **found,
    )


def _share(total: int, count_of: int) -> float:
    return total // count_of if total % count_of == 0 else total / count_of


def _mean(values: list[Any]) -> float:
    return _share(sum(values), len(values))


def answer_to(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the sizes of a `config.json` as plain values, or `{"refused": reason}`."""
    try:
        return dataclasses.asdict(count(build(config), config["model_type"]))
    except Exception as error:  # whatever a stranger's configuration makes transformers raise
        said = re.split(r"[\n;]|\. ", str(error).strip(), maxsplit=1)[0]
        return {"refused": f"{type(error).__name__}: {said}"[:300]}


def main() -> None:
    """Reads a `config.json`, prints the sizes, or `{"refused": reason}`."""
    if len(sys.argv) > 1:
        limit = int(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    answer = answer_to(json.load(sys.stdin))
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
