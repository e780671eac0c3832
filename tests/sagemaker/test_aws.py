"""AWS's client side: no call leaves this machine, botocore's Stubber answers."""

from __future__ import annotations

import boto3
import pytest
from botocore.stub import ANY, Stubber

from qlora_helpers.base.errors import UserError
from qlora_helpers.sagemaker import aws


def stubbed(service: str):
    client = boto3.client(
        service, region_name="us-east-1", aws_access_key_id="testing", aws_secret_access_key="testing"
    )
    return client, Stubber(client)


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_a_missing_region_or_missing_credentials_are_reported(no_account):
    with pytest.raises(UserError, match="no AWS region is set. Set AWS_DEFAULT_REGION"):
        aws.new_client("sagemaker")
    with pytest.raises(UserError, match="no AWS credentials on this machine. Run this in SageMaker Studio"):
        aws.new_client("sagemaker", "us-east-1")


def test_a_profile_that_does_not_exist_is_named(no_account, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UserError, match="nobody"):
        aws.new_client("sagemaker", "us-east-1")


def test_a_client_is_made_where_there_is_an_account(no_account, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    assert aws.new_client("sagemaker", "eu-west-1").meta.region_name == "eu-west-1"


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        ("us-east-1", "763104351884.dkr.ecr.us-east-1.amazonaws.com"),
        ("eu-south-1", "692866216735.dkr.ecr.eu-south-1.amazonaws.com"),
        ("cn-north-1", "727897471807.dkr.ecr.cn-north-1.amazonaws.com.cn"),
    ],
)
def test_registry(region, expected):
    assert aws.registry(region) == expected


def test_registry_refuses_an_unknown_region():
    with pytest.raises(UserError, match="not an AWS region; expected such as us-east-1; got 'frankfurt'"):
        aws.registry("frankfurt")


def test_split_s3_uri():
    assert aws.split_s3_uri("s3://my-bucket/a/b.json") == ("my-bucket", "a/b.json")


@pytest.mark.parametrize(
    "uri", ["my-bucket/a", "s3://my-bucket", "s3://my-bucket/", "s3://my-bucket//", "s3://B/a", ""]
)
def test_split_s3_uri_refuses(uri):
    with pytest.raises(UserError, match="s3://bucket/prefix"):
        aws.split_s3_uri(uri)


def test_checked_role():
    assert aws.checked_role("arn:aws:iam::123456789012:role/service-role/Studio") is not None
    for wrong in ("Studio", "arn:aws:iam::1234:role/Studio", "arn:aws:iam::123456789012:user/alice"):
        with pytest.raises(UserError, match="IAM role"):
            aws.checked_role(wrong)


def test_aws_errors_are_explained_with_a_next_step():
    client, stub = stubbed("sagemaker")
    stub.add_client_error("list_endpoints", "AccessDeniedException", "no sagemaker:ListEndpoints for you.", 403)
    with (
        stub,
        pytest.raises(UserError, match=r"AWS did not list them; got .*ListEndpoints for you\. Give the role"),
        aws.aws_errors_explained("list them"),
    ):
        client.list_endpoints()


@pytest.mark.parametrize(
    ("code", "step"),
    [
        ("AccessDenied", "Give the role that permission"),
        ("ExpiredTokenException", "Log in again."),
        ("ValidationException", "Correct what the message names."),
    ],
)
def test_each_kind_of_aws_error_has_its_next_step(code, step):
    client, stub = stubbed("sagemaker")
    stub.add_client_error("list_endpoints", code, "no", 400)
    with stub, pytest.raises(UserError, match=f"got {code}: no. {step}"), aws.aws_errors_explained("list them"):
        client.list_endpoints()


def test_an_unreachable_aws_is_reported():
    from botocore.exceptions import EndpointConnectionError

    message = "AWS could not be asked to list them; got .*Check the arguments, the network"
    with pytest.raises(UserError, match=message), aws.aws_errors_explained("list them"):
        raise EndpointConnectionError(endpoint_url="https://nowhere")


def test_upload_to_a_folder_keeps_the_files_name(tmp_path):
    path = tmp_path / "model.tar.gz"
    path.write_bytes(b"data")
    client, stub = stubbed("s3")
    stub.add_response(
        "put_object", {}, {"Bucket": "my-bucket", "Key": "a/model.tar.gz", "Body": ANY, "ChecksumAlgorithm": ANY}
    )
    with stub:
        assert aws.upload(path, "s3://my-bucket/a/", client=client) == "s3://my-bucket/a/model.tar.gz"
    stub.assert_no_pending_responses()


def test_upload_of_a_missing_file_or_to_a_missing_bucket_is_refused(tmp_path):
    client, stub = stubbed("s3")
    with pytest.raises(UserError, match="there is no file model.tar.gz"):
        aws.upload(tmp_path / "model.tar.gz", "s3://my-bucket/a/", client=client)
    (tmp_path / "model.tar.gz").write_bytes(b"data")
    stub.add_client_error("put_object", "NoSuchBucket", "The specified bucket does not exist", 404)
    with stub, pytest.raises(UserError, match="did not accept model.tar.gz.*NoSuchBucket"):
        aws.upload(tmp_path / "model.tar.gz", "s3://my-bucket/a/", client=client)


@pytest.mark.parametrize("ours", [True, False])
def test_delete_endpoint_deletes_configuration_and_models_that_this_package_made(ours):
    client, stub = stubbed("sagemaker")
    variants = [{"VariantName": "A", "ModelName": "m1"}, {"VariantName": "B"}]
    moment = "2026-01-01T00:00:00Z"
    arn = "arn:aws:sagemaker:us-east-1:123456789012:endpoint/e1"
    described = {"EndpointName": "e1", "EndpointArn": arn, "EndpointConfigName": "c1", "EndpointStatus": "InService"}
    described |= {"CreationTime": moment, "LastModifiedTime": moment}
    config = {
        "EndpointConfigName": "c1",
        "EndpointConfigArn": arn,
        "ProductionVariants": variants,
        "CreationTime": moment,
    }
    stub.add_response("describe_endpoint", described, {"EndpointName": "e1"})
    stub.add_response("describe_endpoint_config", config, {"EndpointConfigName": "c1"})
    tags = {"Tags": [{"Key": "qlora_helpers:made-by", "Value": "somebody"}]}
    others = {"Tags": [{"Key": "x", "Value": "y"}]}
    model = {
        "ModelName": "m1",
        "ModelArn": arn + "/m",
        "ExecutionRoleArn": "arn:aws:iam::1:role/a",
        "CreationTime": moment,
    }
    config["EndpointConfigArn"] = arn + "/c"
    stub.add_response("list_tags", tags, {"ResourceArn": arn})
    stub.add_response("delete_endpoint", {}, {"EndpointName": "e1"})
    stub.add_response("list_tags", tags if ours else others, {"ResourceArn": arn + "/c"})
    if ours:
        stub.add_response("delete_endpoint_config", {}, {"EndpointConfigName": "c1"})
    stub.add_response("describe_model", model, {"ModelName": "m1"})
    stub.add_response("list_tags", tags if ours else others, {"ResourceArn": arn + "/m"})
    if ours:
        stub.add_response("delete_model", {}, {"ModelName": "m1"})
    with stub:
        deleted = aws.delete_endpoint("e1", client=client)
    assert deleted == ["endpoint e1", *(["endpoint configuration c1", "model m1"] if ours else [])]
    stub.assert_no_pending_responses()
