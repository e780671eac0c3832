"""Adapters of tiny real models are packaged; the calls to SageMaker are checked by botocore's Stubber."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import boto3
import pytest
import torch
from botocore.response import StreamingBody
from botocore.stub import Stubber

from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.export import vllm
from qlora_helpers.sagemaker import endpoint

ROLE = "arn:aws:iam::123456789012:role/Studio"
ARN = "arn:aws:sagemaker:us-east-1:123456789012:thing/x"
MOMENT = "2026-01-01T00:00:00Z"


def save_adapter(folder: Path, model_type: str = "llama", **lora) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"intermediate_size": 64} if model_type in ("llama", "gpt_neox") else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **size))
    targets = ["q_proj", "v_proj"] if model_type == "llama" else ["query_key_value"]
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **({"r": 8} | lora)))
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("saved") / "adapter", r=12)


@pytest.fixture
def adapter(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    (tmp_path / "adapter" / "training_args.bin").write_bytes(b"pickle")
    return tmp_path / "adapter"


def stubbed(service: str):
    client = boto3.client(
        service, region_name="us-east-1", aws_access_key_id="testing", aws_secret_access_key="testing"
    )
    return client, Stubber(client)


def test_the_archive_holds_what_the_container_reads(adapter, tmp_path):
    out = vllm.package_adapter(adapter, "org/model-1B", tmp_path / "model.tar.gz", name="tuned-2")
    with tarfile.open(out) as archive:
        assert sorted(archive.getnames()) == [
            "adapters/tuned-2/adapter_config.json",
            "adapters/tuned-2/adapter_model.safetensors",
            "adapters/tuned-2/tokenizer.json",
            "serving.properties",
        ]
        properties = archive.extractfile("serving.properties").read().decode()
        weights = archive.extractfile("adapters/tuned-2/adapter_model.safetensors").read()
    assert properties.splitlines() == [
        "engine=Python",
        "option.model_id=org/model-1B",
        "option.async_mode=true",
        "option.rolling_batch=disable",
        "option.entryPoint=djl_python.lmi_vllm.vllm_async_service",
        "option.tensor_parallel_degree=max",
        "option.enable_lora=true",
        "option.max_loras=1",
        "option.max_lora_rank=16",  # r=12: vLLM takes 8, 16, 32, ... alone
    ]
    assert weights == (adapter / "adapter_model.safetensors").read_bytes()
    again = vllm.package_adapter(adapter, "org/model-1B", tmp_path / "again.tar.gz", name="tuned-2")
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named_and_the_old_archive_stays(adapter, tmp_path, missing):
    (tmp_path / "model.tar.gz").write_bytes(b"old")
    (adapter / missing).unlink()
    with pytest.raises(ModelError, match=f"{missing} not found in adapter/"):
        vllm.package_adapter(adapter, "org/model", tmp_path / "model.tar.gz")
    assert (tmp_path / "model.tar.gz").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json", "tokenizer.model"])
def test_links_are_refused(adapter, tmp_path, name):
    secret = tmp_path / "secret"
    if (adapter / name).exists():
        os.replace(adapter / name, secret)
    (adapter / name).symlink_to(secret)
    with pytest.raises(ModelError, match=f"{name} is a link"):
        vllm.package_adapter(adapter, "org/model", tmp_path / "model.tar.gz")


def test_damaged_files_are_refused(adapter, tmp_path):
    (adapter / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="no readable adapter"):
        vllm.package_adapter(adapter, "org/model", tmp_path / "model.tar.gz")
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="no readable adapter"):
        vllm.package_adapter(adapter, "org/model", tmp_path / "model.tar.gz")


@pytest.mark.parametrize(
    "base", ["adapter", "/models/falcon", "./model", "random:falcon-7b", "model.gguf", "org/model\noption.x=1", "a/b/c"]
)
def test_a_base_model_that_the_endpoint_cannot_reach_is_refused(adapter, tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="can't reach that base model"):
        vllm.package_adapter(adapter, base, tmp_path / "model.tar.gz")


def test_a_local_folder_that_looks_like_a_hub_id_is_refused(adapter, tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="can't reach"):
        vllm.package_adapter(adapter, "models/mine", tmp_path / "model.tar.gz")


def test_a_base_model_in_s3_is_taken(adapter, tmp_path):
    vllm.package_adapter(adapter, "s3://my-bucket/models/mine/", tmp_path / "model.tar.gz")
    with tarfile.open(tmp_path / "model.tar.gz") as archive:
        settings = archive.extractfile("serving.properties").read().decode()
    assert "option.model_id=s3://my-bucket/models/mine/" in settings


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a b", "x" * 64])
def test_adapter_names_are_plain(adapter, tmp_path, name):
    with pytest.raises(UserError, match="an adapter can't have that name"):
        vllm.package_adapter(adapter, "org/model", tmp_path / "model.tar.gz", name=name)


@pytest.mark.parametrize(("model_type", "family"), [("falcon", "Falcon"), ("bloom", "BLOOM"), ("gpt_neox", "GPT-NeoX")])
def test_families_that_vllm_serves_without_adapters_are_refused(tmp_path, model_type, family):
    adapter = save_adapter(tmp_path / "adapter", model_type)
    with pytest.raises(ModelError, match=f"vLLM can't add adapters to .*{family}.*Merge it"):
        vllm.package_adapter(adapter, "org/model", tmp_path / "model.tar.gz")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters="),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"r": 1024}, "r=1024"),
        ({"rank_pattern": {"q_proj": 600}}, "r=12"),
    ],
)
def test_adapters_that_vllm_refuses_are_refused_here(adapter, tmp_path, change, expected):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=f"expected plain LoRA; got {expected}"):
        vllm.package_adapter(adapter, "org/model", tmp_path / "model.tar.gz")


def test_the_allowed_rank_is_the_smallest_that_holds_the_adapter():
    assert [vllm.allowed_rank(rank) for rank in (1, 8, 9, 16, 512)] == [8, 8, 16, 16, 512]


def expected_calls(container: dict) -> list[tuple[str, dict, dict]]:
    variant = {
        "VariantName": "AllTraffic",
        "ModelName": "demo",
        "InstanceType": "ml.g5.2xlarge",
        "InitialInstanceCount": 1,
        "InferenceAmiVersion": "al2023-ami-sagemaker-inference-gpu-4-1",
        "ContainerStartupHealthCheckTimeoutInSeconds": 1800,
    }
    tags = {"Tags": [{"Key": "qlora_helpers:made-by", "Value": "d-abc123/lab"}]}
    model = {"ModelName": "demo", "PrimaryContainer": container, "ExecutionRoleArn": ROLE, **tags}
    return [
        ("create_model", {"ModelArn": ARN}, model),
        (
            "create_endpoint_config",
            {"EndpointConfigArn": ARN},
            {"EndpointConfigName": "demo", "ProductionVariants": [variant], **tags},
        ),
        ("create_endpoint", {"EndpointArn": ARN}, {"EndpointName": "demo", "EndpointConfigName": "demo", **tags}),
    ]


CONTAINER = {
    "Image": "763104351884.dkr.ecr.us-east-1.amazonaws.com/djl-inference:0.38.0-lmi29.0.0-cu130",
    "ModelDataUrl": "s3://my-bucket/demo/model.tar.gz",
    "Environment": {"SERVING_FAIL_FAST": "true"},
}


def test_deploy_makes_model_configuration_and_endpoint():
    client, stub = stubbed("sagemaker")
    for call in expected_calls(CONTAINER):
        stub.add_response(*call)
    with stub:
        name = endpoint.deploy(
            CONTAINER["ModelDataUrl"], "demo", role=ROLE, instance_type="ml.g5.2xlarge", client=client
        )
    assert name == "demo"
    stub.assert_no_pending_responses()


def test_deploy_takes_the_folder_of_a_merged_model():
    client, stub = stubbed("sagemaker")
    source = {"S3Uri": "s3://my-bucket/merged/", "S3DataType": "S3Prefix", "CompressionType": "None"}
    container = {
        "Image": "mine",
        "ModelDataSource": {"S3DataSource": source},
        "Environment": {
            "SERVING_FAIL_FAST": "true",
            "OPTION_ASYNC_MODE": "true",
            "OPTION_ROLLING_BATCH": "disable",
            "OPTION_ENTRYPOINT": "djl_python.lmi_vllm.vllm_async_service",
            "OPTION_TENSOR_PARALLEL_DEGREE": "max",
            "OPTION_MAX_MODEL_LEN": "2048",
        },
    }
    for call in expected_calls(container):
        stub.add_response(*call)
    with stub:
        endpoint.deploy(
            "s3://my-bucket/merged/",
            "demo",
            role=ROLE,
            instance_type="ml.g5.2xlarge",
            image_uri="mine",
            environment={"OPTION_MAX_MODEL_LEN": "2048"},
            client=client,
        )
    stub.assert_no_pending_responses()


def test_a_refused_endpoint_leaves_nothing_behind():
    client, stub = stubbed("sagemaker")
    calls = expected_calls(CONTAINER)
    stub.add_response(*calls[0])
    stub.add_response(*calls[1])
    stub.add_client_error("create_endpoint", "ResourceLimitExceeded", "quota for ml.g5.2xlarge is 0 Instances.", 400)
    stub.add_response("delete_endpoint_config", {}, {"EndpointConfigName": "demo"})
    stub.add_response("delete_model", {}, {"ModelName": "demo"})
    with stub, pytest.raises(UserError, match="did not create the endpoint demo; got ResourceLimitExceeded: quota for"):
        endpoint.deploy(CONTAINER["ModelDataUrl"], "demo", role=ROLE, instance_type="ml.g5.2xlarge", client=client)
    stub.assert_no_pending_responses()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"role": "Studio"}, "not an IAM role"),
        ({"endpoint_name": "my_endpoint"}, "an endpoint can't have that name"),
        ({"model_s3_uri": "model.tar.gz"}, "not an address in S3"),
    ],
)
def test_wrong_arguments_reach_no_network(change, expected):
    client, stub = stubbed("sagemaker")
    arguments = {
        "model_s3_uri": "s3://my-bucket/a",
        "endpoint_name": "demo",
        "role": ROLE,
        "instance_type": "ml.g5.xlarge",
    }
    with stub, pytest.raises(UserError, match=expected):
        endpoint.deploy(**(arguments | change), client=client)


def described(status: str, **more) -> dict:
    times = {"CreationTime": MOMENT, "LastModifiedTime": MOMENT}
    return {"EndpointName": "demo", "EndpointArn": ARN, "EndpointStatus": status, **times, **more}


def test_waiting_returns_when_the_endpoint_answers():
    client, stub = stubbed("sagemaker")
    for call in expected_calls(CONTAINER):
        stub.add_response(*call)
    stub.add_response("describe_endpoint", described("InService"), {"EndpointName": "demo"})
    with stub:
        endpoint.deploy(
            CONTAINER["ModelDataUrl"], "demo", role=ROLE, instance_type="ml.g5.2xlarge", wait=True, client=client
        )
    stub.assert_no_pending_responses()


def test_waiting_reports_why_an_endpoint_did_not_start():
    client, stub = stubbed("sagemaker")
    failed = described("Failed", FailureReason="The primary container did not pass the ping health check.")
    stub.add_response("describe_endpoint", failed, {"EndpointName": "demo"})
    with stub, pytest.raises(UserError, match="demo did not start; got The primary container did not pass.*CloudWatch"):
        endpoint.wait_for_endpoint("demo", client=client)


def answer(text: str) -> dict:
    return {"Body": StreamingBody(io.BytesIO(text.encode()), len(text.encode())), "ContentType": "application/json"}


def asked(body: dict) -> dict:
    json_types = {"ContentType": "application/json", "Accept": "application/json"}
    return {"EndpointName": "demo", "Body": json.dumps(body).encode(), **json_types}


def test_the_requests_can_be_read_before_they_are_sent():
    requests = endpoint.endpoint_requests(
        CONTAINER["ModelDataUrl"],
        "demo",
        role=ROLE,
        instance_type="ml.g5.2xlarge",
        image_uri=CONTAINER["Image"],
        made_by="d-abc123/lab",
    )
    assert list(requests.items()) == [(call, arguments) for call, _, arguments in expected_calls(CONTAINER)]


def test_ask_sends_what_the_container_reads():
    client, stub = stubbed("sagemaker-runtime")
    parameters = {"max_new_tokens": 40, "temperature": 0.5}
    body = {"inputs": "Summarise: hi", "parameters": parameters, "adapters": "tuned"}
    assert endpoint.question("Summarise: hi", max_new_tokens=40, temperature=0.5) == body
    stub.add_response("invoke_endpoint", answer('{"generated_text": "Ann says hé."}'), asked(body))
    with stub:
        text = endpoint.ask("demo", "Summarise: hi", max_new_tokens=40, temperature=0.5, client=client)
    assert text == "Ann says hé."


def test_ask_can_ask_the_base_model_and_takes_a_list():
    client, stub = stubbed("sagemaker-runtime")
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 80, "temperature": 0.0}}
    stub.add_response("invoke_endpoint", answer('[{"generated_text": "hello"}]'), asked(body))
    with stub:
        assert endpoint.ask("demo", "hi", adapter=None, client=client) == "hello"


@pytest.mark.parametrize("text", ['{"error": "LoRA adapter x not found", "code": 424}', "<html>" + "x" * 1000, "[]"])
def test_an_answer_without_text_is_an_error(text):
    client, stub = stubbed("sagemaker-runtime")
    stub.add_response("invoke_endpoint", answer(text))
    with stub, pytest.raises(UserError, match="demo gave no answer; got .{1,300}\\. Read its log"):
        endpoint.ask("demo", "hi", client=client)


def test_an_endpoint_that_does_not_exist_is_reported():
    client, stub = stubbed("sagemaker-runtime")
    stub.add_client_error("invoke_endpoint", "ValidationError", "Endpoint demo of account 1 not found.", 400)
    with stub, pytest.raises(UserError, match="did not ask the endpoint demo; got ValidationError: Endpoint demo"):
        endpoint.ask("demo", "hi", client=client)


def test_lmi_image_uri():
    assert endpoint.lmi_image_uri("eu-central-1").startswith(
        "763104351884.dkr.ecr.eu-central-1.amazonaws.com/djl-inference:"
    )
    with pytest.raises(UserError, match="not an AWS region"):
        endpoint.lmi_image_uri("nowhere")


def test_upload_and_delete_endpoint_are_available_here():
    from qlora_helpers.sagemaker import aws

    assert (endpoint.upload, endpoint.delete_endpoint) == (aws.upload, aws.delete_endpoint)
