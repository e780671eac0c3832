"""Chooses on which GPUs a run trains and how they share its work: those that are free, in the way that the plan finds fastest.

However many GPUs there are, an optimizer step learns from as many sequences as the run's settings ask for. Starts and writes
nothing. Imports no torch.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.units import duration
from qlora_helpers.machine import telemetry
from qlora_helpers.machine.hardware import Hardware
from qlora_helpers.machine.price import machine_price
from qlora_helpers.planning.layout import COPIES, MEANING, ONE, SHARDS, SPREAD, WAYS, copies_sharing
from qlora_helpers.planning.memory import usable_with_margin
from qlora_helpers.planning.plan import Plan
from qlora_helpers.planning.run_plan import plan_run, this_machine
from qlora_helpers.planning.started import MICRO, PASSES, SHARE, settings_to_start
from qlora_helpers.planning.step_settings import sequences_per_step
from qlora_helpers.runs import locks
from qlora_helpers.runs.plan_file import MemoryFailure

AUTO = "auto"
IN_USE = 0.25  # of a GPU's memory: one of which other programs hold more is taken only where it is asked for
LIKE = 1.05  # times the memory of the cards on which a run was out of memory; larger ones are other cards


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


def choose(
    config: RunConfig,
    *,
    gpus: int | None = None,
    share: str | None = None,
    nodes: int = 1,
    ran_out: MemoryFailure | None = None,
) -> Choice:
    """Decides how a run is started on this machine, and starts nothing.

    Args:
        config: its settings, as a person asked for them.
        gpus, share: as for `starting.start`.
        nodes: machines that train together, all like this one.
        ran_out: where the run was last out of memory: on such GPUs it is planned to hold less.

    Raises:
        RunError, UserError: as for `starting.start`.
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
    limit_gib = _limit_gib(ran_out)
    plan = _planned(config, share, len(taken), nodes, limit_gib)
    if isinstance(plan, str):
        if share == AUTO and nodes == 1:
            return Choice(taken, SPREAD, 1, {}, f"The layers are spread over {count} GPUs: {plan}.")
        return _by_settings(config, count, COPIES if share == AUTO else share, taken, plan)
    assert plan.choice is not None
    used, left = divmod(plan.choice.layout.gpus, nodes)
    if left:
        return _by_settings(config, count, plan.choice.share, taken, "")
    settings = settings_to_start(config, plan.choice, limited=limit_gib is not None)
    return Choice(taken[:used], plan.choice.share, plan.choice.processes, settings, _why(plan))


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


def _planned(config: RunConfig, share: str, gpus: int, nodes: int, limit_gib: float | None) -> Plan | str:
    """Plans for some GPUs of this machine, with a margin where that fits; returns why where nothing can be planned or nothing fits.

    Raises:
        UserError: the way that is asked for does not fit.
    """
    config = config.with_settings({SHARE: share})
    try:
        price = machine_price(config.train)
        here = this_machine(price.usd_per_hour * nodes if price else None)
        hardware = replace(here, gpus=gpus * nodes, machines=nodes)
        spare = replace(hardware, usable_gib=usable_with_margin(hardware.usable_gib))
        if limit_gib is not None:
            hardware, spare = (replace(each, usable_gib=min(each.usable_gib, limit_gib)) for each in (hardware, spare))
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


def _limit_gib(ran_out: MemoryFailure | None) -> float | None:
    """Returns the GiB of each GPU that a run may take which was out of memory on such cards; None where nothing limits it."""
    with contextlib.suppress(UserError):
        if ran_out and ran_out.most_gib and this_machine().usable_gib <= LIKE * (ran_out.card_gib or 0.0):
            return ran_out.most_gib
    return None


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


def _why(plan: Plan) -> str:
    assert plan.choice is not None
    choice = plan.choice
    what = MEANING[choice.share]
    text = f"{what[0].upper()}{what[1:]} ({choice.share}, {choice.layout.gpus} GPU{'s' * (choice.layout.gpus != 1)})"
    dollars = "" if choice.dollars is None else f", ${choice.dollars:,.2f}"
    expected = f"{choice.peak_gib:.1f} GiB on the fullest GPU, {choice.tokens_per_s:,.0f} tokens/s, "
    expected += f"{duration(choice.seconds)}{dollars} for {plan.tokens:,} tokens"
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
        raise uneven(config, processes, 1)
    each = sequences // processes
    micro = max(size for size in range(1, min(config.train.micro_batch_size, each) + 1) if each % size == 0)
    text = f"{MEANING[share][0].upper()}{MEANING[share][1:]} ({share}, {processes} processes); {reason}."
    return Choice(gpus, share, processes, {SHARE: share, MICRO: micro, PASSES: each // micro}, text)


def uneven(config: RunConfig, processes: int, nodes: int) -> UserError:
    """Returns the error for a step's sequences that so many processes can't share evenly."""
    sequences = sequences_per_step(config.train)
    fitting = copies_sharing(sequences, processes)
    evenly = f", evenly on {nodes} machines" if nodes > 1 else ""
    return UserError(
        f"an optimizer step of {sequences} sequence{'s' * (sequences != 1)} can't be shared evenly",
        expected=f"a number of processes that divides it, such as {fitting}{evenly}",
        got=str(processes),
        next_step=f"Use fewer, or set {PASSES} so that they can share the step.",
    )
