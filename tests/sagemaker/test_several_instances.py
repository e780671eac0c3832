"""A training job on two instances: the request is sent to moto's server, and its script trains for real, twice on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from qlora_helpers.base.errors import UserError
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.opening import open_run
from qlora_helpers.sagemaker.hosts import RESOURCES, place_in_job
from qlora_helpers.sagemaker.training_job import training_job

HOSTS = ["127.0.0.1", "localhost"]
# Installs nothing, and joins at a port that no other test uses.
PYTHON = """#!{bash}
case "$*" in
    *"-m pip"*) exit 0 ;;
    *" launch "*) exec {python} "$@" --port {port} ;;
esac
exec {python} "$@"
"""


def test_each_instance_finds_its_place(tmp_path):
    assert place_in_job(tmp_path, {}) == (1, 0, "localhost")
    variables = {"SM_HOSTS": '["algo-10", "algo-2", "algo-1"]', "SM_CURRENT_HOST": "algo-10"}
    assert place_in_job(tmp_path, variables) == (3, 2, "algo-1")
    path = tmp_path / RESOURCES
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"current_host": "algo-1", "hosts": ["algo-1", "algo-2"]}))
    assert place_in_job(tmp_path, variables) == (2, 0, "algo-1")  # the container's own file counts
    for damaged in ("[", "{}", '{"current_host": "algo-3", "hosts": ["algo-1"]}'):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"machines can't be told apart.*resourceconfig\.json"):
            place_in_job(tmp_path, {})


@pytest.fixture
def aws(monkeypatch) -> Iterator[dict[str, Any]]:
    """Clients of moto's server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    access = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    clients = {
        service: boto3.client(service, endpoint_url=f"http://{host}:{port}", **access)
        for service in ("s3", "sagemaker")
    }
    clients["s3"].create_bucket(Bucket="my-bucket")
    yield clients
    server.stop()


def sent_job(run: Run, aws: dict[str, Any]) -> dict[str, Any]:
    """Starts a job on two instances; returns what the server holds of it."""
    name = training_job(
        run,
        role="arn:aws:iam::123456789012:role/Studio",
        instance_type="ml.g5.12xlarge",
        instance_count=2,
        s3_uri="s3://my-bucket/qlora",
        processes=1,
        client=aws["sagemaker"],
        s3_client=aws["s3"],
    )
    found: dict[str, Any] = aws["sagemaker"].describe_training_job(TrainingJobName=name)
    return found


def instance(
    root: Path, job: dict[str, Any], aws: dict[str, Any], host: str, port: int
) -> tuple[Path, list[str], dict[str, str]]:
    """Makes what SageMaker makes of a job on one instance; returns its /opt/ml, and the script's command and environment."""
    ml, code, tools = root / "ml", root / "code", root / "bin"
    for channel in job["InputDataConfig"]:
        key = channel["DataSource"]["S3DataSource"]["S3Uri"].removeprefix("s3://my-bucket/")
        folder = ml / "input" / "data" / channel["ChannelName"]
        folder.mkdir(parents=True)
        aws["s3"].download_file("my-bucket", key, str(folder / Path(key).name))
    (ml / RESOURCES).parent.mkdir(parents=True, exist_ok=True)
    (ml / RESOURCES).write_text(json.dumps({"current_host": host, "hosts": HOSTS, "network_interface_name": "lo"}))
    with tarfile.open(ml / "input/data/code/source.tar.gz") as archive:
        archive.extractall(code, filter="data")
    tools.mkdir()
    (tools / "python3").write_text(PYTHON.format(bash="/bin/bash", python=sys.executable, port=port))
    (tools / "python3").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    return ml, ["bash", str(code / "job.sh"), str(ml)], environment


def test_two_instances_train_one_run_and_the_first_delivers_it(tmp_path, aws):
    settings = ["train.tensorboard=local", "train.max_steps=2", "train.save_steps=2", "model.device_map=cpu"]
    job = sent_job(open_run("mine", profile="tiny", settings=settings, root=tmp_path / "runs"), aws)
    assert job["ResourceConfig"]["InstanceCount"] == 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = [instance(tmp_path / f"instance-{number}", job, aws, host, port) for number, host in enumerate(HOSTS)]
    started = [
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for _, command, environment in made
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in started] == [0, 0], "\n".join(text[-3000:] for text in said)
    first, second = (ml for ml, _, _ in made)
    run = Run((first / "checkpoints").rename(first / "mine"))  # a run's folder has its name
    assert run.status().state == "finished" and run.status().step == 2
    assert (run.config().train.share, run.config().train.micro_batch_size) == ("copies", 1)
    assert (first / "model" / "adapter_config.json").exists() and any((first / "output/tensorboard").iterdir())
    # Nothing that SageMaker would copy over the first one's.
    assert not any((second / "checkpoints").iterdir()) and not any((second / "model").iterdir())
    assert not (first / "output" / "failure").exists() and not (second / "output" / "failure").exists()
