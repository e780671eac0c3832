"""Frees what takes space on this machine: model caches, runs, sweeps, and the GPU memory of this process.

Everything is shown before it is deleted, and nothing outside the caches and the run folders is ever touched. `space` finds what
there is. This module knows nothing of AWS (see `sagemaker.resources`), of models or of training, and uses torch only if it is
already imported.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.files import cache_root
from qlora_helpers.base.folders import remove
from qlora_helpers.base.units import gib
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.space import (
    CACHE,
    GPU,
    HUB,
    RUN,
    SpaceItem,
    SpaceReport,
    find_space,
    folder_size,
    hub_cache,
    is_sweep,
    items_of,
    last_file,
    reserved_bytes,
)
from qlora_helpers.runs.sweep_file import runs_of_sweep

__all__ = [
    "CACHE",
    "GPU",
    "HUB",
    "RUN",
    "SpaceItem",
    "SpaceReport",
    "find_space",
    "free",
    "delete_run",
    "free_gpu_memory",
]


class GpuMemory(NamedTuple):
    """GPU memory that PyTorch holds for this process, before and after freeing, GiB."""

    before_gib: float
    after_gib: float


def free(items: Iterable[SpaceItem] | SpaceItem, *, confirm: bool = False) -> int:
    """Shows what would be freed and frees it if that is confirmed.

    Args:
        items: items of `find_space()`, such as `find_space().select("run:demo/checkpoints")`.
        confirm: whether to delete; False only shows.

    Returns:
        The bytes that were freed; 0 without `confirm`.

    Raises:
        RunError: a run is still running; nothing was freed.
        UserError: an item is outside the caches and runs (nothing was freed), or can't be deleted.
    """
    chosen = SpaceReport((items,) if isinstance(items, SpaceItem) else tuple(items))
    for item in chosen:
        _check_may_free(item)
    print(chosen)
    if not confirm:
        print("Nothing was freed. The same call with confirm=True frees it.")
        return 0
    freed = sum(_free_one(item) for item in chosen)
    for run in {item.run.folder: item.run for item in chosen if item.run and item.id.endswith("/rest")}.values():
        freed += _remove_if_empty(run)
    print(f"{gib(freed):.3f} GiB freed.")
    return freed


def delete_run(run: Run, *, name: str) -> int:
    """Deletes the whole folder of a run, or of a sweep with those of its runs.

    Args:
        run: the run, or the sweep.
        name: its exact name, as a person has typed it.

    Returns:
        The bytes that were freed.

    Raises:
        UserError: the name is another one, or something can't be deleted.
        RunError: it is running, or a run of the sweep is; nothing was deleted.
    """
    if name != run.name:
        raise UserError(
            "nothing was deleted",
            expected=f"the exact name, {run.name}",
            got=repr(name),
            next_step="Type the name to confirm.",
        )
    going = [*(runs_of_sweep(run) if is_sweep(run) else []), run]  # the sweep last: it names its runs
    items = {each.name: items_of(each) for each in going}
    for item in itertools.chain.from_iterable(items.values()):
        _check_may_free(item)
    return sum(sum(map(_free_one, items[each.name])) + _remove_if_empty(each) for each in going)


def free_gpu_memory() -> GpuMemory:
    """Collects garbage and returns the GPU memory that no tensor uses to the driver, without importing torch.

    A model that a variable still refers to keeps its memory: run `del model` first.
    """
    before = sum(reserved_bytes())
    gc.collect()
    if before:
        sys.modules["torch"].cuda.empty_cache()
    return GpuMemory(gib(before), gib(sum(reserved_bytes())))


def _check_may_free(item: SpaceItem) -> None:
    if item.run is not None and item.run.status().is_live:
        raise RunError(
            f"the {'sweep' if is_sweep(item.run) else 'run'} {item.run.name!r} is running; nothing was freed",
            next_step="Stop it first, or free the other items.",
        )
    root = _root_of(item)
    for path in item.paths:
        # Only the parent is resolved, not the path itself: a link is deleted, never what it points to.
        real = path.parent.resolve() / path.name
        if root is None or root not in real.parents or path.name == "..":
            raise UserError(
                f"{item.id} is outside the caches and run folders; nothing was freed",
                next_step="Use items of find_space(), or delete it yourself.",
            )


def _root_of(item: SpaceItem) -> Path | None:
    """Returns the folder that the item's paths must be in."""
    if item.kind == HUB:
        return hub_cache().resolve()
    if item.kind == CACHE:
        return cache_root().resolve()
    # The run's own folder is not resolved: if it is a link, what it points to must not be deleted.
    return item.run.folder.parent.resolve() / item.run.name if item.run else None


def _free_one(item: SpaceItem) -> int:
    if item.kind == GPU:
        memory = free_gpu_memory()
        return round((memory.before_gib - memory.after_gib) * 1024**3)
    freed, root = 0, _root_of(item)
    assert root is not None  # `_check_may_free` has seen to it
    for path in item.paths:
        size = folder_size(path)
        try:
            with contextlib.suppress(FileNotFoundError):
                remove(path.parent.resolve() / path.name, root=root)
        except OSError as error:
            raise UserError(
                f"{item.id} could not be freed ({error.strerror})",
                next_step="Check who owns the files, then try again.",
            ) from error
        freed += size
    return freed


def _remove_if_empty(run: Run) -> int:
    """Removes the folder of a run or of a sweep if only the file is left by which it is found; returns the file's bytes."""
    last = last_file(run)
    if [path.name for path in run.folder.iterdir()] != [last.name]:
        return 0
    size = folder_size(last)
    remove(last, root=run.folder)
    run.folder.rmdir()
    return size
