"""The same run as a SageMaker training job: the code and the run's settings go to S3, the run folder comes back there.

The job's checkpoint folder is the run folder. SageMaker copies it to S3 all the while, and into the next job of the
same run: so a job resumes where the last one ended, and `aws s3 sync` brings the run here to be watched like any other.

The request goes through boto3. The SageMaker Python SDK 3 (`ModelTrainer`) makes the same call, but does not fit into
this project's environment: 3.27 needs protobuf < 7 and rich < 15, and brings 900 MB with it.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.tarball import write_tarball
from qlora_helpers.model.hub import is_hub_id
from qlora_helpers.runs import sigterm
from qlora_helpers.runs.folder import Run
from qlora_helpers.sagemaker.aws import aws_errors_explained, checked_role, new_client, registry, split_s3_uri, upload

TRAINING_IMAGE = "pytorch:2.13-cu133-amzn2023-sagemaker"
"""AWS's training container with this project's PyTorch (in the SageMaker Python SDK 3.27.0: `pytorch-amzn2023`)."""

_INPUT = "/opt/ml/input/data"

_SCRIPT = """\
#!/bin/bash
# Runs one training run in a SageMaker training job.
set -o pipefail
ml=${{1:-/opt/ml}}
cd "$(dirname "$0")"
mkdir -p runs "$ml/checkpoints" "$ml/output/tensorboard" "$ml/model"

fail() {{ tail -n 20 train.out > "$ml/output/failure"; exit 1; }}  # SageMaker shows this file as the reason
copy_events() {{ cp -ru runs/{name}/events/. "$ml/output/tensorboard/" 2> /dev/null; }}

# The run folder is what SageMaker copies to S3, and back into the next job of this run.
ln -sfn "$ml/checkpoints" runs/{name}
cp "$ml/input/data/config/config.json" runs/{name}/config.json

python3 -m pip install --quiet --disable-pip-version-check -r requirements.txt 2>&1 | tee train.out || fail
while sleep 30; do copy_events; done > /dev/null 2>&1 &
copier=$!
{command} > train.out 2>&1 &
trainer=$!
tail -n +1 -f --pid=$trainer train.out &
shown=$!
trap 'kill -TERM $trainer' TERM  # a spot interruption, or the job is stopped: the trainer saves and ends
wait $trainer
status=$?
while kill -0 $trainer 2> /dev/null; do wait $trainer; status=$?; done
kill $copier
copy_events
wait $shown
[ $status = 0 ] || [ $status = {told_to_end} ] || fail
[ ! -d runs/{name}/adapter ] || cp -r runs/{name}/adapter/. "$ml/model/"
exit $status
"""


def training_image_uri(region: str) -> str:
    """The training container in AWS's public registry of that region.

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
    processes: int = 1,
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
        run: the run; a data file that it names is uploaded too.
        role: ARN of the execution role.
        instance_type: such as `ml.g5.12xlarge`.
        s3_uri: where code, settings, run folder and results go, such as `s3://bucket/qlora`.
        processes: 1 spreads one model over all GPUs; as many as GPUs gives each one a model and a share of the rows.
        image_uri: another container; none takes `training_image_uri` of the client's region.
        volume_gib: disk for the model cache and the run folder, GiB.
        max_hours: the job is stopped after so long.
        environment: more for the container, such as `HF_TOKEN` for a gated model (whoever may describe the job can
            read it).
        client: a SageMaker client; none makes one.
        s3_client: an S3 client; none makes one.

    Returns:
        The job's name.

    Raises:
        RunError: the run has no settings yet.
        UserError: an argument is wrong, the job could not reach the model, or AWS refuses.
    """
    checked_role(role)
    split_s3_uri(s3_uri)
    config, data_file = _config_for_job(run.config())
    client = client or new_client("sagemaker")
    s3_client = s3_client or new_client("s3")
    name = f"{re.sub('[^A-Za-z0-9]+', '-', run.name)[:40].strip('-')}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    place = f"{s3_uri.rstrip('/')}/jobs/{name}/"
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "config.json")
        settings.write_text(json.dumps(config.to_dict(), indent=2), encoding="utf-8")
        source = source_archive(Path(folder, "source.tar.gz"), run.name, processes=processes)
        channels = {
            "code": upload(source, place, client=s3_client),
            "config": upload(settings, place, client=s3_client),
        }
    if data_file is not None:
        channels["dialogues"] = upload(data_file, place, client=s3_client)
    request = training_job_request(
        name,
        run_name=run.name,
        role=role,
        instance_type=instance_type,
        s3_uri=s3_uri,
        image_uri=image_uri or training_image_uri(client.meta.region_name),
        channels=channels,
        volume_gib=volume_gib,
        max_hours=max_hours,
        environment=environment,
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
    volume_gib: int = 100,
    max_hours: float = 24.0,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The arguments of boto3's `create_training_job`; `training_job` fills them in and sends them.

    Args:
        name: the job's name.
        run_name: the run's name: its folder in S3 and its TensorBoard events.
        channels: name -> object in S3; the container finds it in `/opt/ml/input/data/<name>/`.
        role, instance_type, s3_uri, image_uri, volume_gib, max_hours, environment: as for `training_job`.
    """
    place = s3_uri.rstrip("/")
    # A container argument holds 256 characters at most, so the script travels with the code.
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
        "InputDataConfig": [
            {
                "ChannelName": channel,
                "DataSource": {
                    "S3DataSource": {
                        "S3DataType": "S3Prefix",
                        "S3Uri": uri,
                        "S3DataDistributionType": "FullyReplicated",
                    }
                },
            }
            for channel, uri in channels.items()
        ],
        "OutputDataConfig": {"S3OutputPath": f"{place}/jobs"},
        "CheckpointConfig": {"S3Uri": f"{place}/runs/{run_name}", "LocalPath": "/opt/ml/checkpoints"},
        "TensorBoardOutputConfig": {
            "S3OutputPath": f"{place}/tensorboard/{run_name}",
            "LocalPath": "/opt/ml/output/tensorboard",
        },
        "ResourceConfig": {"InstanceType": instance_type, "InstanceCount": 1, "VolumeSizeInGB": volume_gib},
        "StoppingCondition": {"MaxRuntimeInSeconds": round(max_hours * 3600)},
        "Environment": {"HF_HOME": "/tmp/huggingface", "PYTHONUNBUFFERED": "1", **(environment or {})},
    }


def source_archive(out_path: Path, run_name: str, *, processes: int = 1) -> Path:
    """Writes what the job runs: this package, its pinned requirements, and the script that trains the run.

    Args:
        out_path: the archive.
        run_name: the run's name.
        processes: as for `training_job`.

    Raises:
        UserError: the package was installed without its repository, or fewer than one process.
    """
    package = Path(__file__).resolve().parents[1]
    requirements = package.parent / "requirements.txt"
    if not requirements.is_file():
        raise UserError(
            "requirements.txt is not beside the package",
            next_step="Work in a clone of the repository, installed with `pip install -e .`.",
        )
    files = [path for path in sorted(package.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    contents: dict[str, bytes | Path] = {str(path.relative_to(package.parent)): path for path in files}
    contents["requirements.txt"] = requirements
    contents["job.sh"] = _SCRIPT.format(
        name=run_name, command=_command(run_name, processes), told_to_end=sigterm.EXIT_CODE
    ).encode()
    return write_tarball(out_path, contents)


def _command(run_name: str, processes: int) -> str:
    if processes < 1:
        raise UserError("a job needs processes", expected="at least 1", got=str(processes))
    launcher = f"-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc-per-node={processes} "
    return f"python3 {launcher if processes > 1 else ''}-m qlora_helpers train {run_name}"


def _config_for_job(config: RunConfig) -> tuple[RunConfig, Path | None]:
    """The settings as the container must see them, and the data file to upload, if any."""
    model = config.model.name
    if not model.startswith("random:") and not is_hub_id(model):
        raise UserError(
            "a training job can't reach that model",
            expected="a hub id, or random:NAME",
            got=f"model.name={model}",
            next_step="Set model.name to a hub id.",
        )
    data_file = Path(config.data.source)
    if not data_file.is_file():
        return config, None
    return config.with_settings({"data.source": f"{_INPUT}/dialogues/{data_file.name}"}), data_file
