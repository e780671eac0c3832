"""SageMaker is listed and stopped through botocore's Stubber: exact requests, no network."""

from __future__ import annotations

import json

import boto3
import pytest
from botocore.stub import Stubber

from qlora_helpers.base.errors import UserError
from qlora_helpers.machine import studio
from qlora_helpers.sagemaker.resources import Resource, list_sagemaker, stop_sagemaker
from qlora_helpers.sagemaker.tags import TAG, maker

MOMENT = "2026-01-01T00:00:00Z"
DOMAIN = "d-abc123"
ARN = "arn:aws:sagemaker:us-east-1:123456789012:thing/x"


@pytest.fixture
def stubbed():
    client = boto3.client(
        "sagemaker", region_name="us-east-1", aws_access_key_id="testing", aws_secret_access_key="testing"
    )
    with Stubber(client) as stub:
        yield client, stub
        stub.assert_no_pending_responses()


def app(name: str, kind: str, status: str = "InService", **more) -> dict:
    return {"DomainId": DOMAIN, "AppName": name, "AppType": kind, "Status": status, **more}


def add_lists(stub, *app_pages: list[dict], endpoints=(), instances=(), jobs=()):
    for index, page in enumerate(app_pages):
        last = index == len(app_pages) - 1
        answer = {"Apps": page} | ({} if last else {"NextToken": f"t{index}"})
        stub.add_response("list_apps", answer, {"NextToken": f"t{index - 1}"} if index else {})
    stub.add_response("list_endpoints", {"Endpoints": list(endpoints)}, {})
    stub.add_response("list_notebook_instances", {"NotebookInstances": list(instances)}, {"StatusEquals": "InService"})
    stub.add_response("list_training_jobs", {"TrainingJobSummaries": list(jobs)}, {"StatusEquals": "InProgress"})


def endpoint(name: str, status: str) -> dict:
    times = {"CreationTime": MOMENT, "LastModifiedTime": MOMENT}
    return {"EndpointName": name, "EndpointArn": ARN, "EndpointStatus": status, **times}


def test_everything_that_runs_is_listed_over_all_pages(stubbed):
    client, stub = stubbed
    add_lists(
        stub,
        [
            app("default", "JupyterLab", SpaceName="lab", ResourceSpec={"InstanceType": "ml.g5.xlarge"}),
            app("old", "JupyterLab", "Deleted", SpaceName="lab"),
        ],
        [app("default", "TensorBoard", "Pending", UserProfileName="alice")],
        endpoints=[endpoint("demo", "InService"), endpoint("going", "Deleting"), endpoint("broken", "Failed")],
        instances=[{"NotebookInstanceName": "nb", "NotebookInstanceArn": ARN, "InstanceType": "ml.t3.medium"}],
        jobs=[
            {
                "TrainingJobName": "job-1",
                "TrainingJobArn": ARN,
                "CreationTime": MOMENT,
                "TrainingJobStatus": "InProgress",
            }
        ],
    )
    resources = list_sagemaker(everybodys=True, client=client)
    price = "about 1.41 USD an hour (us-east-1, 2026-08-17)"
    assert not any(resource.is_this for resource in resources)  # this code does not run in Studio
    assert [(resource.kind, resource.name, resource.status, resource.note) for resource in resources] == [
        ("app", "default", "InService", f"JupyterLab, space lab, ml.g5.xlarge, {price}"),
        ("app", "default", "Pending", "TensorBoard, user alice"),
        ("endpoint", "demo", "InService", ""),
        ("endpoint", "broken", "Failed", ""),
        ("notebook instance", "nb", "InService", "ml.t3.medium"),
        ("training job", "job-1", "InProgress", ""),
    ]


def test_the_app_that_this_runs_in_is_marked_and_comes_last(stubbed, tmp_path, monkeypatch):
    client, stub = stubbed
    here = tmp_path / "resource-metadata.json"
    here.write_text(
        json.dumps(
            {"AppType": "JupyterLab", "DomainId": DOMAIN, "SpaceName": "lab", "ResourceName": "default", "x": "y"}
        )
    )
    monkeypatch.setattr(studio, "STUDIO_METADATA", here)
    add_lists(
        stub,
        [app("default", "JupyterLab", SpaceName="lab"), app("default", "JupyterLab", SpaceName="other")],
        endpoints=[endpoint("demo", "InService")],
    )
    found = list_sagemaker(everybodys=True, client=client)
    assert [(resource.kind, resource.is_this) for resource in found] == [
        ("app", False),
        ("endpoint", False),
        ("app", True),
    ]
    assert "space lab" in found[-1].note
    assert "this notebook runs here" in str(found[-1])


def test_by_default_only_one_s_own_is_listed_and_stopped(stubbed, tmp_path, monkeypatch):
    """In an account that others use too: their apps, endpoints and jobs, and those that something else made, are left alone."""
    client, stub = stubbed
    here = tmp_path / "resource-metadata.json"
    here.write_text(
        json.dumps({"AppType": "JupyterLab", "DomainId": DOMAIN, "SpaceName": "lab", "ResourceName": "default"})
    )
    monkeypatch.setattr(studio, "STUDIO_METADATA", here)
    monkeypatch.delenv("QLORA_MAKER")
    assert maker() == f"{DOMAIN}/lab"
    arns = {name: f"arn:aws:sagemaker:us-east-1:123456789012:endpoint/{name}" for name in ("mine", "hers", "product")}
    job = {"TrainingJobName": "job", "TrainingJobArn": ARN, "CreationTime": MOMENT, "TrainingJobStatus": "InProgress"}
    add_lists(
        stub,
        [app("default", "JupyterLab", SpaceName="lab"), app("default", "JupyterLab", SpaceName="other")],
        endpoints=[endpoint(name, "InService") | {"EndpointArn": arn} for name, arn in arns.items()],
        instances=[{"NotebookInstanceName": "boss", "NotebookInstanceArn": ARN}],
        jobs=[job],
    )
    made = {arns["mine"]: f"{DOMAIN}/lab", arns["hers"]: f"{DOMAIN}/other"}
    for arn in (*arns.values(), ARN, ARN):
        tags = [{"Key": "team", "Value": "x"}] + ([{"Key": TAG, "Value": made[arn]}] if arn in made else [])
        stub.add_response("list_tags", {"Tags": tags}, {"ResourceArn": arn})
    found = list_sagemaker(client=client)
    assert [(resource.kind, resource.name) for resource in found] == [("endpoint", "mine"), ("app", "default")]
    assert found[1].is_this


def test_stopping_shows_first_and_stops_nothing_without_confirm(stubbed, capsys):
    client, _ = stubbed
    request = {"DomainId": DOMAIN, "SpaceName": "lab", "AppType": "JupyterLab", "AppName": "default"}
    assert stop_sagemaker([Resource("app", "default", "InService", "JupyterLab", request)], client=client) == []
    assert "default" in (printed := capsys.readouterr().out)
    assert "Nothing was stopped" in printed


def test_each_kind_is_stopped_by_its_own_call(stubbed):
    client, stub = stubbed
    add_lists(
        stub,
        [app("default", "JupyterLab", SpaceName="lab"), app("default", "TensorBoard", UserProfileName="alice")],
        endpoints=[endpoint("demo", "InService")],
        instances=[{"NotebookInstanceName": "nb", "NotebookInstanceArn": ARN}],
        jobs=[
            {
                "TrainingJobName": "job-1",
                "TrainingJobArn": ARN,
                "CreationTime": MOMENT,
                "TrainingJobStatus": "InProgress",
            }
        ],
    )
    found = list_sagemaker(everybodys=True, client=client)
    lab = {"DomainId": DOMAIN, "SpaceName": "lab", "AppType": "JupyterLab", "AppName": "default"}
    board = {"DomainId": DOMAIN, "UserProfileName": "alice", "AppType": "TensorBoard", "AppName": "default"}
    stub.add_response("delete_app", {}, lab)
    stub.add_response("delete_app", {}, board)
    described = endpoint("demo", "InService") | {"EndpointConfigName": "demo-config"}
    config = {"EndpointConfigName": "demo-config", "EndpointConfigArn": ARN, "CreationTime": MOMENT}
    config |= {"ProductionVariants": [{"VariantName": "A", "ModelName": "demo-model"}]}
    stub.add_response("describe_endpoint", described, {"EndpointName": "demo"})
    stub.add_response("describe_endpoint_config", config, {"EndpointConfigName": "demo-config"})
    tags = {"Tags": [{"Key": TAG, "Value": "somebody"}]}
    stub.add_response("list_tags", tags, {"ResourceArn": ARN})
    stub.add_response("delete_endpoint", {}, {"EndpointName": "demo"})
    stub.add_response("list_tags", tags, {"ResourceArn": ARN})
    stub.add_response("delete_endpoint_config", {}, {"EndpointConfigName": "demo-config"})
    model = {
        "ModelName": "demo-model",
        "ModelArn": ARN,
        "ExecutionRoleArn": "arn:aws:iam::1:role/a",
        "CreationTime": MOMENT,
    }
    stub.add_response("describe_model", model, {"ModelName": "demo-model"})
    stub.add_response("list_tags", tags, {"ResourceArn": ARN})
    stub.add_response("delete_model", {}, {"ModelName": "demo-model"})
    stub.add_response("stop_notebook_instance", {}, {"NotebookInstanceName": "nb"})
    stub.add_response("stop_training_job", {}, {"TrainingJobName": "job-1"})
    assert stop_sagemaker(found, confirm=True, client=client) == found


def test_a_role_that_may_not_list_is_refused(stubbed):
    client, stub = stubbed
    stub.add_client_error("list_apps", "AccessDeniedException", "not authorized to perform: sagemaker:ListApps", 403)
    with pytest.raises(UserError, match="did not list what runs in SageMaker.*sagemaker:ListApps. Give the role"):
        list_sagemaker(client=client)


def test_listing_without_an_account_is_refused(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no AWS region is set"):
        list_sagemaker()
