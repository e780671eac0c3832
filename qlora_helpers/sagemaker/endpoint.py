"""A tuned adapter as a SageMaker real-time endpoint: AWS's LMI container serves base model and adapter in vLLM.

The container reads `serving.properties` and `adapters/<name>/` from the model archive and takes the base model from the
hub (https://docs.djl.ai, "vLLM Engine User Guide" and "Adapters"). The tests check that these calls are what the
SageMaker API takes; no endpoint was started. Knows nothing of runs or training.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.sagemaker.aws import (
    checked_role,
    is_hub_id,
    new_client,
    registry,
    split_s3_uri,
    told_plainly,
    write_tarball,
)
from qlora_helpers.sagemaker.aws import delete_endpoint as delete_endpoint
from qlora_helpers.sagemaker.aws import upload as upload

LMI_IMAGE = "djl-inference:0.38.0-lmi29.0.0-cu130"
"""The newest LMI container that the SageMaker Python SDK 3.27.0 names."""

INFERENCE_AMI = "al2023-ami-sagemaker-inference-gpu-4-1"
"""The host image with NVIDIA driver 580: a CUDA 13 container does not start on the default one of ml.g5 and ml.g4dn."""

STARTUP_TIMEOUT_S = 1800
"""How long the container may take to download and load the base model before SageMaker gives it up (default: 480 s)."""

_NEEDED = ("adapter_config.json", "adapter_model.safetensors")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_VLLM_OPTIONS = {
    "async_mode": "true",
    "rolling_batch": "disable",
    "entryPoint": "djl_python.lmi_vllm.vllm_async_service",
    "tensor_parallel_degree": "max",
}
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_NAME = re.compile(r"[A-Za-z0-9](-*[A-Za-z0-9]){0,62}")
_WITHOUT_LORA = {
    r"\.transformer\.h\.\d+\.self_attention\.": "Falcon and BLOOM",
    r"\.gpt_neox\.layers\.\d+\.": "GPT-NeoX",
}
"""Families that vLLM serves but can't add adapters to (they lack its SupportsLoRA), by the names of their weights."""


def lmi_image_uri(region: str) -> str:
    """The LMI container (vLLM backend, CUDA 13) in AWS's public registry of that region.

    Raises:
        UserError: no such region.
    """
    return f"{registry(region)}/{LMI_IMAGE}"


def package_adapter(adapter_dir: Path, base_model: str, out_path: Path, *, name: str = "tuned") -> Path:
    """Writes the model archive of an endpoint: `serving.properties` and `adapters/<name>/`, whole or not at all.

    The same adapter gives the same bytes. Of the adapter's folder only its configuration, weights (safetensors) and
    tokenizer go in.

    Args:
        adapter_dir: the saved adapter, such as `runs/demo/adapter`.
        base_model: hub id of the model that it was trained on, or an `s3://` folder.
        out_path: the archive, such as `runs/demo/model.tar.gz`.
        name: what requests call the adapter.

    Returns:
        `out_path`.

    Raises:
        ModelError: files are missing or links, or vLLM can't serve this adapter.
        UserError: an endpoint can't reach the base model, or the name is none.
    """
    if not _NAME.fullmatch(name):
        raise UserError("that is no name for an adapter", expected="letters, digits and '-'", got=repr(name))
    if not is_hub_id(base_model) and not re.fullmatch(r"s3://\S+/\S+", base_model):
        raise UserError(
            "an endpoint can't reach that base model",
            expected="a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct, or an s3:// folder",
            got=repr(base_model),
            next_step="Upload the model's folder to S3 and name that.",
        )
    files = _adapter_files(adapter_dir)
    rank = _check_served_by_vllm(adapter_dir)
    contents = {"serving.properties": _serving_properties(base_model, rank).encode()}
    contents |= {f"adapters/{name}/{file.name}": file for file in files}
    return write_tarball(out_path, contents)


def endpoint_requests(
    model_s3_uri: str,
    endpoint_name: str,
    *,
    role: str,
    instance_type: str,
    image_uri: str,
    environment: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """What `deploy` sends: the arguments of boto3's three calls, in their order. Needs no network.

    Args:
        model_s3_uri, endpoint_name, role, instance_type, image_uri, environment: as for `deploy`.

    Returns:
        `create_model`, `create_endpoint_config` and `create_endpoint`, each with its arguments.

    Raises:
        UserError: an argument is wrong.
    """
    if not _NAME.fullmatch(endpoint_name):
        expected = "letters, digits and '-', 63 at most"
        raise UserError("that is no name for an endpoint", expected=expected, got=repr(endpoint_name))
    split_s3_uri(model_s3_uri)
    container: dict[str, Any] = {"Image": image_uri}
    settings = {"SERVING_FAIL_FAST": "true"}
    if model_s3_uri.endswith("/"):
        source = {"S3Uri": model_s3_uri, "S3DataType": "S3Prefix", "CompressionType": "None"}
        container["ModelDataSource"] = {"S3DataSource": source}
        settings |= {f"OPTION_{key.upper()}": value for key, value in _VLLM_OPTIONS.items()}
    else:
        container["ModelDataUrl"] = model_s3_uri
    container["Environment"] = settings | dict(environment or {})
    variant = {
        "VariantName": "AllTraffic",
        "ModelName": endpoint_name,
        "InstanceType": instance_type,
        "InitialInstanceCount": 1,
        "InferenceAmiVersion": INFERENCE_AMI,
        "ContainerStartupHealthCheckTimeoutInSeconds": STARTUP_TIMEOUT_S,
    }
    return {
        "create_model": {
            "ModelName": endpoint_name, "PrimaryContainer": container, "ExecutionRoleArn": checked_role(role)
        },
        "create_endpoint_config": {"EndpointConfigName": endpoint_name, "ProductionVariants": [variant]},
        "create_endpoint": {"EndpointName": endpoint_name, "EndpointConfigName": endpoint_name},
    }  # fmt: skip


def deploy(
    model_s3_uri: str,
    endpoint_name: str,
    *,
    role: str,
    instance_type: str,
    image_uri: str | None = None,
    environment: Mapping[str, str] | None = None,
    wait: bool = False,
    client: Any = None,
) -> str:
    """Creates model, endpoint configuration and endpoint, all named alike. It costs money until `delete_endpoint`.

    Args:
        model_s3_uri: the archive of `package_adapter` in S3 (see `upload`), or the folder of a merged model, with a `/`
            at the end.
        endpoint_name: letters, digits and `-`, 63 at most.
        role: ARN of the execution role.
        instance_type: such as `ml.g5.2xlarge`; the base model in 16 bit must fit its GPUs.
        image_uri: another container; none takes `lmi_image_uri` of the client's region.
        environment: more for the container, such as `HF_TOKEN` for a gated model (whoever may describe the model can
            read it) or `OPTION_MAX_MODEL_LEN` where the model's own context does not fit the GPU.
        wait: return once the endpoint answers, 5 to 15 minutes later.
        client: a SageMaker client; none makes one.

    Returns:
        The endpoint's name.

    Raises:
        UserError: an argument is wrong, AWS refuses (nothing is left behind), or the endpoint did not start.
    """
    client = client or new_client("sagemaker")
    requests = endpoint_requests(
        model_s3_uri, endpoint_name, role=role, instance_type=instance_type, environment=environment,
        image_uri=image_uri or lmi_image_uri(client.meta.region_name),
    )  # fmt: skip
    with told_plainly(f"create the endpoint {endpoint_name}"), contextlib.ExitStack() as undo:
        client.create_model(**requests["create_model"])
        undo.callback(client.delete_model, ModelName=endpoint_name)
        client.create_endpoint_config(**requests["create_endpoint_config"])
        undo.callback(client.delete_endpoint_config, EndpointConfigName=endpoint_name)
        client.create_endpoint(**requests["create_endpoint"])
        undo.pop_all()
    if wait:
        wait_for_endpoint(endpoint_name, client=client)
    return endpoint_name


def wait_for_endpoint(endpoint_name: str, *, client: Any = None) -> None:
    """Returns once the endpoint answers; asks every 30 s.

    Raises:
        UserError: it did not start; the message gives SageMaker's reason.
    """
    from botocore.exceptions import WaiterError

    client = client or new_client("sagemaker")
    with told_plainly(f"describe the endpoint {endpoint_name}"):
        try:
            client.get_waiter("endpoint_in_service").wait(EndpointName=endpoint_name)
        except WaiterError as error:
            reason = error.last_response.get("FailureReason") or str(error)
            raise UserError(
                f"the endpoint {endpoint_name} did not start",
                got=reason.rstrip("."),
                next_step="Read its log in CloudWatch (/aws/sagemaker/Endpoints), then delete_endpoint and try again.",
            ) from error


def question(
    prompt: str, *, adapter: str | None = "tuned", max_new_tokens: int = 80, temperature: float = 0.0
) -> dict[str, Any]:
    """What `ask` sends, as JSON: the body of a request to the endpoint. The arguments are `ask`'s."""
    # The vLLM handler takes one adapter's name, not the list that LMI's older batching took.
    request = {"inputs": prompt, "parameters": {"max_new_tokens": max_new_tokens, "temperature": temperature}}
    return request | ({"adapters": adapter} if adapter else {})


def ask(
    endpoint_name: str,
    prompt: str,
    *,
    adapter: str | None = "tuned",
    max_new_tokens: int = 80,
    temperature: float = 0.0,
    client: Any = None,
) -> str:
    """Asks a deployed model.

    Args:
        endpoint_name: the endpoint.
        prompt: the whole prompt, in the template that the adapter was trained with.
        adapter: the adapter's name; None asks the base model, to compare.
        max_new_tokens: longest answer, tokens.
        temperature: 0 takes the likeliest token each time (greedy).
        client: a `sagemaker-runtime` client; none makes one.

    Returns:
        The answer without the prompt.

    Raises:
        UserError: the endpoint does not answer, or refuses.
    """
    request = question(prompt, adapter=adapter, max_new_tokens=max_new_tokens, temperature=temperature)
    client = client or new_client("sagemaker-runtime")
    with told_plainly(f"ask the endpoint {endpoint_name}"):
        reply = client.invoke_endpoint(
            EndpointName=endpoint_name,
            ContentType="application/json",
            Accept="application/json",
            Body=json.dumps(request).encode(),
        )
        text = reply["Body"].read().decode()
    try:
        answer = json.loads(text)
        return (answer[0] if isinstance(answer, list) else answer)["generated_text"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError(
            f"the endpoint {endpoint_name} gave no answer", got=text[:300], next_step="Read its log in CloudWatch."
        ) from None


def merged_properties(*, max_model_len: int) -> str:
    """`serving.properties` of a folder with a merged model: the container serves the folder that the file is in.

    Args:
        max_model_len: longest prompt with its answer, tokens.
    """
    return _properties({**_VLLM_OPTIONS, "dtype": "bf16", "max_model_len": str(max_model_len)})


def _adapter_files(adapter_dir: Path) -> list[Path]:
    missing = [name for name in _NEEDED if not (adapter_dir / name).exists()]
    if missing:
        raise ModelError(
            f"{', '.join(missing)} not found in {adapter_dir.name}/",
            next_step="Train first (notebook 04_train), or name the folder of a saved adapter.",
        )
    files = [adapter_dir / name for name in (*_NEEDED, *_TOKENIZER) if os.path.lexists(adapter_dir / name)]
    links = [file.name for file in (adapter_dir, *files) if file.is_symlink()]
    if links:
        raise ModelError(f"{', '.join(links)} is a link", expected="plain files", next_step="Copy the adapter first.")
    return files


def _check_served_by_vllm(adapter_dir: Path) -> int:
    """Returns the adapter's largest rank; refuses what vLLM's `PEFTHelper` and models would, before it costs money."""
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(adapter_dir / "adapter_model.safetensors", framework="numpy") as weights:
            names = list(weights.keys())
        rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"{adapter_dir.name}/ holds no readable adapter ({error})", next_step="Save it again."
        ) from error
    step = "Merge it into a 16-bit copy of the model, upload that folder to S3, and deploy the folder."
    for pattern, families in _WITHOUT_LORA.items():
        if any(re.search(pattern, name) for name in names):
            raise ModelError(f"vLLM can't add adapters to models of the families {families}", next_step=step)
    refused = {
        "peft_type": config.get("peft_type") != "LORA",
        "use_dora": config.get("use_dora"),
        "modules_to_save": config.get("modules_to_save"),
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
        "max_lora_rank": str(min(allowed for allowed in _VLLM_RANKS if allowed >= rank)),
    }
    return _properties({"model_id": base_model, **_VLLM_OPTIONS, **lora})


def _properties(options: Mapping[str, str]) -> str:
    return "engine=Python\n" + "".join(f"option.{key}={value}\n" for key, value in options.items())
