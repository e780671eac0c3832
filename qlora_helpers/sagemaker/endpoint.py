"""Serves a tuned adapter from a SageMaker real-time endpoint: AWS's LMI container runs base model and adapter in vLLM.

The container reads `serving.properties` and `adapters/<name>/` from the model archive and takes the base model from the
hub (https://docs.djl.ai, "vLLM Engine User Guide" and "Adapters"). The tests check the calls against the SageMaker API's
model, and against moto from creation to deletion; no endpoint was started. Knows nothing of runs or training.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.export.vllm import PLAIN_NAME, VLLM_OPTIONS
from qlora_helpers.sagemaker.aws import aws_errors_explained, checked_role, new_client, registry, split_s3_uri
from qlora_helpers.sagemaker.aws import delete_endpoint as delete_endpoint
from qlora_helpers.sagemaker.aws import upload as upload
from qlora_helpers.sagemaker.tags import maker, tags

LMI_IMAGE = "djl-inference:0.38.0-lmi29.0.0-cu130"
"""The newest LMI container in the SageMaker Python SDK 3.27.0."""

INFERENCE_AMI = "al2023-ami-sagemaker-inference-gpu-4-1"
"""The host image with NVIDIA driver 580: on the default image of ml.g5 and ml.g4dn a CUDA 13 container does not start."""

STARTUP_TIMEOUT_S = 1800
"""How long the container may take to download and load the base model before SageMaker gives up (its default: 480 s)."""


def lmi_image_uri(region: str) -> str:
    """Returns the address of the LMI container (vLLM backend, CUDA 13) in AWS's public registry of a region.

    Raises:
        UserError: no such region.
    """
    return f"{registry(region)}/{LMI_IMAGE}"


def endpoint_requests(
    model_s3_uri: str,
    endpoint_name: str,
    *,
    role: str,
    instance_type: str,
    image_uri: str,
    environment: Mapping[str, str] | None = None,
    made_by: str | None = None,
    run_name: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Returns what `deploy` sends: the arguments of boto3's three calls, in their order. Needs no network.

    Args:
        model_s3_uri, endpoint_name, role, instance_type, image_uri, environment, run_name: as for `deploy`.
        made_by: who makes them, for their tag; None gives them none.

    Returns:
        `create_model`, `create_endpoint_config` and `create_endpoint`, each with its arguments.

    Raises:
        UserError: an argument is wrong.
    """
    if not PLAIN_NAME.fullmatch(endpoint_name):
        expected = "letters, digits and '-', 63 at most"
        raise UserError("an endpoint can't have that name", expected=expected, got=repr(endpoint_name))
    split_s3_uri(model_s3_uri)
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
            "ModelName": endpoint_name,
            "PrimaryContainer": _container(model_s3_uri, image_uri, environment or {}),
            "ExecutionRoleArn": checked_role(role),
            **tags(made_by, run_name),
        },
        "create_endpoint_config": {
            "EndpointConfigName": endpoint_name,
            "ProductionVariants": [variant],
            **tags(made_by, run_name),
        },
        "create_endpoint": {
            "EndpointName": endpoint_name,
            "EndpointConfigName": endpoint_name,
            **tags(made_by, run_name),
        },
    }


def _container(model_s3_uri: str, image_uri: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Describes the container: its image, where the model is, an archive or a folder, and its variables."""
    container: dict[str, Any] = {"Image": image_uri}
    settings = {"SERVING_FAIL_FAST": "true"}
    if model_s3_uri.endswith("/"):
        source = {"S3Uri": model_s3_uri, "S3DataType": "S3Prefix", "CompressionType": "None"}
        container["ModelDataSource"] = {"S3DataSource": source}
        settings |= {f"OPTION_{key.upper()}": value for key, value in VLLM_OPTIONS.items()}
    else:
        container["ModelDataUrl"] = model_s3_uri
    return container | {"Environment": settings | dict(environment)}


def deploy(
    model_s3_uri: str,
    endpoint_name: str,
    *,
    role: str,
    instance_type: str,
    image_uri: str | None = None,
    environment: Mapping[str, str] | None = None,
    run_name: str | None = None,
    wait: bool = False,
    client: Any = None,
) -> str:
    """Creates model, endpoint configuration and endpoint under one name. It costs money until `delete_endpoint`.

    Args:
        model_s3_uri: the archive of `package_adapter` in S3 (see `upload`), or the folder of a merged model, with a `/`
            at the end.
        endpoint_name: letters, digits and `-`, 63 at most.
        role: ARN of the execution role.
        instance_type: such as `ml.g5.2xlarge`; the base model in bfloat16 must fit its GPUs.
        image_uri: another container; None takes `lmi_image_uri` of the client's region.
        environment: more variables for the container, such as `HF_TOKEN` for a gated model (whoever may describe the model can
            read it) or `OPTION_MAX_MODEL_LEN` where the model's own context does not fit the GPU.
        run_name: the run whose model it is, for the tags of all three.
        wait: whether to return only when the endpoint answers, 5 to 15 minutes later.
        client: a SageMaker client; None makes one.

    Returns:
        The endpoint's name.

    Raises:
        UserError: an argument is wrong, AWS refuses (nothing is left behind), or the endpoint did not start.
    """
    client = client or new_client("sagemaker")
    requests = endpoint_requests(
        model_s3_uri,
        endpoint_name,
        role=role,
        instance_type=instance_type,
        environment=environment,
        image_uri=image_uri or lmi_image_uri(client.meta.region_name),
        made_by=maker(),
        run_name=run_name,
    )
    with aws_errors_explained(f"create the endpoint {endpoint_name}"), contextlib.ExitStack() as undo:
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
    """Waits until the endpoint answers; asks every 30 s.

    Raises:
        UserError: it did not start; the message contains SageMaker's reason.
    """
    from botocore.exceptions import WaiterError

    client = client or new_client("sagemaker")
    with aws_errors_explained(f"describe the endpoint {endpoint_name}"):
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
    """Returns the body of a request to the endpoint, which `ask` sends as JSON. The arguments are those of `ask`."""
    # The vLLM handler takes one adapter's name, unlike LMI's older batching, which took a list.
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
    """Asks a deployed model and returns its answer.

    Args:
        endpoint_name: the endpoint.
        prompt: the complete prompt, in the template that the adapter was trained with.
        adapter: the adapter's name; None asks the base model.
        max_new_tokens: longest answer, tokens.
        temperature: 0 takes the most likely token each time (greedy).
        client: a `sagemaker-runtime` client; None makes one.

    Returns:
        The answer without the prompt.

    Raises:
        UserError: the endpoint does not answer, or refuses.
    """
    request = question(prompt, adapter=adapter, max_new_tokens=max_new_tokens, temperature=temperature)
    client = client or new_client("sagemaker-runtime")
    with aws_errors_explained(f"ask the endpoint {endpoint_name}"):
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
