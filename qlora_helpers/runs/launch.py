"""Trains a run in another process, in several processes (DDP) or on several GPUs with accelerate.

Everything here makes or starts the command `python -m qlora_helpers train RUN` and knows nothing of what that command does, of
models or of AWS (SageMaker training jobs are in `sagemaker.training_job`).
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.python import python_command, python_environment
from qlora_helpers.machine.price import needed_price
from qlora_helpers.machine.telemetry import cpu_cores
from qlora_helpers.runs import locks
from qlora_helpers.runs.buckets import SETTING, refuse_unconfirmed
from qlora_helpers.runs.budget import refuse_spent_budget
from qlora_helpers.runs.detached import start_session
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.guard import refuse_links
from qlora_helpers.runs.plan_file import Launched, add_to_plan
from qlora_helpers.runs.ranks import check_processes
from qlora_helpers.runs.trackers import refuse_missing


def train_command(
    run: Run, *, processes: int | None = None, profile: str | None = None, settings: Iterable[str] = ()
) -> list[str]:
    """Returns the command that starts or resumes a run.

    Args:
        run: the run.
        processes: with more than one, each has a share of the rows; with GPUs, one for each GPU. None leaves it to the plan.
        profile: `tiny`, `demo` or `falcon-40b`; None keeps the run's own settings.
        settings: changes to the settings, such as `["train.max_steps=20"]`.

    Raises:
        UserError: fewer than one process.
    """
    if processes is None:
        return python_command(*_train_arguments(run, profile, settings))
    check_processes(processes)
    return python_command(*_train_arguments(run, profile, settings), "--processes", str(processes))


def refuse_missing_gpus(config: RunConfig, processes: int) -> None:
    """Refuses more processes than there are GPUs, where there are any and the model is not on the CPU.

    Raises:
        UserError: there are fewer GPUs.
    """
    gpus = 0 if config.model.device_map == "cpu" else len(locks.visible_gpus())
    if gpus and processes > gpus:
        raise UserError(
            "each process needs a GPU of its own",
            expected=f"at most {gpus} processes",
            got=str(processes),
            next_step="Start fewer, or show them more GPUs (CUDA_VISIBLE_DEVICES).",
        )


@dataclass(frozen=True)
class Started:
    """A run that trains in a process of its own."""

    run: Run
    pid: int
    how: str = ""

    def __repr__(self) -> str:
        line = f"{self.run.name} trains in process {self.pid}; its log: {self.run.name}/{self.run.log_path.name}"
        return f"{line}\n{self.how}" if self.how else line


def start(
    run: Run,
    *,
    processes: int = 1,
    settings: Iterable[str] = (),
    shut_down_app: bool = False,
    gpus: Sequence[str] | None = None,
    launched: Launched | None = None,
) -> Started:
    """Trains a run in a process of its own and returns at once; `planning.starting.start` also chooses how to use the GPUs.

    The process does not depend on the notebook: a restarted kernel, an interrupted cell or a closed browser does not affect it.
    It starts or resumes as `workflow.train` does, prints into the run's `log.txt`, and takes requests. Several processes without
    a GPU share the CPU cores. What this kernel holds on a GPU stays there: restart it first if the model does not fit twice.

    Args:
        run: an existing run.
        processes: with more than one, each has a share of the rows (DDP); with GPUs, one process for each GPU.
        settings: as for `train_command`.
        shut_down_app: whether to shut the SageMaker Studio app down when the training has ended, unless a person stopped it.
        gpus: the unique ids of those that it may use; None takes all that this process may use.
        launched: how the GPUs share the work, for the run's `plan.json`.

    Raises:
        RunError: the run does not exist or is already being trained, its budget is used up, another run uses the GPU, or a
            setting would change that is fixed once a run has trained.
        UserError: the budget is in dollars and the price is unknown, or there is fewer than one process.
    """
    refuse_links(run.folder)
    settings = list(settings)
    config = run.config().with_settings(settings)
    if not any(setting.startswith(f"{SETTING}=") for setting in settings):
        refuse_unconfirmed(config)
    if run.has_trained():
        run.refuse_differences(run.config().to_dict(), config.to_dict())
    status = run.status()
    if status.is_live or locks.is_locked(run):
        where = f"in process {status.pid} on {status.host}" if status.is_live else "in another process"
        raise RunError(f"{run.name!r} is already being trained, {where}", next_step="Watch it with watch(run).")
    refuse_spent_budget(config.train, status)
    refuse_missing(config.train)
    needed_price(config.train)
    refuse_missing_gpus(config, processes)
    if config.model.device_map != "cpu":
        locks.refuse_busy_gpus(locks.visible_gpus() if gpus is None else gpus)
    absolute = Run(run.folder.resolve())  # the process may look for runs in another folder
    command = train_command(absolute, processes=processes, settings=settings)
    command += ["--shut-down-app"] if shut_down_app else []
    if launched is not None:
        add_to_plan(run, launched=dataclasses.asdict(launched))
    return Started(run, _start_detached(run, command, processes, gpus), launched.why if launched else "")


def shown_gpus(gpus: Sequence[str] | None) -> dict[str, str]:
    """Returns the variable that shows a process some GPUs alone; none where it may use all that this process may use.

    Args:
        gpus: their unique ids, as `locks.visible_gpus` gives them.
    """
    visible = locks.visible_gpus()
    if gpus is None or tuple(gpus) == visible:
        return {}
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [each.strip() for each in named.split(",")] if named else [str(index) for index in range(len(visible))]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[visible.index(gpu)] for gpu in gpus)}


def _start_detached(run: Run, command: list[str], processes: int, gpus: Sequence[str] | None = None) -> int:
    on_cpu = processes > 1 and not locks.visible_gpus()
    environment = _cpu_environment(processes) if on_cpu else python_environment()
    environment |= shown_gpus(gpus)
    return start_session(run, command, environment)


def rehearse(
    run: Run,
    processes: int = 2,
    *,
    profile: str | None = None,
    settings: Iterable[str] = (),
    say: Callable[[str], None] = print,
) -> subprocess.CompletedProcess[str]:
    """Trains a run in several processes on this machine's CPU (gloo; GPUs are hidden) and returns when they have ended.

    This rehearses training on several GPUs, with the same command and the same code. The processes share the cores.

    Args:
        run: the run.
        processes: how many processes.
        profile, settings: as for `train_command`.
        say: called with each line that they print.

    Returns:
        The command, its exit code (`returncode`) and everything it printed (`stdout`).
    """
    command = train_command(run, processes=processes, profile=profile, settings=settings)
    return _run_and_print(command, _cpu_environment(processes), say)


def notebook_command(command: list[str]) -> str:
    """Returns a command as a line for a terminal or a `!` cell, with `python` for this interpreter's path."""
    return shlex.join(["python" if part == sys.executable else part for part in command])


def accelerate_command(
    run: Run, config_path: Path, *, profile: str | None = None, settings: Iterable[str] = ()
) -> list[str]:
    """Returns the command that trains a run with an accelerate configuration.

    Its processes meet at a port without a password: use it only on a machine without other users. `train_command` opens none.

    Args:
        run: the run.
        config_path: a file that holds the text of `accelerate_config`.
        profile, settings: as for `train_command`.
    """
    launcher = ["accelerate.commands.launch", "--config_file", str(config_path)]
    return python_command(*launcher, "-m", *_train_arguments(run, profile, settings))


def accelerate_config(gpus: int, *, fsdp: bool = False) -> str:
    """Returns the text of an accelerate configuration for several GPUs of one machine.

    Args:
        gpus: how many GPUs, at least 2.
        fsdp: False gives each GPU the whole 4-bit model and a share of the rows (DDP, the fastest where the model fits one
            GPU). True also shards the model (FSDP2), for models that don't fit; such a model must be loaded with
            `bnb_4bit_quant_storage=torch.bfloat16`, since FSDP only shards floating-point storage
            (https://huggingface.co/docs/bitsandbytes/main/fsdp_qlora).

    Returns:
        YAML with a comment on each choice.

    Raises:
        UserError: fewer than two GPUs.
    """
    if gpus < 2:
        raise UserError(
            "accelerate distributes work over several GPUs",
            expected="at least 2",
            got=str(gpus),
            next_step="On one GPU run `python -m qlora_helpers train RUN`.",
        )
    return (_COMMON_YAML + (_FSDP_YAML if fsdp else _DDP_YAML)).format(gpus=gpus)


_COMMON_YAML = """\
# accelerate's processes meet at a port without a password, which other users of this machine reach: only where you are alone.
compute_environment: LOCAL_MACHINE
num_machines: 1
machine_rank: 0
num_processes: {gpus}            # one for each GPU
mixed_precision: 'no'        # the run's own setting decides
main_training_function: main
use_cpu: false
"""

_DDP_YAML = """\
distributed_type: MULTI_GPU  # each GPU holds the whole 4-bit model and trains on its share of the rows
"""

_FSDP_YAML = """\
distributed_type: FSDP       # each GPU holds a share of every layer and gathers a layer when it needs it
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP  # one decoder layer at a time
  fsdp_reshard_after_forward: true               # free a layer's memory between forward and backward pass
  fsdp_offload_params: false                     # true keeps the shares in CPU memory: slower, smaller
  fsdp_state_dict_type: FULL_STATE_DICT          # adapters are small: save them whole
  fsdp_cpu_ram_efficient_loading: false          # does not work with 4-bit weights
  fsdp_activation_checkpointing: false           # train.activation_checkpointing does it
"""


def _train_arguments(run: Run, profile: str | None, settings: Iterable[str]) -> list[str]:
    # The command line takes the run's name if it is in runs/, else the path of its folder.
    name = run.name if run.folder.parent == Path("runs") else str(run.folder)
    options = ["--profile", profile] if profile else []
    for setting in settings:
        options += ["--set", setting]
    return ["qlora_helpers", "train", name, *options]


def _cpu_environment(processes: int) -> dict[str, str]:
    threads = max(1, cpu_cores() // processes)
    # a value that the person has set is kept
    return (
        {"OMP_NUM_THREADS": str(threads)} | python_environment() | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    )


def _run_and_print(
    command: list[str], environment: dict[str, str], say: Callable[[str], None]
) -> subprocess.CompletedProcess[str]:
    """Runs a command and passes on its output line by line, since a child process can't print into a notebook's cell."""
    lines = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            for line in process.stdout or ():
                lines.append(line)
                say(line.rstrip("\n"))
        except BaseException:
            process.terminate()  # it passes the signal on to its processes
            raise
    return subprocess.CompletedProcess(command, process.returncode, "".join(lines))
