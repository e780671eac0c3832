"""Writes what vLLM reads, alone or in AWS's LMI container: an adapter's archive, and `serving.properties` of a merged model.

The container reads `serving.properties` and `adapters/<name>/` from the model archive (https://docs.djl.ai, "vLLM Engine User
Guide" and "Adapters"). What vLLM would refuse is refused here, before it costs money. Knows nothing of runs and endpoints.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.base.tarball import write_tarball
from qlora_helpers.export.certificate import SETTINGS, WEIGHTS
from qlora_helpers.model.hub import is_hub_id
from qlora_helpers.model.tokenizers import TOKENIZER_FILES

VLLM_OPTIONS = {
    "async_mode": "true",
    "rolling_batch": "disable",
    "entryPoint": "djl_python.lmi_vllm.vllm_async_service",
    "tensor_parallel_degree": "max",
}


_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values of `max_lora_rank` that vLLM takes

PLAIN_NAME = re.compile(
    r"[A-Za-z0-9](-*[A-Za-z0-9]){0,62}"
)  # SageMaker's rule for an endpoint; here also for an adapter

# Families that vLLM serves but can't add adapters to (they lack its SupportsLoRA), by the names of their weights
_WITHOUT_LORA = {
    r"\.transformer\.h\.\d+\.self_attention\.": "Falcon and BLOOM",
    r"\.gpt_neox\.layers\.\d+\.": "GPT-NeoX",
}


def package_adapter(adapter_dir: Path, base_model: str, out_path: Path, *, name: str = "tuned") -> Path:
    """Writes the model archive of an endpoint: `serving.properties` and `adapters/<name>/`, whole or not at all.

    Of the adapter's folder it takes configuration, weights (safetensors) and tokenizer. The same adapter gives the same bytes.

    Args:
        adapter_dir: the saved adapter, such as `runs/demo/adapter`.
        base_model: hub id of the model that it was trained on, or an `s3://` folder.
        out_path: the archive, such as `runs/demo/model.tar.gz`.
        name: what requests call the adapter.

    Returns:
        `out_path`.

    Raises:
        ModelError: files are missing or links, or vLLM can't serve this adapter.
        UserError: an endpoint can't reach the base model, or the adapter can't have that name.
    """
    if not PLAIN_NAME.fullmatch(name):
        raise UserError("an adapter can't have that name", expected="letters, digits and '-'", got=repr(name))
    if not is_hub_id(base_model) and not re.fullmatch(r"s3://\S+/\S+", base_model):
        raise UserError(
            "an endpoint can't reach that base model",
            expected="a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct, or an s3:// folder",
            got=repr(base_model),
            next_step="Upload the model's folder to S3 and name that.",
        )
    files = _adapter_files(adapter_dir)
    rank = _check_served_by_vllm(adapter_dir)
    contents: dict[str, bytes | Path] = {"serving.properties": _serving_properties(base_model, rank).encode()}
    contents |= {f"adapters/{name}/{file.name}": file for file in files}
    return write_tarball(out_path, contents)


def allowed_rank(rank: int) -> int:
    """Returns the smallest `max_lora_rank` that vLLM takes for adapters of this rank (512 at most)."""
    return min(allowed for allowed in _VLLM_RANKS if allowed >= rank)


def merged_properties(*, max_model_len: int) -> str:
    """Returns `serving.properties` for a merged model: the container serves the folder that the file is in.

    Args:
        max_model_len: longest prompt with its answer, tokens.
    """
    return _properties({**VLLM_OPTIONS, "dtype": "bf16", "max_model_len": str(max_model_len)})


def _adapter_files(adapter_dir: Path) -> list[Path]:
    missing = [name for name in (SETTINGS, WEIGHTS) if not (adapter_dir / name).exists()]
    if missing:
        raise ModelError(
            f"{', '.join(missing)} not found in {adapter_dir.name}/",
            next_step="Train first (notebook 04_train), or name the folder of a saved adapter.",
        )
    files = [
        adapter_dir / name for name in (SETTINGS, WEIGHTS, *TOKENIZER_FILES) if os.path.lexists(adapter_dir / name)
    ]
    links = [file.name for file in (adapter_dir, *files) if file.is_symlink()]
    if links:
        raise ModelError(f"{', '.join(links)} is a link", expected="plain files", next_step="Copy the adapter first.")
    return files


def _check_served_by_vllm(adapter_dir: Path) -> int:
    """Returns the adapter's largest rank; refuses what vLLM's `PEFTHelper` and models would refuse."""
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((adapter_dir / SETTINGS).read_text(encoding="utf-8"))
        with safe_open(adapter_dir / WEIGHTS, framework="numpy") as weights:
            names = list(weights.keys())
        rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"{adapter_dir.name}/ has no readable adapter ({error})", next_step="Save it again."
        ) from error
    step = "Merge it into a bfloat16 copy of the model, upload that folder to S3, and deploy the folder."
    for pattern, families in _WITHOUT_LORA.items():
        if any(re.search(pattern, name) for name in names):
            raise ModelError(f"vLLM can't add adapters to models of the families {families}", next_step=step)
    refused = {
        "peft_type": config.get("peft_type") != "LORA",
        "use_dora": config.get("use_dora"),
        "modules_to_save": config.get("modules_to_save"),
        "target_parameters": config.get("target_parameters"),
        "bias": config.get("bias", "none") != "none",
        "r": rank > _VLLM_RANKS[-1],
    }
    got = [f"{name}={config.get(name)!r}" for name, is_refused in refused.items() if is_refused]
    if got:
        raise ModelError(
            "vLLM can't serve this kind of adapter", expected="plain LoRA", got=", ".join(got), next_step=step
        )
    return rank


def _serving_properties(base_model: str, rank: int) -> str:
    lora = {
        "enable_lora": "true",
        "max_loras": "1",
        "max_lora_rank": str(allowed_rank(rank)),
    }
    return _properties({"model_id": base_model, **VLLM_OPTIONS, **lora})


def _properties(options: Mapping[str, str]) -> str:
    return "engine=Python\n" + "".join(f"option.{key}={value}\n" for key, value in options.items())
