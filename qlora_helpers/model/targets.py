"""Decides which layers of a loaded model get an adapter, by their full paths.

A layer gets one because of what it is: a linear layer of the text part's decoder layers that is no router, and that a forward and
a backward pass over a few tokens reach. Last parts of names alone would match a vision tower's layers too. The experts of a mixture
get adapters only where they are named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from qlora_helpers.base.config import AdapterConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.audit import routers
from qlora_helpers.model.expert_stacks import stack_names
from qlora_helpers.model.shapes.expert_targets import EXPERTS, ends, named_stacks
from qlora_helpers.model.shapes.families import adapter_targets
from qlora_helpers.model.wiring import decoder_layers

_EXPERT = re.compile("expert", re.I)  # some state-space layers have stacks too
FEWEST = 16  # rows and columns; a layer with fewer is a gate or a coefficient
PROBE_TOKENS = 16


def linear_layers(model: torch.nn.Module) -> dict[str, Any]:
    """Returns the linear layers of a model's decoder layers by path, 4-bit or not; routers and gates are none of them."""
    from transformers.pytorch_utils import Conv1D

    head, routing = model.get_output_embeddings(), routers(model)
    inside = {id(part) for layer in decoder_layers(model) for part in layer.modules()}
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and id(module) in inside
        and module is not head
        and id(module) not in routing
        and min(sizes(module)) > FEWEST
    }


def sizes(module: Any) -> tuple[int, int]:
    """Returns the numbers of inputs and outputs of a linear layer; those of GPT-2's `Conv1D` are in its weight alone."""
    return (module.in_features, module.out_features) if hasattr(module, "in_features") else tuple(module.weight.shape)


def stacks(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the stacks of experts of a model's decoder layers: paths of parameters, with the shapes of their values."""
    inside = {id(part) for layer in decoder_layers(model) for part in layer.modules()}
    found = {}
    for path, module in model.named_modules():
        of_experts = id(module) in inside and _EXPERT.search(f"{path} {type(module).__name__}")
        for name in stack_names(module) if of_experts else ():
            parameter: Any = module._parameters[name]
            state = getattr(parameter, "quant_state", None)
            found[f"{path}.{name}"] = tuple(parameter.shape if state is None else state.shape)
    return found


def stack_paths(model: torch.nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """Returns the paths of the stacks of experts that get an adapter, by default none (`shapes.expert_targets`)."""
    return named_stacks(config.target_modules, list(linear_layers(model)), list(stacks(model)))


def without_experts(model: torch.nn.Module, config: AdapterConfig) -> list[str]:
    """Returns the names that the user gave that linear layers and stacks of experts share, and that mean the former alone."""
    linears, last = list(linear_layers(model)), last_names(stacks(model))
    return [name for name in config.target_modules or () if name in last and any(ends(path, name) for path in linears)]


def shortened_stacks(model: torch.nn.Module, paths: Sequence[str]) -> list[str]:
    """Returns names that peft matches to exactly these stacks: the last two parts where they are the same, else whole paths."""
    available, found = list(stacks(model)), set()
    for path in paths:
        short = ".".join(path.split(".")[-2:])
        found.add(short if all(each in paths for each in available if ends(each, short)) else path)
    return sorted(found)


def _is_named(path: str, name: str) -> bool:
    """Whether a name means a linear layer; `experts` means those of experts that are a list of modules."""
    return ends(path, name) or (name == EXPERTS and re.search(r"(^|\.)experts\.\d+\.", path) is not None)


def target_paths(model: torch.nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """Returns the paths of the linear layers that get an adapter: those that the user named, else all of the text part.

    Raises:
        ModelError: a name that the user gave is neither a linear layer of the model nor a stack of experts, or the model has none.
    """
    available = linear_layers(model)
    if config.target_modules is None:
        found = tuple(path for path in available if not _refused_by_peft(model, path))
        if not found:
            raise ModelError("the model has no linear layers in its decoder layers", next_step="Choose another model.")
        return found
    named = {name: [path for path in available if _is_named(path, name)] for name in config.target_modules}
    unknown = [
        name
        for name, paths in named.items()
        if not paths and not stack_paths(model, replace(config, target_modules=(name,)))
    ]
    if unknown:
        raise _unknown_names(model, unknown, available)
    wanted = {path for paths in named.values() for path in paths}
    return tuple(path for path in available if path in wanted)


def _unknown_names(model: torch.nn.Module, unknown: list[str], available: dict[str, Any]) -> ModelError:
    mixture = [EXPERTS] if stacks(model) else []
    return ModelError(
        "adapter.target_modules names layers that the model does not have",
        expected="some of " + ", ".join(last_names(available) + mixture),
        got=", ".join(unknown),
        next_step="Set adapter.target_modules=none to take the architecture's default.",
    )


def last_names(paths: Any) -> list[str]:
    """Returns the last parts of paths, sorted, each once."""
    return sorted({path.rpartition(".")[2] for path in paths})


def shortened(model: torch.nn.Module, paths: Sequence[str], named: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Returns names that peft matches to exactly these paths: last parts where they are the same layers, else whole paths.

    Args:
        model: a causal language model.
        paths: of the layers.
        named: what the user named, whose order is kept; the default is the order of the family's known layers, then by name.
    """
    chosen, ends = set(paths), {path: path.rpartition(".")[2] for path, _ in model.named_modules()}
    found: list[str] = []
    for name in last_names(paths):
        same = {path for path, end in ends.items() if end == name}
        found += [name] if same <= chosen and not name.isdigit() else sorted(same & chosen)
    known = named or adapter_targets(model.config.to_dict()) or ()
    return tuple(sorted(found, key=lambda name: (known.index(name) if name in known else len(known), name)))


def _refused_by_peft(model: torch.nn.Module, path: str) -> bool:
    """Whether peft refuses an adapter on a layer, as it does for some layers of state-space models."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    check = getattr(LoraModel, "_check_target_module_compatiblity", None)
    if check is None:
        return False
    try:
        check(LoraModel.__new__(LoraModel), LoraConfig(), model, path.rpartition(".")[2])
    except ValueError:
        return True
    return False


def without_gradient(model: Any, paths: Sequence[str]) -> list[str]:
    """Returns the layers whose output has no gradient after one forward and backward pass over a few tokens.

    The model may never call such a layer, or may read its weight directly; an adapter there would never move. A layer of a list,
    of which a forward pass uses some, counts as reached where another of the list is. The same pass proves that the model continues
    text: what it says of a token has no gradient from later ones.

    Args:
        model: a causal language model whose weights are frozen; not on the meta device.
        paths: of the layers to be examined.

    Raises:
        ModelError: the model can't be trained at all, or its tokens see those after them, as those of encoders do.
    """
    reached: set[str] = set()
    embedded: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.requires_grad_())
        return output.clone()  # a model may add its positions in place, which a leaf does not allow

    handles = [model.get_input_embeddings().register_forward_hook(keep)]
    for path in paths:
        handles.append(model.get_submodule(path).register_forward_hook(_watch(path, reached)))
    training, device = model.training, model.get_input_embeddings().weight.device
    ids = torch.arange(2, 2 + PROBE_TOKENS, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    try:
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else None), torch.enable_grad():
            model.train()
            found = model(input_ids=ids, labels=ids, use_cache=False)
            sees_later = _sees_later_tokens(found.logits, embedded)
            found.loss.backward()
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the model can't be trained: a forward and backward pass over {PROBE_TOKENS} tokens fails ({reason})",
            next_step="Choose another model.",
        ) from error
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if sees_later:
        raise ModelError(
            "the model can't be tuned to continue text: its tokens see those after them, so it would only copy what it learns",
            expected="a causal language model, in which a token depends on itself and those before it",
            got=f"{type(model).__name__}, which reads in both directions",
            next_step="Choose another model; encoders such as BERT are trained in other ways.",
        )
    lists = {_list_of(path) for path in reached}
    return [path for path in paths if path not in reached and _list_of(path) not in lists]


def refuse_what_adapters_break(model: Any) -> None:
    """Refuses an adapted model whose adapters would never move, or that can't be asked once it has them.

    Layers that are one operation to autograd, such as Reformer's reversible ones, have a gradient only where their input has one.
    RWKV rewrites its layers' weights when it is asked, which layers with an adapter do not allow.

    Raises:
        ModelError: it is one of them.
    """
    ids = torch.arange(2, 2 + PROBE_TOKENS, device=model.get_input_embeddings().weight.device)[None]
    ids = ids % model.get_input_embeddings().weight.shape[0]
    training = model.training
    try:
        with torch.random.fork_rng(devices=[] if ids.device.type == "cpu" else None):
            with torch.enable_grad():
                has_gradient = model.train()(input_ids=ids, labels=ids, use_cache=False).loss.requires_grad
            with torch.no_grad():
                model.eval()(input_ids=ids, use_cache=False)
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"adapters can't be trained in this model: with them it can't be asked ({reason})",
            got=type(model.get_base_model()).__name__,
            next_step="Choose another model.",
        ) from error
    finally:
        model.train(training)
    if not has_gradient:
        raise ModelError(
            "adapters can't be trained in this model: its layers hide their weights from PyTorch's gradients",
            got=type(model.get_base_model()).__name__,
            next_step="Choose another model.",
        )


def _sees_later_tokens(logits: torch.Tensor, embedded: Sequence[torch.Tensor]) -> bool:
    """Whether the first half of a row's logits, `(1, tokens, vocabulary)`, has a gradient from its second half.

    A causal mask's gradient is zero and not only small, so this needs no tolerance. The graph is kept.
    """
    half = PROBE_TOKENS // 2
    inputs = [tensor for tensor in embedded if tensor.dim() == 3 and max(tensor.shape[:2]) >= PROBE_TOKENS]
    if not inputs:
        return False
    weights = torch.linspace(
        -1, 1, logits.shape[-1], device=logits.device
    )  # of logits alone a sum may have no gradient
    early = (logits[:, :half].float() * weights).sum()
    for gradient in torch.autograd.grad(early, inputs, retain_graph=True, allow_unused=True):
        if gradient is not None:
            place = (
                int(gradient.shape[0] > gradient.shape[1]) ^ 1
            )  # XLNet has its tokens first, CPM-Ant a prompt before them
            if bool(gradient.narrow(place, gradient.shape[place] - half, half).any()):
                return True
    return False


def _watch(path: str, reached: set[str]) -> Any:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if tensor.requires_grad and (
            not inputs or bool(inputs[0].any())
        ):  # from zeros alone an adapter learns nothing either
            tensor.register_hook(lambda gradient: reached.add(path) if bool(gradient.any()) else None)

    return hook


def _list_of(path: str) -> str:
    """Returns a path with all numbers but the decoder layer's, the first, replaced: the same for each expert of a list."""
    first, number, rest = re.split(r"(\.\d+\.)", path, maxsplit=1) if re.search(r"\.\d+\.", path) else (path, "", "")
    return first + number + re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", rest)
