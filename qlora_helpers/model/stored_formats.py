"""Recognises how a checkpoint's files store their weights, before anything is loaded, and turns packed numbers into plain ones.

transformers reads a checkpoint's own `quantization_config` or takes ours, not both; where ours wins, packed numbers would be loaded
as if they were the weights. bitsandbytes NF4 is used as it is. FP8, MXFP4, int8 with a scale, and other bitsandbytes forms are
dequantised once into the cache, a tensor at a time. Everything else is refused, with its name.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.base.files import cache_root, make_once, read_json, replaced_folder, write_json
from qlora_helpers.base.text import Say
from qlora_helpers.base.units import BYTES_IN_GIB, gib
from qlora_helpers.model.stored_tensors import weight_files

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2 * BYTES_IN_GIB
PACKED_TYPES = ("F8_E4M3", "F8_E5M2", "I8")
PACKED_NAMES = ("qweight", "qzeros", "weight_packed", "weight_zero_point")  # of GPTQ, AWQ, compressed-tensors
SCALES = ("_scale_inv", "_scale")  # of a tensor in FP8 or int8, after its name: FP8 in blocks, compressed-tensors
ACTIVATIONS = (
    "input_scale",
    "activation_scale",
    "output_scale",
    "input_global_scale",
)  # nothing is quantised at run time here
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
GET_PLAIN = "Choose the unquantised checkpoint that it was made from: it is quantised to NF4 while it is loaded."


def quantization_of(folder: Path) -> dict[str, Any]:
    """Returns the `quantization_config` of a checkpoint's `config.json`; empty where its weights are plain numbers."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # reported where the model is loaded
    text = config.get("text_config") if isinstance(config, dict) else None
    for each in (config, text):
        found = each.get("quantization_config") if isinstance(each, dict) else None
        if isinstance(found, dict):
            return found
    return {}


def is_stored_in_nf4(folder: Path) -> bool:
    """Whether a checkpoint's linear layers are in bitsandbytes' NF4 already."""
    found = quantization_of(folder)
    is_4_bit = found.get("quant_method") == "bitsandbytes" and bool(found.get("load_in_4bit"))
    return is_4_bit and found.get("bnb_4bit_quant_type", "fp4") == "nf4"


def left_out_of_nf4(folder: Path) -> tuple[str, ...]:
    """Names or paths of the modules that a checkpoint in NF4 keeps in 16 bits, as Unsloth's dynamic ones do for some layers.

    Empty for every other checkpoint: what is quantised while it is loaded has no such layers.
    """
    names = quantization_of(folder).get("llm_int8_skip_modules") if is_stored_in_nf4(folder) else ()
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


def usable_folder(folder: Path, name: str, *, packed: bool, say: Say = print) -> Path:
    """Returns a folder whose weights can be loaded: the checkpoint's own, or that of a dequantised copy in the cache.

    Args:
        folder: of the checkpoint.
        name: what the checkpoint is called in messages.
        packed: whether weights that are in NF4 already are used as they are; else they are dequantised.
        say: receives a line before anything that takes long.

    Raises:
        ModelError: the weights are stored in a form that can't be read.
    """
    settings, kinds = quantization_of(folder), _types(folder)
    method = str(settings.get("quant_method", ""))
    if not settings:
        odd = sorted(each for each, kind in kinds.items() if kind in PACKED_TYPES or each.endswith(PACKED_NAMES))
        if odd:
            raise ModelError(
                f"{name} holds packed weights, and its config.json does not say how",
                got=f"{odd[0]} in {kinds[odd[0]]}",
                next_step=GET_PLAIN,
            )
        return folder
    if packed and is_stored_in_nf4(folder):
        return folder
    _refuse_unknown(name, method, settings, kinds)
    stamp = hashlib.sha256(json.dumps([str(folder.resolve()), settings], sort_keys=True).encode())
    for path in weight_files(folder):
        stamp.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    target = cache_root() / "dequantised" / f"{folder.name[:60]}-{stamp.hexdigest()[:32]}"
    make_once(target, "config.json", lambda: _write_plain(folder, target, name, settings, say))
    return target


def _types(folder: Path) -> dict[str, str]:
    """Returns the type of each tensor of a folder, as the files' headers name it."""
    found: dict[str, str] = {}
    for path in weight_files(folder):
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, path.stat().st_size)))
            found |= {name: str(entry["dtype"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a damaged file is reported where the weights are loaded
    return found


def _refuse_unknown(name: str, method: str, settings: dict[str, Any], kinds: dict[str, str]) -> None:
    known = {"bitsandbytes", "fp8", "mxfp4", "compressed-tensors"}
    odd = sorted(each for each in kinds if each.endswith(PACKED_NAMES))
    if method in known and not odd:
        return
    form = {
        "": "a form that its config.json does not name",
        "gptq": "GPTQ",
        "awq": "AWQ",
        "compressed-tensors": f"compressed-tensors ({settings.get('format')})",
    }
    raise ModelError(
        f"the weights of {name} are stored in {form.get(method, method)}, which can't be tuned here",
        expected="plain weights, or bitsandbytes, FP8 or MXFP4 ones",
        next_step=GET_PLAIN,
    )


def _write_plain(folder: Path, target: Path, name: str, settings: dict[str, Any], say: Say) -> None:
    config, method = read_json(folder / "config.json"), str(settings["quant_method"])
    with replaced_folder(target) as temporary, ExitStack() as stack:
        tensors = _Tensors(folder, stack)
        needed = 2 * tensors.values(method)
        free = shutil.disk_usage(temporary).free
        if needed > free:
            raise ModelError(
                f"there is not enough disk space to dequantise {name}",
                expected=f"{gib(needed):.1f} GiB",
                got=f"{gib(free):.1f} GiB free",
                next_step="Free some (notebook 08), or set QLORA_CACHE to a folder on another disk.",
            )
        say(f"Dequantising the {method} weights of {name} once into the cache ({gib(needed):.2f} GiB) ...")
        try:
            _write_shards(temporary, _plain_tensors(tensors, method, block_of(settings)))
        except (KeyError, RuntimeError, ValueError) as error:
            raise ModelError(f"the packed weights of {name} can't be read ({error})", next_step=GET_PLAIN) from error
        for each in (config, config.get("text_config")):
            if isinstance(each, dict):
                each.pop("quantization_config", None)
        for path in folder.iterdir():
            kept = path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt")
            if kept and path.name != "config.json" and not path.name.endswith(".index.json"):
                shutil.copyfile(path, temporary / path.name)
        write_json(temporary / "config.json", config)


class _Tensors:
    """The tensors of a folder's files by name; each is read when it is asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Any] = {}
        try:
            for path in weight_files(folder):
                file = stack.enter_context(safe_open(path, framework="pt"))
                self._files |= dict.fromkeys(file.keys(), file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"a file of {folder.name} is damaged ({error})", next_step="Get it again.") from error

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def kind(self, name: str) -> str:
        return str(self._files[name].get_slice(name).get_dtype())

    def values(self, method: str) -> int:
        """Returns about how many weights there are once they are unpacked."""
        two_a_byte = {"U8"} if method in ("mxfp4", "bitsandbytes") else set()
        sizes = {name: math.prod(self._files[name].get_slice(name).get_shape()) for name in self._files}
        return sum(size * (2 if self.kind(name) in two_a_byte else 1) for name, size in sizes.items())


def block_of(settings: dict[str, Any]) -> tuple[int, ...]:
    """Returns how many rows and columns of a weight share a scale, by a checkpoint's settings; empty where they don't say it."""
    groups = settings.get("config_groups")
    weights = [each.get("weights") for each in groups.values()] if isinstance(groups, dict) else []
    found = [settings.get("weight_block_size"), *(each.get("block_structure") for each in weights if each)]
    sizes = next((each for each in found if each), ())
    sizes = sizes.split("x") if isinstance(sizes, str) else sizes  # compressed-tensors wrote 128x128 once
    return tuple(map(int, sizes))


def _plain_tensors(tensors: _Tensors, method: str, block: tuple[int, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every weight as plain numbers; what belongs to a packed one is taken in with it."""
    names = tensors.names()
    parts: set[str] = {name for name in names if name.rpartition(".")[2] in ACTIVATIONS}
    done: dict[str, Callable[[], torch.Tensor]] = {}
    for name in names:
        found = _unpacking(tensors, method, name, block)
        if found is not None:
            target, used, made = found
            parts |= used
            done[target] = made
    for name in [*(each for each in names if each not in parts and each not in done), *done]:
        value = done[name]() if name in done else tensors.read(name)
        yield name, value.contiguous()


def _unpacking(
    tensors: _Tensors, method: str, name: str, block: tuple[int, ...]
) -> tuple[str, set[str], Callable[[], torch.Tensor]] | None:
    """Returns for a packed tensor the name of the weight, the tensors that make it up, and what makes it; else None."""
    if method == "mxfp4" and name.endswith("_blocks"):
        target = name.removesuffix("_blocks")
        scales = f"{target}_scales"
        return target, {name, scales}, lambda: from_mxfp4(tensors.read(name), tensors.read(scales))
    if method == "bitsandbytes" and f"{name}.absmax" in tensors:
        state = {each for each in tensors.names() if each.startswith(f"{name}.")}
        return name, state, lambda: _from_4_bits(tensors, name, state)
    if tensors.kind(name) not in PACKED_TYPES:
        return None
    if method == "bitsandbytes":
        scale = f"{name.rpartition('.')[0]}.SCB"
        used = {scale, f"{name.rpartition('.')[0]}.weight_format"}
        return name, used, lambda: scaled(tensors.read(name), tensors.read(scale)[:, None] / 127)
    scale = next((name + end for end in SCALES if name + end in tensors), "")
    if not scale:
        raise ModelError(f"{name} is packed and has no scale", next_step=GET_PLAIN)
    return name, {scale}, lambda: scaled(tensors.read(name), tensors.read(scale), block)


def scaled(values: torch.Tensor, scale: torch.Tensor, block: tuple[int, ...] = ()) -> torch.Tensor:
    """Multiplies packed values by their scales: one for all, for each row, or for each block of rows and columns.

    Args:
        values: `(..., out, in)`, FP8 or int8.
        scale: one value, or as many dimensions as `values`, each the number of blocks along it.
        block: the size of a block along the last dimensions; the last block of each may be short.

    Raises:
        ValueError: the scale does not belong to the weight, or blocks don't divide it and their size is not known.
    """
    import torch

    scale = scale.float()
    if scale.numel() > 1:
        if scale.dim() != values.dim():
            raise ValueError(f"a scale of {tuple(scale.shape)} for a weight of {tuple(values.shape)}")
        known = {values.dim() - len(block) + place: length for place, length in enumerate(block)}
        for dim, (size, blocks) in enumerate(zip(values.shape, scale.shape, strict=True)):
            if blocks in (1, size):
                continue
            length = known.get(dim, size // blocks)
            if math.ceil(size / length) != blocks:
                raise ValueError(f"{blocks} scales for {size} values in blocks of {length}")
            scale = scale.repeat_interleave(length, dim).narrow(dim, 0, size)
    return (values.float() * scale).to(torch.bfloat16)


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Unpacks MXFP4 (OCP Microscaling formats, 1.0): 32 values of four bits share a power of two.

    Args:
        blocks: `(experts, out, groups, 16)`, two values a byte, the first in the low half.
        scales: `(experts, out, groups)`, exponents plus 127.

    Returns:
        `(experts, in, out)` in bfloat16, as gpt-oss keeps its experts; the conversion is exact.
    """
    import torch

    table = torch.tensor(FP4_VALUES, dtype=torch.bfloat16)
    found = torch.empty(blocks.shape[0], blocks.shape[2] * 32, blocks.shape[1], dtype=torch.bfloat16)
    for index, (block, scale) in enumerate(zip(blocks, scales, strict=True)):  # one expert at a time
        halves = torch.stack([table[(block & 15).long()], table[(block >> 4).long()]], dim=-1)
        values = torch.ldexp(halves.flatten(-2).float(), scale.int()[..., None] - 127)
        found[index] = values.flatten(-2).T
    return found


def _from_4_bits(tensors: _Tensors, name: str, parts: set[str]) -> torch.Tensor:
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    from qlora_helpers.model.nf4 import unpack_rightly_on_cpu

    unpack_rightly_on_cpu()

    held = {each.removeprefix(f"{name}."): tensors.read(each) for each in parts}
    state = QuantState.from_dict(held, device=torch.device("cpu"))
    return dequantize_4bit(tensors.read(name), state).to(torch.bfloat16)


def _write_shards(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Writes tensors into files of about `SHARD_BYTES` with their index, and holds one file's in memory at a time."""
    from safetensors.torch import save_file

    held: dict[str, torch.Tensor] = {}
    placed: dict[str, str] = {}
    size = total = 0

    def write() -> None:
        file = f"model-{len(set(placed.values())) + 1:05d}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        placed.update(dict.fromkeys(held, file))
        held.clear()

    for name, value in tensors:
        held[name] = value
        size += value.numel() * value.element_size()
        if size >= SHARD_BYTES:
            write()
            total, size = total + size, 0
    if held:
        write()
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total + size}, "weight_map": placed}
    )
