"""Commands are started for real where that is cheap: torchrun with two gloo processes, accelerate's own parser."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap

import pytest
import yaml

from qlora_helpers.base.errors import UserError
from qlora_helpers.runs import launch
from qlora_helpers.runs.folder import Run


def test_train_command_names_a_run_in_runs_and_the_folder_of_any_other(tmp_path):
    command = launch.train_command(Run("runs/demo"), profile="tiny", settings=["train.max_steps=20", "data.seed=1"])
    options = ["--profile", "tiny", "--set", "train.max_steps=20", "--set", "data.seed=1"]
    assert command == [sys.executable, "-m", "qlora_helpers", "train", "demo", *options]
    for elsewhere in (tmp_path / "demo", tmp_path / "runs" / "demo"):
        assert launch.train_command(Run(elsewhere))[-1] == str(elsewhere)


def test_the_command_line_accepts_the_commands():
    from qlora_helpers.__main__ import parser

    command = launch.torchrun_command(
        Run("runs/demo"), 2, profile="tiny", settings=["train.max_steps=2", "data.seed=1"]
    )
    read = parser().parse_args(command[command.index("qlora_helpers") + 1 :])
    assert (read.command, read.run, read.profile) == ("train", "demo", "tiny")
    assert read.settings == ["train.max_steps=2", "data.seed=1"]


def test_torchrun_command():
    assert launch.torchrun_command(Run("runs/demo"), 4) == [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=4",
        "-m",
        "qlora_helpers",
        "train",
        "demo",
    ]
    with pytest.raises(UserError, match="at least 1; got 0"):
        launch.torchrun_command(Run("runs/demo"), 0)


def test_notebook_command_shows_no_path_of_this_machine():
    line = launch.notebook_command(launch.torchrun_command(Run("runs/demo"), 2, settings=["model.name=a b"]))
    assert line.startswith("python -m torch.distributed.run --standalone")
    assert line.endswith("-m qlora_helpers train demo --set 'model.name=a b'")
    assert os.path.dirname(sys.executable) not in line
    assert shlex.split(line)[1:] == launch.torchrun_command(Run("runs/demo"), 2, settings=["model.name=a b"])[1:]


STAND_IN = """
import os, sys
import torch.distributed as dist

dist.init_process_group("gloo")
import torch
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
facts = [os.environ[name] for name in ("MASTER_ADDR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")]
line = " ".join(map(str, ["rank", dist.get_rank(), "sum", total.item(), *facts, sys.argv[1:]]))
os.write(1, f"{line}\\n".encode())  # one write: the processes share the pipe
dist.destroy_process_group()
sys.exit(3 if "train.max_steps=0" in sys.argv else 0)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """In its working directory, `python -m qlora_helpers` is a small program that adds up its ranks."""
    package = tmp_path / "qlora_helpers"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "cpu_cores", lambda: 6)


def test_two_processes_work_together_over_the_loopback_address(stand_in):
    lines = []
    done = launch.start_torchrun(Run("runs/demo"), 2, settings=["train.max_steps=1"], say=lines.append)
    assert done.returncode == 0, done.stdout
    said = sorted(re.findall(r"rank \d sum .*?\]", done.stdout))
    arguments = ["train", "demo", "--set", "train.max_steps=1"]
    assert said == [f"rank {rank} sum 3.0 127.0.0.1 3  {arguments}" for rank in (0, 1)]
    assert done.stdout == "\n".join(lines) + "\n"


def test_a_failing_process_is_reported_by_the_exit_code(stand_in):
    done = launch.start_torchrun(Run("runs/demo"), 1, settings=["train.max_steps=0"], say=lambda line: None)
    assert done.returncode != 0
    assert "exitcode  : 3" in done.stdout


def test_an_interrupted_cell_ends_the_processes():
    pids = []

    def interrupted(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        launch._run_and_print([sys.executable, "-c", code], dict(os.environ), interrupted)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_a_thread_count_that_the_person_set_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert launch._cpu_environment(2)["OMP_NUM_THREADS"] == "5"


def as_accelerate_reads_it(tmp_path, text: str) -> dict[str, str]:
    """The environment that `accelerate launch` would give each process."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = tmp_path / "accelerate.yaml"
    path.write_text(text)
    command = launch.accelerate_command(Run("runs/demo"), path)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command[3:]))
    assert (args.module, args.training_script, args.training_script_args) == (True, "qlora_helpers", ["train", "demo"])
    assert args.num_processes == 4
    return prepare_multi_gpu_env(args)


def test_accelerate_reads_the_configuration_for_several_gpus(tmp_path):
    text = launch.accelerate_config(4)
    assert yaml.safe_load(text)["distributed_type"] == "MULTI_GPU"
    environment = as_accelerate_reads_it(tmp_path, text)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert "ACCELERATE_USE_FSDP" not in environment


def test_accelerate_reads_the_configuration_as_fsdp2(tmp_path, monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin

    environment = as_accelerate_reads_it(tmp_path, launch.accelerate_config(4, fsdp=True))
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    for name, value in environment.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.activation_checkpointing is False
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.cpu_offload or not getattr(plugin.cpu_offload, "offload_params", False)


def test_every_fsdp_key_is_one_that_accelerate_knows(tmp_path):
    from accelerate.commands.launch import launch_command_parser

    known = vars(launch_command_parser().parse_args(["-m", "x"]))
    keys = yaml.safe_load(launch.accelerate_config(2, fsdp=True))["fsdp_config"]
    assert len(keys) == 7
    assert not set(keys) - set(known)


def test_accelerate_needs_two_gpus():
    with pytest.raises(UserError, match="at least 2; got 1. On one GPU run"):
        launch.accelerate_config(1)


def test_importing_launch_imports_no_torch():
    code = "import sys; from qlora_helpers.runs import launch; "
    code += "from qlora_helpers.sagemaker import endpoint, resources, training_job; print(sorted("
    code += "{'torch', 'accelerate', 'boto3', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_more_processes_than_cores_get_a_thread_each(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "cpu_cores", lambda: 2)
    assert launch._cpu_environment(4)["OMP_NUM_THREADS"] == "1"
    assert launch._cpu_environment(1)["OMP_NUM_THREADS"] == "2"
