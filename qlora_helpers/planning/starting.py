"""Starts a run's training on the GPUs that are free, in the way that the plan finds fastest, or in the way that a person names.

However many GPUs there are, an optimizer step learns from as many sequences as the run's settings ask for. What was set for a
number of GPUs is kept in the run's `plan.json`, so that a resumed run may have another number. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.text import Say
from qlora_helpers.machine import telemetry
from qlora_helpers.machine.hardware import Hardware
from qlora_helpers.planning.candidate import Candidate
from qlora_helpers.planning.layout import COPIES, MEANING, ONE, SHARDS, SPREAD, WAYS, copies_sharing
from qlora_helpers.planning.memory import usable_with_margin
from qlora_helpers.planning.plan import Plan
from qlora_helpers.planning.run_plan import plan_run, this_machine
from qlora_helpers.planning.step_settings import sequences_per_step
from qlora_helpers.runs import launch, locks
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.launch import Started
from qlora_helpers.runs.nodes import Node, run_node
from qlora_helpers.runs.plan_file import Launched, add_to_plan, read_plan
from qlora_helpers.runs.ranks import run_ranks

AUTO = "auto"
SHARE, MICRO, PASSES = "train.share", "train.micro_batch_size", "train.gradient_accumulation_steps"
FOR_THE_PLAN = {
    "train.activation_checkpointing": (True,),
    "train.checkpointed_layers": (None,),
    "train.compile": ("auto",),
    "train.offload_embeddings": (False,),
}
"""Settings that the plan decides where they have one of these values, which leave it open."""
IN_USE = 0.25  # of a GPU's memory: one of which other programs hold more is taken only where it is asked for


@dataclass(frozen=True)
class Choice:
    """How a run is started.

    Attributes:
        gpus: the unique ids of those that are used; empty on a CPU, None for all that this process may use.
        share: the way in which they share the work.
        processes: how many.
        settings: what is set for that, by the settings' full names.
        why: why, for a reader.
    """

    gpus: tuple[str, ...] | None
    share: str
    processes: int
    settings: dict[str, Any]
    why: str = ""


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
    chosen = choose(asked, gpus=gpus, share=share, nodes=nodes)
    wanted = _differences(config, asked) | chosen.settings
    changes = [f"{name}={_text(value)}" for name, value in wanted.items() if _get(config, name) != value]
    if not chosen.settings and before is None:
        return chosen, changes, None
    held = len(chosen.gpus if chosen.gpus is not None else ()) * nodes
    old = {name: _get(asked, name) for name in chosen.settings}
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
        raise _uneven(run.config().with_settings(settings), chosen.processes, nodes)
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


def choose(config: RunConfig, *, gpus: int | None = None, share: str | None = None, nodes: int = 1) -> Choice:
    """Decides how a run is started on this machine, and starts nothing.

    Args:
        config: its settings, as a person asked for them.
        gpus, share: as for `start`.
        nodes: machines that train together, all like this one.

    Raises:
        RunError, UserError: as for `start`.
    """
    share = share or config.train.share
    if share not in (AUTO, *WAYS):
        known = ", ".join((AUTO, *WAYS))
        raise UserError("this way to use several GPUs is not known", expected=known, got=share)
    if gpus is not None and gpus < 1:
        raise UserError("a training needs at least one GPU or process", expected="gpus=1 or more", got=str(gpus))
    taken = free_gpus(config, gpus)
    if not taken:
        return _on_cpu(config, (gpus or 1) * nodes, share)
    count = len(taken) * nodes
    if count == 1 or share == ONE:
        return Choice(taken[:1], ONE, 1, _alone(config, share))
    plan = _planned(config, share, len(taken), nodes)
    if isinstance(plan, str):
        if share == AUTO and nodes == 1:
            return Choice(taken, SPREAD, 1, {}, f"The layers are spread over {count} GPUs: {plan}.")
        return _by_settings(config, count, COPIES if share == AUTO else share, taken, plan)
    assert plan.choice is not None
    used, left = divmod(plan.choice.layout.gpus, nodes)
    if left:
        return _by_settings(config, count, plan.choice.share, taken, "")
    return Choice(taken[:used], plan.choice.share, plan.choice.processes, _settings(config, plan.choice), _why(plan))


def _alone(config: RunConfig, share: str) -> dict[str, Any]:
    """Returns what to set for a single GPU: only where settings or person name another way."""
    return {} if config.train.share in (AUTO, ONE) and share in (AUTO, ONE) else {SHARE: ONE}


def free_gpus(config: RunConfig, wanted: int | None) -> tuple[str, ...]:
    """Returns the GPUs to use: those that no trainer uses, the emptiest first where not all are wanted; none on a CPU.

    Raises:
        RunError: others use all of them.
        UserError: there are fewer than are wanted.
    """
    visible = () if config.model.device_map == "cpu" else locks.visible_gpus()
    if not visible:
        return ()
    free = locks.unlocked_gpus(visible)
    if not free:
        locks.refuse_busy_gpus(visible)  # says who uses them
    if wanted is not None and wanted > len(free):
        raise UserError(
            "there are not as many free GPUs",
            expected=f"at most {len(free)}"
            + (f" ({len(visible) - len(free)} are in use)" if len(free) < len(visible) else ""),
            got=f"gpus={wanted}",
            next_step="Use fewer, wait for the others, or show this process more of them (CUDA_VISIBLE_DEVICES).",
        )
    used = telemetry.used_shares()
    if wanted is None:
        empty = tuple(gpu for gpu in free if used.get(gpu, 0.0) <= IN_USE)
        return empty or free
    emptiest = sorted(free, key=lambda gpu: used.get(gpu, 0.0) > IN_USE)[:wanted]
    return tuple(gpu for gpu in free if gpu in emptiest)


def _planned(config: RunConfig, share: str, gpus: int, nodes: int) -> Plan | str:
    """Plans for some GPUs of this machine, with a margin where that fits; returns why where nothing can be planned or nothing fits.

    Raises:
        UserError: the way that is asked for does not fit.
    """
    config = config.with_settings({SHARE: share})
    try:
        hardware = replace(this_machine(), gpus=gpus * nodes, machines=nodes)
        spare = replace(hardware, usable_gib=usable_with_margin(hardware.usable_gib))
        plan = plan_run(config, hardware=spare)
        plan = plan if plan.choice else plan_run(config, hardware=hardware)
    except UserError as error:
        return f"this model can't be planned ({error})"
    if plan.choice is None:
        if share == AUTO:
            return f"by the plan nothing fits, {plan.shortfall_gib:.1f} GiB are missing on each GPU"
        raise _does_not_fit(plan, share, hardware)
    if share not in (AUTO, plan.choice.share):
        raise _not_so(plan, share)
    return plan


def _does_not_fit(plan: Plan, share: str, hardware: Hardware) -> UserError:
    fixes = "; ".join(plan.fixes)
    return UserError(
        f"{share} would not fit",
        expected=f"at most {hardware.usable_gib:.1f} GiB on each GPU",
        got=f"{plan.smallest.peak_gib:.1f} GiB with the smallest settings",
        next_step=f"Leave the choice to the plan: share='auto'. It would fit with: {fixes}"
        if fixes
        else "Take share='auto'.",
    )


def _not_so(plan: Plan, share: str) -> UserError:
    why = next((each.why_not for each in plan.ways if each.share == share), "")
    return UserError(
        f"these GPUs can't share the work as {share}",
        got=why or f"{plan.hardware.gpus} GPUs",
        next_step="Leave the choice to the plan: share='auto'.",
    )


def _settings(config: RunConfig, choice: Candidate) -> dict[str, Any]:
    """Returns what to set for a plan's choice: what a person has set beside it stays."""
    found: dict[str, Any] = {SHARE: choice.share} if choice.processes > 1 else {}
    if choice.share == ONE:
        return found
    found |= {MICRO: choice.micro_batch_size, PASSES: choice.gradient_accumulation_steps}
    if choice.processes > 1:  # each process plans the rest for its own card, with what is free there
        return found
    planned = config.with_settings(choice.settings)
    is_open = {name: _get(config, name) in values for name, values in FOR_THE_PLAN.items()}
    if not (is_open["train.activation_checkpointing"] and is_open["train.checkpointed_layers"]):
        is_open |= dict.fromkeys(("train.activation_checkpointing", "train.checkpointed_layers"), False)
    return found | {name: _get(planned, name) for name, is_ours in is_open.items() if is_ours}


def _why(plan: Plan) -> str:
    assert plan.choice is not None
    choice = plan.choice
    what = MEANING[choice.share]
    text = f"{what[0].upper()}{what[1:]} ({choice.share}, {choice.layout.gpus} GPU{'s' * (choice.layout.gpus != 1)})"
    expected = f"{choice.peak_gib:.1f} GiB on the fullest GPU, {choice.tokens_per_s:,.0f} tokens/s"
    measured = any(each.measured for each in plan.ways if each.share == choice.share)
    return f"{text}; expected: {expected}" + ("" if measured else " (predicted, never measured)") + "."


def _on_cpu(config: RunConfig, processes: int, share: str) -> Choice:
    if processes == 1 or share == ONE:
        return Choice(None, ONE, 1, _alone(config, share))
    if share == SPREAD:
        raise UserError(
            "layers can't be spread over a CPU's processes",
            expected=f"{COPIES} or {SHARDS}",
            got=share,
            next_step="Choose one of these to rehearse several GPUs.",
        )
    return _by_settings(config, processes, COPIES if share == AUTO else share, None, "there is no GPU to plan for")


def _by_settings(config: RunConfig, processes: int, share: str, gpus: tuple[str, ...] | None, reason: str) -> Choice:
    """Shares a step's sequences out without a plan, with the micro-batch as it is or the next smaller that divides them."""
    sequences = sequences_per_step(config.train)
    if sequences % processes:
        raise _uneven(config, processes, 1)
    each = sequences // processes
    micro = max(size for size in range(1, min(config.train.micro_batch_size, each) + 1) if each % size == 0)
    text = f"{MEANING[share][0].upper()}{MEANING[share][1:]} ({share}, {processes} processes); {reason}."
    return Choice(gpus, share, processes, {SHARE: share, MICRO: micro, PASSES: each // micro}, text)


def _uneven(config: RunConfig, processes: int, nodes: int) -> UserError:
    sequences = sequences_per_step(config.train)
    fitting = copies_sharing(sequences, processes)
    evenly = f", evenly on {nodes} machines" if nodes > 1 else ""
    return UserError(
        f"an optimizer step of {sequences} sequence{'s' * (sequences != 1)} can't be shared evenly",
        expected=f"a number of processes that divides it, such as {fitting}{evenly}",
        got=str(processes),
        next_step=f"Use fewer, or set {PASSES} so that they can share the step.",
    )


def _as_asked(config: RunConfig, before: Launched | None) -> RunConfig:
    """Returns the settings as a person asked for them: what an earlier start has set, and nobody has changed since, is undone."""
    if before is None:
        return config
    known = {name: value for name, value in before.settings.items() if name in before.before}
    ours = {name: before.before[name] for name, value in known.items() if _get(config, name) == value}
    if ours.keys() & {MICRO, PASSES} != known.keys() & {
        MICRO,
        PASSES,
    }:  # one of the two was changed: the step is a new one
        ours = {name: value for name, value in ours.items() if name not in (MICRO, PASSES)}
    return config.with_settings(ours)


def _differences(config: RunConfig, other: RunConfig) -> dict[str, Any]:
    names = (SHARE, MICRO, PASSES, *FOR_THE_PLAN)
    return {name: _get(other, name) for name in names if _get(other, name) != _get(config, name)}


def _get(config: RunConfig, setting: str) -> Any:
    section, _, name = setting.partition(".")
    return getattr(getattr(config, section), name)


def _text(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
