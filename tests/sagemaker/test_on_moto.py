"""Endpoints and training jobs against moto's SageMaker, from creation to deletion, with their roles, tags and prices.

moto answers `describe` from what was really sent and stored; of the GPU instances of endpoints it knows ml.g4dn. It has no apps,
ends a job at once and can't stop one: these calls are answered here, and botocore's Stubber checks their requests in the other
files.
"""

from __future__ import annotations

import json
import tarfile
import urllib.request
from types import SimpleNamespace

import boto3
import pytest

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.runs.folder import Run
from qlora_helpers.sagemaker import endpoint, training_job
from qlora_helpers.sagemaker.aws import upload
from qlora_helpers.sagemaker.resources import list_sagemaker, stop_sagemaker
from qlora_helpers.sagemaker.tags import RUN_TAG, TAG

ROLE = "arn:aws:iam::123456789012:role/Studio"
OURS = [{"Key": TAG, "Value": "d-abc123/lab"}, {"Key": RUN_TAG, "Value": "mine"}]


@pytest.fixture(scope="module")
def moto():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


@pytest.fixture
def account(moto, monkeypatch):
    """An empty account with a bucket."""
    for name, value in {
        "AWS_ENDPOINT_URL": moto,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    urllib.request.urlopen(urllib.request.Request(f"{moto}/moto-api/reset", method="POST")).close()
    boto3.client("s3").create_bucket(Bucket="my-bucket")
    return moto


@pytest.fixture
def client(account):
    """A SageMaker client; the two calls that moto lacks are answered here, and `stopped` lists the jobs that were stopped."""
    made = boto3.client("sagemaker")
    made.stopped = []

    def answered(name: str, answer) -> None:
        made.meta.events.register(
            f"before-call.sagemaker.{name}",
            lambda params, **_: (SimpleNamespace(status_code=200), answer(json.loads(params["body"]))),
        )

    answered("ListApps", lambda asked: {"Apps": []})
    answered("StopTrainingJob", lambda asked: made.stopped.append(asked["TrainingJobName"]) or {})
    return made


def deploy(client, name: str = "demo", *, run_name: str | None = "mine", **more) -> str:
    return endpoint.deploy(
        "s3://my-bucket/demo/model.tar.gz",
        name,
        role=ROLE,
        run_name=run_name,
        client=client,
        **{"instance_type": "ml.g4dn.2xlarge"} | more,
    )


def tags_of(client, arn: str) -> list[dict[str, str]]:
    return sorted(client.list_tags(ResourceArn=arn)["Tags"], key=lambda tag: tag["Key"])


def left(client) -> dict[str, list[str]]:
    return {
        "endpoints": [each["EndpointName"] for each in client.list_endpoints()["Endpoints"]],
        "configs": [each["EndpointConfigName"] for each in client.list_endpoint_configs()["EndpointConfigs"]],
        "models": [each["ModelName"] for each in client.list_models()["Models"]],
    }


def test_an_endpoint_is_made_asked_and_deleted_whole(client, account, tmp_path):
    archive = tmp_path / "model.tar.gz"
    with tarfile.open(archive, "w:gz"):
        pass
    assert upload(archive, "s3://my-bucket/demo/") == "s3://my-bucket/demo/model.tar.gz"
    deploy(client, wait=True)
    described = client.describe_endpoint(EndpointName="demo")
    config = client.describe_endpoint_config(EndpointConfigName=described["EndpointConfigName"])
    (variant,) = config["ProductionVariants"]
    model = client.describe_model(ModelName=variant["ModelName"])
    assert model["ExecutionRoleArn"] == ROLE
    assert model["PrimaryContainer"]["ModelDataUrl"] == "s3://my-bucket/demo/model.tar.gz"
    assert (variant["InstanceType"], variant["InitialInstanceCount"]) == ("ml.g4dn.2xlarge", 1)
    for arn in (described["EndpointArn"], config["EndpointConfigArn"], model["ModelArn"]):
        assert tags_of(client, arn) == OURS
    body = {"results": [{"Body": '{"generated_text": "Ann says hi."}', "ContentType": "application/json"}]}
    body["results"][0] |= {"InvokedProductionVariant": "AllTraffic", "CustomAttributes": ""}
    address = f"{account}/moto-api/static/sagemaker/endpoint-results"
    urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode())).close()
    assert endpoint.ask("demo", "Summarise: hi") == "Ann says hi."
    assert endpoint.delete_endpoint("demo", client=client) == [
        "endpoint demo",
        "endpoint configuration demo",
        "model demo",
    ]
    assert left(client) == {"endpoints": [], "configs": [], "models": []}
    with pytest.raises(UserError, match="AWS did not delete the endpoint demo"):
        endpoint.delete_endpoint("demo", client=client)


def test_a_refused_endpoint_leaves_nothing_behind(client):
    with pytest.raises(UserError, match="AWS did not create the endpoint demo; got ValidationException"):
        deploy(client, instance_type="ml.nothing.xlarge")
    assert left(client) == {"endpoints": [], "configs": [], "models": []}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "runs" / "mine")
    run.save_config(profile_config("falcon-40b"))
    return run


def running(*names: str) -> None:
    """moto ends a job as soon as it is made; these run on."""
    from moto.sagemaker.models import sagemaker_backends

    for name in names:
        job = sagemaker_backends["123456789012"]["us-east-1"].training_jobs[name]
        job.training_job_status = "InProgress"


def test_a_training_job_is_made_of_what_lies_in_the_bucket_and_is_stopped(client, run):
    s3 = boto3.client("s3")
    name = training_job.training_job(
        run, role=ROLE, instance_type="ml.g5.12xlarge", s3_uri="s3://my-bucket/qlora", max_hours=2, client=client
    )
    job = client.describe_training_job(TrainingJobName=name)
    assert (job["RoleArn"], job["StoppingCondition"]) == (ROLE, {"MaxRuntimeInSeconds": 7200})
    assert job["CheckpointConfig"]["S3Uri"] == "s3://my-bucket/qlora/runs/mine"
    assert tags_of(client, job["TrainingJobArn"]) == OURS
    for channel in job["InputDataConfig"]:
        uri = channel["DataSource"]["S3DataSource"]["S3Uri"]
        assert s3.head_object(Bucket="my-bucket", Key=uri.removeprefix("s3://my-bucket/"))["ContentLength"] > 0
    running(name)
    (found,) = list_sagemaker(client=client)
    price = "about 7.09 USD an hour (us-east-1, mid 2026)"
    assert (found.kind, found.run, found.note) == ("training job", "mine", f"run mine, ml.g5.12xlarge, {price}")
    assert stop_sagemaker([found], confirm=True, client=client) == [found] and client.stopped == [name]


def test_by_default_only_what_one_made_is_listed_and_stopped(client, run, monkeypatch):
    """Others' endpoints of the same package, and what something else made, are in no list and stay as they are."""
    deploy(client, "mine")
    deploy(client, "mine-2", run_name="other-run")
    monkeypatch.setenv("QLORA_MAKER", "d-abc123/her-lab")
    deploy(client, "hers")
    hers = training_job.training_job(
        run, role=ROLE, instance_type="ml.g5.xlarge", s3_uri="s3://my-bucket/q", client=client
    )
    running(hers)
    monkeypatch.setenv("QLORA_MAKER", "d-abc123/lab")
    product = {"VariantName": "A", "ModelName": "product", "InstanceType": "ml.g4dn.xlarge", "InitialInstanceCount": 2}
    client.create_model(ModelName="product", PrimaryContainer={"Image": "x"}, ExecutionRoleArn=ROLE)
    client.create_endpoint_config(EndpointConfigName="product", ProductionVariants=[product])
    client.create_endpoint(EndpointName="product", EndpointConfigName="product")
    client.create_notebook_instance(NotebookInstanceName="boss", InstanceType="ml.t3.medium", RoleArn=ROLE)
    everything = {each.name for each in list_sagemaker(everybodys=True, client=client)}
    assert everything == {"mine", "mine-2", "hers", hers, "product", "boss"}
    assert "2 x ml.g4dn.xlarge, about 1.47 USD an hour" in str(
        [each for each in list_sagemaker(everybodys=True, client=client) if each.name == "product"][0]
    )
    assert [each.name for each in list_sagemaker(run="mine", client=client)] == ["mine"]
    found = list_sagemaker(client=client)
    assert [(each.name, each.run) for each in found] == [("mine", "mine"), ("mine-2", "other-run")]
    stop_sagemaker(found, confirm=True, client=client)
    assert left(client) == {name: ["hers", "product"] for name in ("endpoints", "configs", "models")}
    assert client.stopped == [] and list_sagemaker(client=client) == []


def test_what_an_endpoint_shares_with_others_stays(client, monkeypatch):
    """An endpoint of one's own on a configuration and a model that somebody else made with this package."""
    monkeypatch.setenv("QLORA_MAKER", "d-abc123/her-lab")
    deploy(client, "hers")
    client.create_endpoint(EndpointName="mine", EndpointConfigName="hers", Tags=OURS)
    assert endpoint.delete_endpoint("mine", client=client) == ["endpoint mine"]
    assert left(client) == {name: ["hers"] for name in ("endpoints", "configs", "models")}


def test_what_is_left_of_an_endpoint_that_something_else_deleted_can_be_listed_and_deleted(client, monkeypatch):
    deploy(client)
    deploy(client, "kept")
    client.delete_endpoint(EndpointName="demo")
    client.create_model(ModelName="product", PrimaryContainer={"Image": "x"}, ExecutionRoleArn=ROLE)
    assert [each.name for each in list_sagemaker(client=client)] == ["kept"]
    found = list_sagemaker(leftovers=True, client=client)
    assert [(each.kind, each.name) for each in found] == [
        ("endpoint", "kept"),
        ("endpoint configuration", "demo"),
        ("model", "demo"),
    ]
    stop_sagemaker(found[1:], confirm=True, client=client)
    assert left(client) == {"endpoints": ["kept"], "configs": ["kept"], "models": ["kept", "product"]}


def test_without_a_name_of_one_s_own_the_tag_is_the_identity_of_the_credentials(client, monkeypatch):
    monkeypatch.delenv("QLORA_MAKER")
    deploy(client)
    made = tags_of(client, client.describe_endpoint(EndpointName="demo")["EndpointArn"])[0]
    assert made["Key"] == TAG and made["Value"].startswith("arn:aws:")
    assert [each.name for each in list_sagemaker(client=client)] == ["demo"]
