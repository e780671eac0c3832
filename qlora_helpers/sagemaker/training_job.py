"""Trains a run as a SageMaker training job: code and settings go to S3, and the run folder comes back there.

The job's checkpoint folder is the run folder. SageMaker copies it to S3 while the job runs, and into the next job of the same
run. So a job resumes where the last one ended, and `aws s3 sync` brings the run to this machine to be watched like any other.

The request goes through boto3. The SageMaker Python SDK 3 (`ModelTrainer`) makes the same call, but does not fit into this
project's environment: 3.27 needs protobuf < 7 and rich < 15, and brings 900 MB with it.
"""

from __future__ import annotations

import glob
import json
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.model.hub import is_hub_id
from qlora_helpers.runs.buckets import CONFIRMED, bucket_of, expected_owner, refuse_unconfirmed
from qlora_helpers.runs.folder import Run
from qlora_helpers.sagemaker.aws import aws_errors_explained, checked_role, new_client, registry, split_s3_uri, upload
from qlora_helpers.sagemaker.source_archive import source_archive
from qlora_helpers.sagemaker.tags import maker, tags

TRAINING_IMAGE = "pytorch:2.13-cu133-amzn2023-sagemaker"
"""AWS's training container with this project's PyTorch (in the SageMaker Python SDK 3.27.0: `pytorch-amzn2023`)."""

_INPUT = "/opt/ml/input/data"
_DATA_CHANNEL = "dialogues"


def training_image_uri(region: str) -> str:
    """Returns the address of the training container in AWS's public registry of a region.

    Raises:
        UserError: no such region.
    """
    return f"{registry(region)}/{TRAINING_IMAGE}"


def training_job(
    run: Run,
    *,
    role: str,
    instance_type: str,
    s3_uri: str,
    processes: int | None = None,
    instance_count: int = 1,
    image_uri: str | None = None,
    volume_gib: int = 100,
    max_hours: float = 24.0,
    environment: Mapping[str, str] | None = None,
    client: Any = None,
    s3_client: Any = None,
) -> str:
    """Starts a SageMaker training job that starts or resumes the run. It costs money for as long as it runs.

    Watch it from here with `aws s3 sync S3_URI/runs/NAME runs/NAME`; the adapter comes back the same way.

    Args:
        run: the run; a data file that its settings name is uploaded, too.
        role: ARN of the execution role.
        instance_type: such as `ml.g5.12xlarge`.
        s3_uri: where code, settings, run folder and results go, such as `s3://bucket/qlora`.
        processes: None takes all GPUs in the way that the plan finds fastest. On a single instance so many processes train with the
            settings as they are, and 1 spreads one model over its GPUs; of several instances so many GPUs each are used.
        instance_count: how many instances train together, in SageMaker's private network; each costs its price. The first one alone
            writes the run folder.
        image_uri: another container; None takes `training_image_uri` of the client's region.
        volume_gib: disk for the model cache and the run folder, GiB.
        max_hours: the job is stopped after this time.
        environment: more variables for the container, such as `HF_TOKEN` for a gated model (whoever may describe the job can
            read it).
        client: a SageMaker client; None makes one.
        s3_client: an S3 client; None makes one.

    Returns:
        The job's name.

    Raises:
        RunError: the run has no settings yet.
        UserError: an argument is wrong, the job could not reach the model, or AWS refuses.
    """
    checked_role(role)
    split_s3_uri(s3_uri)
    refuse_unconfirmed(run.config())
    config, data_file = _config_for_job(run.config())
    client = client or new_client("sagemaker")
    name = _new_job_name(run.name)
    place = f"{s3_uri.rstrip('/')}/jobs/{name}/"
    s3_client = s3_client or new_client("s3")
    request = training_job_request(
        name,
        run_name=run.name,
        role=role,
        instance_type=instance_type,
        s3_uri=s3_uri,
        image_uri=image_uri or training_image_uri(client.meta.region_name),
        channels=_upload_inputs(run.name, config, data_file, place, processes, instance_count, s3_client),
        instance_count=instance_count,
        volume_gib=volume_gib,
        max_hours=max_hours,
        environment=_bucket_confirmed(config) | dict(environment or {}),
        made_by=maker(),
    )
    with aws_errors_explained(f"start the training job {name}"):
        client.create_training_job(**request)
    return name


def training_job_request(
    name: str,
    *,
    run_name: str,
    role: str,
    instance_type: str,
    s3_uri: str,
    image_uri: str,
    channels: Mapping[str, str],
    instance_count: int = 1,
    volume_gib: int = 100,
    max_hours: float = 24.0,
    environment: Mapping[str, str] | None = None,
    made_by: str | None = None,
) -> dict[str, Any]:
    """Returns the arguments of boto3's `create_training_job`, which `training_job` sends. Needs no network.

    Args:
        name: the job's name.
        run_name: the run's name; names its folder in S3 and its TensorBoard events.
        channels: name -> object in S3; the container finds it in `/opt/ml/input/data/<name>/`.
        role, instance_type, s3_uri, image_uri, instance_count, volume_gib, max_hours, environment: as for `training_job`.
        made_by: who makes it, for its tag; None gives it none.
    """
    place = s3_uri.rstrip("/")
    # A container argument has 256 characters at most, so the script travels with the code.
    unpack = f"mkdir -p /tmp/code && python3 -m tarfile -e {_INPUT}/code/source.tar.gz /tmp/code"
    return {
        "TrainingJobName": name,
        "RoleArn": role,
        "AlgorithmSpecification": {
            "TrainingImage": image_uri,
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["/bin/bash", "-c"],
            "ContainerArguments": [f"{unpack} && exec bash /tmp/code/job.sh"],
        },
        "InputDataConfig": [_input_channel(channel, uri) for channel, uri in channels.items()],
        "OutputDataConfig": {"S3OutputPath": f"{place}/jobs"},
        "CheckpointConfig": {"S3Uri": f"{place}/runs/{run_name}", "LocalPath": "/opt/ml/checkpoints"},
        "TensorBoardOutputConfig": {
            "S3OutputPath": f"{place}/tensorboard/{run_name}",
            "LocalPath": "/opt/ml/output/tensorboard",
        },
        "ResourceConfig": {
            "InstanceType": instance_type,
            "InstanceCount": instance_count,
            "VolumeSizeInGB": volume_gib,
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": round(max_hours * 3600)},
        "Environment": {"HF_HOME": "/tmp/huggingface", "PYTHONUNBUFFERED": "1", **(environment or {})},
        **tags(made_by, run_name),
    }


def _input_channel(name: str, s3_uri: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": s3_uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def _config_for_job(config: RunConfig) -> tuple[RunConfig, Path | None]:
    """Returns the settings as the container must see them, and the data file to upload, if any."""
    model = config.model.name
    if not model.startswith("random:") and not is_hub_id(model):
        raise UserError(
            "a training job can't reach that model",
            expected="a hub id, or random:NAME",
            got=f"model.name={model}",
            next_step="Set model.name to a hub id.",
        )
    data_file = Path(config.data.source)
    if data_file.is_dir() or glob.has_magic(config.data.source):
        raise UserError(
            "a training job takes one data file",
            got=f"data.source={config.data.source}",
            next_step="Put the rows into one file, such as a .jsonl or .parquet file.",
        )
    if not data_file.is_file():
        return config, None
    return config.with_settings({"data.source": f"{_INPUT}/{_DATA_CHANNEL}/{data_file.name}"}), data_file


def _bucket_confirmed(config: RunConfig) -> dict[str, str]:
    """Returns the variable that names the bucket of the run's events, since nobody is there to name it on the job's machine."""
    bucket = bucket_of(config)
    return {CONFIRMED: bucket} if bucket else {}


def _new_job_name(run_name: str) -> str:
    """Names a job after its run and the time; SageMaker takes letters, digits and '-', 63 at most."""
    return f"{re.sub('[^A-Za-z0-9]+', '-', run_name)[:40].strip('-')}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"


def _upload_inputs(
    run_name: str,
    config: RunConfig,
    data_file: Path | None,
    place: str,
    processes: int | None,
    instances: int,
    s3_client: Any,
) -> dict[str, str]:
    """Uploads code, settings and the data file to `place` in S3; returns the address of each by its channel's name."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "config.json")
        settings.write_text(json.dumps(config.to_dict(), indent=2), encoding="utf-8")
        files = {
            "code": source_archive(Path(folder, "source.tar.gz"), run_name, processes=processes, instances=instances),
            "config": settings,
        }
        if data_file is not None:
            files[_DATA_CHANNEL] = data_file
        owner = expected_owner().get("ExpectedBucketOwner")
        return {channel: upload(path, place, client=s3_client, owner=owner) for channel, path in files.items()}
