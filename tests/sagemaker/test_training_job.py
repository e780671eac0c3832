"""The job's request is checked by botocore's Stubber; its script runs here in bash, with a folder for /opt/ml."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import boto3
import pytest
from botocore.stub import ANY, Stubber

import qlora_helpers
from qlora_helpers.base.config import config_from_dict
from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.runs.folder import Run
from qlora_helpers.sagemaker import training_job
from qlora_helpers.sagemaker.source_archive import source_archive

ROLE = "arn:aws:iam::123456789012:role/Studio"


def stubbed(service: str):
    client = boto3.client(
        service, region_name="us-east-1", aws_access_key_id="testing", aws_secret_access_key="testing"
    )
    return client, Stubber(client)


@pytest.fixture
def run(tmp_path) -> Run:
    run = Run(tmp_path / "runs" / "my_run.1")
    run.save_config(profile_config("falcon-40b"))
    return run


REQUEST = {
    "TrainingJobName": "job-1",
    "RoleArn": ROLE,
    "AlgorithmSpecification": {
        "TrainingImage": "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch:2.13-cu133-amzn2023-sagemaker",
        "TrainingInputMode": "File",
        "ContainerEntrypoint": ["/bin/bash", "-c"],
        "ContainerArguments": [
            "mkdir -p /tmp/code && python3 -m tarfile -e /opt/ml/input/data/code/source.tar.gz /tmp/code "
            "&& exec bash /tmp/code/job.sh"
        ],
    },
    "InputDataConfig": [
        {
            "ChannelName": "code",
            "DataSource": {
                "S3DataSource": {
                    "S3DataType": "S3Prefix",
                    "S3Uri": "s3://my-bucket/qlora/jobs/job-1/source.tar.gz",
                    "S3DataDistributionType": "FullyReplicated",
                }
            },
        }
    ],
    "OutputDataConfig": {"S3OutputPath": "s3://my-bucket/qlora/jobs"},
    "CheckpointConfig": {"S3Uri": "s3://my-bucket/qlora/runs/demo", "LocalPath": "/opt/ml/checkpoints"},
    "TensorBoardOutputConfig": {
        "S3OutputPath": "s3://my-bucket/qlora/tensorboard/demo",
        "LocalPath": "/opt/ml/output/tensorboard",
    },
    "ResourceConfig": {"InstanceType": "ml.g5.12xlarge", "InstanceCount": 1, "VolumeSizeInGB": 200},
    "StoppingCondition": {"MaxRuntimeInSeconds": 5400},
    "Environment": {"HF_HOME": "/tmp/huggingface", "PYTHONUNBUFFERED": "1", "HF_TOKEN": "secret"},
}


def test_the_complete_request():
    request = training_job.training_job_request(
        "job-1",
        run_name="demo",
        role=ROLE,
        instance_type="ml.g5.12xlarge",
        s3_uri="s3://my-bucket/qlora/",
        image_uri=training_job.training_image_uri("us-east-1"),
        channels={"code": "s3://my-bucket/qlora/jobs/job-1/source.tar.gz"},
        volume_gib=200,
        max_hours=1.5,
        environment={"HF_TOKEN": "secret"},
    )
    assert request == REQUEST
    # SageMaker's limit; botocore does not check it.
    assert all(len(argument) <= 256 for argument in request["AlgorithmSpecification"]["ContainerArguments"])
    client, stub = stubbed("sagemaker")
    stub.add_response("create_training_job", {"TrainingJobArn": "arn:aws:sagemaker:us-east-1:1:x/job-1"}, REQUEST)
    with stub:
        client.create_training_job(**request)


def start(run: Run, objects: list[str], **more):
    """Starts a job with both clients stubbed; returns its name and the request that SageMaker received."""
    client, stub = stubbed("sagemaker")
    s3_client, s3_stub = stubbed("s3")
    seen = {}
    client.meta.events.register(
        "provide-client-params.sagemaker.CreateTrainingJob", lambda params, **_: seen.update(params)
    )
    for _ in objects:
        s3_stub.add_response(
            "put_object",
            {},
            {
                "Bucket": "my-bucket",
                "Key": ANY,
                "Body": ANY,
                "ChecksumAlgorithm": ANY,
                "ExpectedBucketOwner": "123456789012",
            },
        )
    stub.add_response("create_training_job", {"TrainingJobArn": "arn:aws:sagemaker:us-east-1:1:x/job-1"})
    with stub, s3_stub:
        name = training_job.training_job(
            run,
            role=ROLE,
            instance_type="ml.g5.12xlarge",
            s3_uri="s3://my-bucket/qlora",
            client=client,
            s3_client=s3_client,
            **more,
        )
    stub.assert_no_pending_responses()
    s3_stub.assert_no_pending_responses()
    found = {
        channel["ChannelName"]: channel["DataSource"]["S3DataSource"]["S3Uri"] for channel in seen["InputDataConfig"]
    }
    assert found == {key: f"s3://my-bucket/qlora/jobs/{name}/{file}" for key, file in zip(found, objects, strict=True)}
    return name, seen


def test_a_job_uploads_code_and_settings_and_starts(run):
    name, request = start(run, ["source.tar.gz", "config.json"], environment={"HF_TOKEN": "secret"}, max_hours=2)
    assert name.startswith("my-run-1-2")
    assert request["CheckpointConfig"]["S3Uri"] == "s3://my-bucket/qlora/runs/my_run.1"
    assert request["Tags"] == [
        {"Key": "qlora_helpers:made-by", "Value": "d-abc123/lab"},
        {"Key": "qlora_helpers:run", "Value": "my_run.1"},
    ]
    assert request["AlgorithmSpecification"]["TrainingImage"].endswith("/pytorch:2.13-cu133-amzn2023-sagemaker")
    assert request["Environment"]["HF_TOKEN"] == "secret"
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200}


def test_a_job_name_fits_sagemaker_whatever_the_run_is_called():
    for run_name in ("x" * 200, "my_run.1", "_a b_", "-" * 39 + "ab"):
        name = training_job._new_job_name(run_name)
        assert re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", name), name


def test_a_data_file_is_uploaded_and_the_settings_point_to_it(run, tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text("{}")
    run.save_config(run.config().with_settings({"data.source": str(data)}))
    _, request = start(run, ["source.tar.gz", "config.json", "mine.jsonl"])
    assert [channel["ChannelName"] for channel in request["InputDataConfig"]] == ["code", "config", "dialogues"]
    config, file = training_job._config_for_job(run.config())
    assert (config.data.source, file) == ("/opt/ml/input/data/dialogues/mine.jsonl", data)
    for several in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(UserError, match="takes one data file"):
            training_job._config_for_job(run.config().with_settings({"data.source": str(several)}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"role": "Studio"}, "not an IAM role"),
        ({"s3_uri": "s3://my-bucket"}, "not an address in S3"),
        ({"s3_uri": "my-bucket/x"}, "not an address in S3"),
        ({"processes": 0}, "at least 1; got 0"),
        ({"instance_count": 0}, "a job needs instances; expected at least 1; got 0"),
    ],
)
def test_wrong_arguments_reach_no_network(run, change, expected):
    client, stub = stubbed("sagemaker")
    s3_client, s3_stub = stubbed("s3")
    arguments = {"role": ROLE, "instance_type": "ml.g5.xlarge", "s3_uri": "s3://my-bucket/q"} | change
    with stub, s3_stub, pytest.raises(UserError, match=expected):
        training_job.training_job(run, client=client, s3_client=s3_client, **arguments)


@pytest.mark.parametrize("model", ["/models/falcon", "./model", "model.gguf"])
def test_a_model_that_the_job_cannot_reach_is_refused(run, model):
    run.save_config(run.config().with_settings({"model.name": model}))
    with pytest.raises(UserError, match="can't reach that model"):
        training_job.training_job(run, role=ROLE, instance_type="ml.g5.xlarge", s3_uri="s3://my-bucket/q")


def test_a_run_without_settings_is_refused(tmp_path):
    with pytest.raises(RunError, match="does not exist yet"):
        training_job.training_job(
            Run(tmp_path / "runs" / "none"), role=ROLE, instance_type="ml.g5.xlarge", s3_uri="s3://my-bucket/q"
        )


def test_a_quota_of_zero_is_reported(run):
    client, stub = stubbed("sagemaker")
    s3_client, s3_stub = stubbed("s3")
    for _ in range(2):
        s3_stub.add_response("put_object", {})
    stub.add_client_error(
        "create_training_job", "ResourceLimitExceeded", "quota for ml.g5.12xlarge is 0 Instances.", 400
    )
    with stub, s3_stub, pytest.raises(UserError, match="did not start the training job .*quota for ml.g5.12xlarge"):
        training_job.training_job(
            run,
            role=ROLE,
            instance_type="ml.g5.12xlarge",
            s3_uri="s3://my-bucket/q",
            client=client,
            s3_client=s3_client,
        )


# The job's script

PYTHON = """#!{python}
import json, os, sys
from pathlib import Path

with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
if "qlora_helpers" in sys.argv:
    run = Path("runs", sys.argv[4])
    assert json.loads((run / "config.json").read_text())["profile"] == "tiny"
    assert Path("qlora_helpers/base/config/run.py").exists()
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{{}}")
    (run / "events").mkdir()
    (run / "events" / "events.1").write_text("curve")
    print("expected this; got that. Do so.")
    if os.environ.get("SAVES_WHEN_STOPPED"):
        import signal, time
        def save(*args):
            (run / "saved").touch()
            sys.exit(143)
        signal.signal(signal.SIGTERM, save)
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
    sys.exit(int(os.environ.get("CODE", "0")))
"""


def run_job(tmp_path: Path, processes: int | None = 1, **environment: str) -> tuple[int, Path, list[list[str]]]:
    """Unpacks a job's archive and runs its script, with a stand-in for python3 that records its calls."""
    code, ml, tools = tmp_path / "code", tmp_path / "ml", tmp_path / "bin"
    archive = source_archive(tmp_path / "source.tar.gz", "demo", processes=processes)
    with tarfile.open(archive) as unpacked:
        unpacked.extractall(code, filter="data")
    (ml / "input/data/config").mkdir(parents=True)
    (ml / "input/data/config/config.json").write_text(json.dumps(profile_config("tiny").to_dict()))
    tools.mkdir()
    (tools / "python3").write_text(PYTHON.format(python=sys.executable))
    (tools / "python3").chmod(0o755)
    calls = tmp_path / "calls"
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls)} | environment
    done = subprocess.run(["bash", str(code / "job.sh"), str(ml)], env=environment, capture_output=True, text=True)
    return done.returncode, ml, [json.loads(line) for line in calls.read_text().splitlines()]


def test_the_script_installs_trains_and_delivers_the_adapter(tmp_path):
    code, ml, calls = run_job(tmp_path)
    assert code == 0
    assert calls[0][:3] == ["-m", "pip", "install"]
    assert calls[0][-2:] == ["-r", "requirements.txt"]
    assert calls[1:] == [
        ["-m", "qlora_helpers", "train", "demo", "--processes", "1"]
    ]  # else the plan would take several
    assert (ml / "model" / "adapter_config.json").exists()
    assert (ml / "output" / "tensorboard" / "events.1").read_text() == "curve"
    # The run folder is the folder that SageMaker keeps in S3.
    assert sorted(path.name for path in (ml / "checkpoints").iterdir()) == ["adapter", "config.json", "events"]
    assert not (ml / "output" / "failure").exists()


def test_the_script_starts_several_processes(tmp_path):
    _, _, calls = run_job(tmp_path, processes=4)
    assert calls[1] == ["-m", "qlora_helpers", "train", "demo", "--processes", "4"]


def test_the_script_leaves_the_way_to_use_the_gpus_to_the_plan(tmp_path):
    _, _, calls = run_job(tmp_path, processes=None)
    assert calls[1] == ["-m", "qlora_helpers", "launch", "demo"]


def test_a_failed_job_reports_its_last_lines(tmp_path):
    code, ml, _ = run_job(tmp_path, CODE="2")
    assert code == 1
    assert (ml / "output" / "failure").read_text() == "expected this; got that. Do so.\n"
    assert not (ml / "model" / "adapter_config.json").exists()


def test_a_job_that_is_stopped_lets_its_trainer_save(tmp_path):
    """A spot interruption sends SIGTERM to the script, which must pass it on to the trainer."""
    code, ml, _ = run_job(tmp_path, SAVES_WHEN_STOPPED="1")
    assert code == 143
    assert (ml / "checkpoints" / "saved").exists()
    assert (ml / "model" / "adapter_config.json").exists()
    assert not (ml / "output" / "failure").exists()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The folder that a job unpacks its archive into."""
    folder = tmp_path_factory.mktemp("archive")
    archive = source_archive(folder / "source.tar.gz", "demo")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "code", filter="data")
    return folder / "code"


def test_the_archive_holds_the_whole_package_and_nothing_else(unpacked):
    package = Path(qlora_helpers.__file__).parent
    shipped = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert shipped == {str(path.relative_to(package.parent)) for path in files} | {"job.sh", "requirements.txt"}
    rooms = {path.name for path in package.iterdir() if any(path.glob("*.py"))}
    assert {path.name for path in (unpacked / "qlora_helpers").iterdir() if path.is_dir()} == rooms >= {"base", "views"}


IMPORT_ALL = """
import importlib, pkgutil, sys
from pathlib import Path
import qlora_helpers
here = Path.cwd()
assert Path(qlora_helpers.__file__).is_relative_to(here), qlora_helpers.__file__
rooms = [module.name for module in pkgutil.iter_modules(qlora_helpers.__path__, "qlora_helpers.") if module.ispkg]
for name in rooms:
    importlib.import_module(name)
from qlora_helpers import workflow
from qlora_helpers.base.config import DataConfig
from qlora_helpers.data.sources import read_corpus
from qlora_helpers.views import report
print(len(rooms), len(read_corpus(DataConfig()).train), Path(report.__file__).with_name("report.html").is_file())
"""


def test_the_unpacked_archive_is_imported_with_its_packaged_files(unpacked):
    """In a process that sees only the archive: every room, the run's entry point, the corpus and the report's page."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=unpacked, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rooms, rows, has_page = done.stdout.split()
    assert int(rooms) >= 10 and int(rows) > 100 and has_page == "True"


def test_a_package_without_its_repository_is_refused(tmp_path, monkeypatch):
    (tmp_path / "qlora_helpers").mkdir()
    monkeypatch.setattr(qlora_helpers, "__file__", str(tmp_path / "qlora_helpers" / "__init__.py"))
    with pytest.raises(UserError, match="requirements.txt is not beside the package"):
        source_archive(tmp_path / "source.tar.gz", "demo")


def test_settings_are_unchanged_by_json(run):
    config, _ = training_job._config_for_job(run.config())
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == run.config()
