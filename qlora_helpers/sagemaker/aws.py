"""What the other modules of this room share: AWS clients, explained errors, S3 addresses, container registries.

Knows nothing of runs, models or adapters. boto3 is imported when a client is made, so importing this module is cheap.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.runs.buckets import expected_owner
from qlora_helpers.sagemaker.tags import made_by

_COMMON_REGISTRY = "763104351884"
_REGISTRIES = {
    "af-south-1": "626614931356",
    "ap-east-1": "871362719292",
    "ap-east-2": "975050140332",
    "ap-northeast-3": "364406365360",
    "ap-south-2": "772153158452",
    "ap-southeast-3": "907027046896",
    "ap-southeast-4": "457447274322",
    "ap-southeast-5": "550225433462",
    "ap-southeast-6": "633930458069",
    "ap-southeast-7": "590183813437",
    "ca-west-1": "204538143572",
    "cn-north-1": "727897471807",
    "cn-northwest-1": "727897471807",
    "eu-central-2": "380420809688",
    "eu-south-1": "692866216735",
    "eu-south-2": "503227376785",
    "eusc-de-east-1": "204133271717",
    "il-central-1": "780543022126",
    "me-central-1": "914824155844",
    "me-south-1": "217643126080",
    "me-west-1": "124382933778",
    "mx-central-1": "637423239942",
    "us-gov-east-1": "446045086412",
    "us-gov-west-1": "442386744353",
}
"""Accounts of AWS's public deep learning containers, for regions that don't use the common one (without secret regions).
Source: `image_uri_config/djl-lmi.json` and `pytorch-amzn2023.json` of the SageMaker Python SDK 3.27.0."""


def new_client(service: str, region: str | None = None) -> Any:
    """Makes a boto3 client.

    Args:
        service: such as `sagemaker`, `sagemaker-runtime` or `s3`.
        region: such as `us-east-1`; None takes the configured one.

    Raises:
        UserError: no region is set, or there are no credentials.
    """
    import boto3

    with aws_errors_explained(f"open {service}"):
        session = boto3.Session(region_name=region)
        if session.region_name is None:
            raise UserError(
                "no AWS region is set", next_step="Set AWS_DEFAULT_REGION, such as us-east-1 (SageMaker Studio does)."
            )
        if session.get_credentials() is None:
            raise UserError(
                "there are no AWS credentials on this machine",
                next_step="Run this in SageMaker Studio, or log in with `aws configure`.",
            )
        return session.client(service)


@contextlib.contextmanager
def aws_errors_explained(what: str) -> Iterator[None]:
    """Turns boto's errors inside the block into one `UserError`.

    Args:
        what: what was asked of AWS, as in "AWS did not `list the endpoints`".
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        details = error.response.get("Error", {})
        code, message = details.get("Code", "an error"), details.get("Message", str(error)).rstrip(".")
        step = "Correct what the message names."
        if "AccessDenied" in code:
            step = "Give the role that permission, or ask whoever manages the account."
        elif "ExpiredToken" in code:
            step = "Log in again."
        raise UserError(f"AWS did not {what}", got=f"{code}: {message}", next_step=step) from error
    except BotoCoreError as error:
        raise UserError(
            f"AWS could not be asked to {what}",
            got=str(error).rstrip("."),
            next_step="Check the arguments, the network, the region and the credentials.",
        ) from error


def registry(region: str) -> str:
    """Returns the registry of AWS's public deep learning containers, such as `763104351884.dkr.ecr.us-east-1.amazonaws.com`.

    Raises:
        UserError: no such region.
    """
    import boto3
    from botocore.exceptions import UnknownRegionError

    try:
        partition = boto3.Session().get_partition_for_region(region)
    except UnknownRegionError:
        raise UserError(
            "that is not an AWS region", expected="such as us-east-1", got=repr(region), next_step="Name the region."
        ) from None
    suffix = {"aws-cn": "amazonaws.com.cn", "aws-eusc": "amazonaws.eu"}.get(partition, "amazonaws.com")
    return f"{_REGISTRIES.get(region, _COMMON_REGISTRY)}.dkr.ecr.{region}.{suffix}"


def checked_role(role: str) -> str:
    """Returns `role` if it is the ARN of an IAM role.

    Raises:
        UserError: it is something else.
    """
    if not re.fullmatch(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+", role):
        raise UserError(
            "that is not an IAM role",
            expected="arn:aws:iam::123456789012:role/NAME",
            got=repr(role),
            next_step="Take the execution role from the SageMaker console (domain, user profile).",
        )
    return role


def split_s3_uri(uri: str) -> tuple[str, str]:
    """Splits `s3://bucket/a/b` into `("bucket", "a/b")`; a slash at the end is kept.

    Raises:
        UserError: it is not such an address, or has no prefix.
    """
    found = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/([^/\s]\S*)", uri)
    if not found:
        raise UserError(
            "that is not an address in S3",
            expected="s3://bucket/prefix",
            got=repr(uri),
            next_step="Name bucket and prefix.",
        )
    return found[1], found[2]


def upload(path: Path, s3_uri: str, *, client: Any = None, owner: str | None = None) -> str:
    """Copies a file to S3.

    Args:
        path: the file.
        s3_uri: the destination; an address that ends in `/` is completed by the file's name.
        client: an S3 client; None makes one.
        owner: the account that the bucket must belong to; None takes that of the credentials, unless a client is given.

    Returns:
        The address of the object.

    Raises:
        UserError: the address is wrong, the file is missing, or AWS refuses.
    """
    bucket, key = split_s3_uri(s3_uri)
    if not path.is_file():
        raise UserError(f"there is no file {path.name}", next_step="Create it first.")
    key += path.name if key.endswith("/") else ""
    from boto3.exceptions import S3UploadFailedError

    if owner is None and client is None:
        owner = expected_owner().get("ExpectedBucketOwner")
    client = client or new_client("s3")
    more = {"ExtraArgs": {"ExpectedBucketOwner": owner}} if owner else {}
    try:
        with aws_errors_explained(f"accept {path.name}"):
            client.upload_file(str(path), bucket, key, **more)
    except S3UploadFailedError as error:
        raise UserError(
            f"AWS did not accept {path.name}", got=str(error), next_step="Check the bucket and the role's permissions."
        ) from error
    return f"s3://{bucket}/{key}"


def delete_endpoint(name: str, *, client: Any = None) -> list[str]:
    """Deletes an endpoint, and its endpoint configuration and models if whoever made it made them too. Files in S3 stay.

    A configuration or model without the endpoint's tags may be used by other endpoints, or be somebody else's: it stays.

    Args:
        name: the endpoint's name.
        client: a SageMaker client; None makes one.

    Returns:
        What was deleted, such as `["endpoint demo", "endpoint configuration demo", "model demo"]`.
    """
    client = client or new_client("sagemaker")
    deleted = [f"endpoint {name}"]
    with aws_errors_explained(f"delete the endpoint {name}"):
        endpoint = client.describe_endpoint(EndpointName=name)
        config = endpoint["EndpointConfigName"]
        described = client.describe_endpoint_config(EndpointConfigName=config)
        made = made_by(endpoint["EndpointArn"], client=client)
        client.delete_endpoint(EndpointName=name)
        if made.by is None:
            return deleted
        if made_by(described["EndpointConfigArn"], client=client) == made:
            client.delete_endpoint_config(EndpointConfigName=config)
            deleted.append(f"endpoint configuration {config}")
        for model in [variant["ModelName"] for variant in described["ProductionVariants"] if "ModelName" in variant]:
            if made_by(client.describe_model(ModelName=model)["ModelArn"], client=client) == made:
                client.delete_model(ModelName=model)
                deleted.append(f"model {model}")
    return deleted
