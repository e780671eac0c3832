"""Commands are started for real where that is cheap; accelerate's own parser reads its configurations."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest
import yaml

from qlora_helpers.base.errors import UserError
from qlora_helpers.runs import launch
from qlora_helpers.runs.folder import Run


def test_train_command_names_a_run_in_runs_and_the_folder_of_any_other(tmp_path):
    command = launch.train_command(Run("runs/demo"), profile="tiny", settings=["train.max_steps=20", "data.seed=1"])
    options = ["--profile", "tiny", "--set", "train.max_steps=20", "--set", "data.seed=1"]
    assert command == [sys.executable, "-P", "-m", "qlora_helpers", "train", "demo", *options]
    for elsewhere in (tmp_path / "demo", tmp_path / "runs" / "demo"):
        assert launch.train_command(Run(elsewhere))[-1] == str(elsewhere)


def test_the_command_line_accepts_the_commands():
    from qlora_helpers.__main__ import parser

    command = launch.train_command(
        Run("runs/demo"), processes=2, profile="tiny", settings=["train.max_steps=2", "data.seed=1"]
    )
    read = parser().parse_args(command[command.index("qlora_helpers") + 1 :])
    assert (read.command, read.run, read.profile) == ("train", "demo", "tiny")
    assert read.settings == ["train.max_steps=2", "data.seed=1"] and read.processes == 2


def test_the_command_of_several_processes():
    several = launch.train_command(Run("runs/demo"), processes=4)
    assert several == [sys.executable, "-P", "-m", "qlora_helpers", "train", "demo", "--processes", "4"]
    with pytest.raises(UserError, match="at least 1; got 0"):
        launch.train_command(Run("runs/demo"), processes=0)


def test_notebook_command_shows_no_path_of_this_machine():
    command = launch.train_command(Run("runs/demo"), processes=2, settings=["model.name=a b"])
    line = launch.notebook_command(command)
    assert line == "python -P -m qlora_helpers train demo --set 'model.name=a b' --processes 2"
    assert os.path.dirname(sys.executable) not in line
    assert shlex.split(line)[1:] == command[1:]


def test_nothing_is_imported_from_the_working_directory(tmp_path, monkeypatch):
    """A module in the folder of a notebook would else run in the trainer: here two that every start imports."""
    for name in ("qlora_helpers", "argparse"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    command = [part for part in launch.train_command(Run("runs/demo")) if part not in ("train", "demo")]
    done = subprocess.run([*command, "--help"], env=launch.python_environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "train" in done.stdout, done.stderr
    assert not (tmp_path / "ran").exists()


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
    assert command[:4] == [sys.executable, "-P", "-m", "accelerate.commands.launch"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command[4:]))
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


def test_more_processes_than_gpus_are_refused(monkeypatch):
    from qlora_helpers.base.config import RunConfig

    monkeypatch.setattr(launch.locks, "visible_gpus", lambda: ("GPU-a", "GPU-b"))
    launch.refuse_missing_gpus(RunConfig(), 2)
    with pytest.raises(UserError, match="a GPU of its own; expected at most 2 processes; got 3"):
        launch.refuse_missing_gpus(RunConfig(), 3)
    launch.refuse_missing_gpus(RunConfig().with_settings({"model.device_map": "cpu"}), 3)
    monkeypatch.setattr(launch.locks, "visible_gpus", lambda: ())
    launch.refuse_missing_gpus(RunConfig(), 3)
