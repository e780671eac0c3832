"""Starts a run's training on the GPUs that are free, in the way that the plan finds fastest, or in the way that a person names.

However many GPUs there are, an optimizer step learns from as many sequences as the run's settings ask for. What was set for a
number of GPUs is kept in the run's `plan.json`, so that a resumed run may have another number. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.text import Say
from qlora_helpers.planning.choosing import Choice, choose, free_gpus, uneven
from qlora_helpers.planning.started import FOR_THE_PLAN, MICRO, PASSES, SHARE, setting_of
from qlora_helpers.runs import launch
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.launch import Started
from qlora_helpers.runs.nodes import Node, run_node
from qlora_helpers.runs.plan_file import Launched, add_to_plan, read_plan
from qlora_helpers.runs.ranks import run_ranks


def start(
    run: Run,
    *,
    gpus: int | None = None,
    share: str | None = None,
    processes: int | None = None,
    settings: Iterable[str] = (),
    shut_down_app: bool = False,
) -> Started:
    """Trains a run in processes of their own, on all free GPUs in the way that the plan finds fastest, and returns at once.

    The processes don't depend on the notebook: a restarted kernel, an interrupted cell or a closed browser does not affect them,
    and it does not matter whether this kernel has used CUDA. They start or resume the run as `train` does, print into its
    `log.txt`, and take requests. What this kernel holds on a GPU stays there: a GPU of which more than a quarter is in use is
    passed over where there is another.

    Args:
        run: an existing run.
        gpus: how many to use; None takes all that are free. Without a GPU, so many processes share the CPU cores.
        share: how they share the work: `copies`, `shards`, `copies of shards`, `spread`, `one` or `auto`; None takes `train.share`.
        processes: starts so many processes with the settings as they are, each of them with a step's sequences of its own.
        settings: changes to the settings, such as `["train.max_steps=20"]`.
        shut_down_app: whether to shut the SageMaker Studio app down when the training has ended, unless a person stopped it.

    Raises:
        RunError: as `runs.launch.start` raises it.
        UserError: there are fewer free GPUs, the way is not known or does not fit, or an optimizer step can't be shared evenly.
    """
    settings = list(settings)
    if processes is not None:
        return launch.start(run, processes=processes, settings=settings, shut_down_app=shut_down_app)
    chosen, changes, launched = prepare(run, settings=settings, gpus=gpus, share=share)
    return launch.start(
        run,
        processes=chosen.processes,
        settings=[*settings, *changes],
        shut_down_app=shut_down_app,
        gpus=chosen.gpus,
        launched=launched,
    )


def prepare(
    run: Run, *, settings: Iterable[str] = (), gpus: int | None = None, share: str | None = None, nodes: int = 1
) -> tuple[Choice, list[str], Launched | None]:
    """Decides how a run is started, and writes nothing.

    Args:
        run, settings, gpus, share: as for `start`.
        nodes: machines that train together, all like this one.

    Returns:
        The choice; the settings to change for it, as `--set` takes them; and what `plan.json` is to keep of it, where anything was
        set for it now or before.
    """
    config = run.config().with_settings(settings)
    before = read_plan(run).launched
    asked = _as_asked(config, before)
    chosen = choose(asked, gpus=gpus, share=share, nodes=nodes, ran_out=read_plan(run).out_of_memory)
    wanted = _differences(config, asked) | chosen.settings
    changes = [f"{name}={_text(value)}" for name, value in wanted.items() if setting_of(config, name) != value]
    if not chosen.settings and before is None:
        return chosen, changes, None
    held = len(chosen.gpus if chosen.gpus is not None else ()) * nodes
    old = {name: setting_of(asked, name) for name in chosen.settings}
    return chosen, changes, Launched(chosen.share, chosen.processes, held, chosen.settings, old, chosen.why)


def run_in_foreground(
    run: Run,
    *,
    settings: Iterable[str] = (),
    gpus: int | None = None,
    share: str | None = None,
    node: Node | None = None,
    options: Sequence[str] = (),
    say: Say = print,
) -> int | None:
    """Trains a run in several processes of this machine, which may be one of several, and returns when they have ended.

    Of several machines the first one decides and writes the run folder; the others read it, whether they share it or have a copy.

    Args:
        run, settings, gpus, share: as for `start`; the number of GPUs is that of each machine.
        node: this machine's place among several.
        options: of the command `train`, for each process, such as `["--quiet"]`.
        say: called with a line on how the work is shared.

    Returns:
        The exit code; None where one process is enough, which is then the caller's to train in: this process is shown its GPU.

    Raises:
        RunError, UserError: as for `start`.
    """
    nodes = node.nodes if node else 1
    command = [*launch.train_command(Run(run.folder.resolve())), *options]
    if node and node.rank:
        taken = free_gpus(run.config().with_settings(settings), gpus)
        os.environ.update(launch.shown_gpus(taken or None))
        return run_node(command, node, len(taken) or gpus or 1)
    chosen, changes, launched = prepare(run, settings=settings, gpus=gpus, share=share, nodes=nodes)
    if node and chosen.processes % nodes:
        raise uneven(run.config().with_settings(settings), chosen.processes, nodes)
    if launched is not None:
        add_to_plan(run, launched=asdict(launched))
    run.change_config(run.config().with_settings([*settings, *changes]))
    if chosen.why:
        say(chosen.why)
    os.environ.update(launch.shown_gpus(chosen.gpus))
    if node:
        say(f"Waiting for {nodes - 1} other machine{'s' * (nodes > 2)} at {node.address}, port {node.port}.")
        return run_node(command, node, chosen.processes // nodes)
    return run_ranks(command, chosen.processes) if chosen.processes > 1 else None


def _as_asked(config: RunConfig, before: Launched | None) -> RunConfig:
    """Returns the settings as a person asked for them: what an earlier start has set, and nobody has changed since, is undone."""
    if before is None:
        return config
    known = {name: value for name, value in before.settings.items() if name in before.before}
    ours = {name: before.before[name] for name, value in known.items() if setting_of(config, name) == value}
    if ours.keys() & {MICRO, PASSES} != known.keys() & {
        MICRO,
        PASSES,
    }:  # one of the two was changed: the step is a new one
        ours = {name: value for name, value in ours.items() if name not in (MICRO, PASSES)}
    return config.with_settings(ours)


def _differences(config: RunConfig, other: RunConfig) -> dict[str, Any]:
    names = (SHARE, MICRO, PASSES, *FOR_THE_PLAN)
    return {name: setting_of(other, name) for name in names if setting_of(other, name) != setting_of(config, name)}


def _text(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
