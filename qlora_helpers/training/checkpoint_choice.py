"""Which checkpoint a run goes on from: sets spoilt ones aside, says what was chosen, and lets a person choose another.

A checkpoint that is set aside is whole and stays on the disk, until the run has saved newer healthy ones; its seal has the reason.
"""

from __future__ import annotations

from pathlib import Path

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.training.checkpoints import SEAL, all_checkpoints, is_good, last_good_step, step_of, why_set_aside

ASKED_FOR = (
    "asked_for"  # in a seal: a person chose this checkpoint, though it had been set aside for the reason given here
)


def set_aside(folder: Path, step: int, why: str) -> list[int]:
    """Marks checkpoints of this step and later as not to be resumed from: they are whole, but their weights are bad.

    Returns:
        Their steps; those that had been set aside before are not among them.
    """
    spoilt = [path for path in all_checkpoints(folder) if step_of(path) >= step and is_good(path)]
    for path in spoilt:
        seal = read_json(path / SEAL)
        seal.pop(ASKED_FOR, None)
        write_json(path / SEAL, seal | {"set_aside": why})
    return [step_of(path) for path in spoilt]


def after_failure(folder: Path, since: int | None, why: str) -> str:
    """Sets aside what a failed training has spoilt; returns where the run goes on from, as the end of a sentence.

    Args:
        folder: of the checkpoints.
        since: the first abnormal step, which was measured on the weights of the step before; None where there is none.
        why: what was abnormal.
    """
    spoilt = [] if since is None else set_aside(folder, since - 1, why)
    last = last_good_step(folder)
    if not spoilt:
        return f"its last good checkpoint, of step {last}" if last else "its start: it had no checkpoint yet"
    goes_on = f"its last healthy checkpoint, of step {last}" if last else "the untrained adapter"
    return f"{goes_on}: {_named(spoilt)} set aside ({why})"


def choice_in_words(folder: Path) -> str:
    """Says which checkpoint a training goes on from, where that is not simply the newest; else an empty string."""
    checkpoints = all_checkpoints(folder)
    good = [path for path in checkpoints if is_good(path)]
    last = step_of(good[-1]) if good else 0
    spoilt = {step_of(path): why for path in checkpoints if step_of(path) > last and (why := why_set_aside(path))}
    if good and (reason := read_json(good[-1] / SEAL).get(ASKED_FOR)):
        return f"Training goes on from checkpoint {last}, as you asked, although it had been set aside ({reason})."
    if not spoilt:
        return ""
    because = f"{_named(list(spoilt))} set aside ({next(iter(spoilt.values()))})"
    if good:
        return f"Training goes on from checkpoint {last}, the last healthy one: {because}."
    return f"Training starts anew from the untrained adapter, because no checkpoint is healthy: {because}."


def go_back_to(folder: Path, step: int) -> None:
    """Makes a checkpoint the one that training goes on from, because a person asked for it, even if it was set aside.

    Later ones are set aside, so that they aren't chosen instead.

    Raises:
        RunError: there is no such checkpoint, or it is incomplete or damaged; nothing changes.
    """
    chosen = folder / f"checkpoint-{step}"
    reason = why_set_aside(chosen)
    seal = read_json(chosen / SEAL) if (chosen / SEAL).is_file() else None
    if reason and isinstance(seal, dict):
        write_json(chosen / SEAL, {name: value for name, value in seal.items() if name != "set_aside"})
    if not is_good(chosen):
        if reason and isinstance(seal, dict):
            write_json(chosen / SEAL, seal)
        whole = [str(step_of(path)) for path in all_checkpoints(folder) if is_good(path) or why_set_aside(path)]
        raise RunError(
            f"there is no whole checkpoint of step {step}",
            expected=f"one of {', '.join(whole)}" if whole else "a checkpoint that the run has saved",
            next_step="Leave checkpoint=None to go on from the last healthy one.",
        )
    if reason:
        write_json(chosen / SEAL, read_json(chosen / SEAL) | {ASKED_FOR: reason})
    set_aside(folder, step + 1, f"you asked to go on from checkpoint {step}")


def _named(steps: list[int]) -> str:
    """Names checkpoints with their verb: "checkpoint 2 is" or "checkpoints 2, 4 and 6 are"."""
    if len(steps) == 1:
        return f"checkpoint {steps[0]} is"
    return f"checkpoints {', '.join(map(str, steps[:-1]))} and {steps[-1]} are"
