"""Measures and frees what takes space on this machine: model caches, runs, and the GPU memory of this process.

Everything is shown before it is deleted, and nothing outside the caches and the run folders is ever touched. This module knows
nothing of AWS (see `sagemaker.resources`), of models or of training, and uses torch only if it is already imported.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.files import cache_root
from qlora_helpers.base.folders import remove
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.units import gib
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.opening import find_runs

HUB, CACHE, RUN, GPU = "hub cache", "project cache", "run", "GPU memory"


@dataclass(frozen=True)
class SpaceItem:
    """One thing that takes space and can be freed.

    Attributes:
        id: such as `hub:models/tiiuae/falcon-7b`, `cache:random/falcon-tiny`, `run:demo/checkpoints` or `gpu:0`.
        kind: `hub cache`, `project cache`, `run` or `GPU memory`.
        n_bytes: its size.
        note: what it is, or what deleting it means.
        paths: its files and folders.
        run: the run that it belongs to, if any.
    """

    id: str
    kind: str
    n_bytes: int
    note: str = ""
    paths: tuple[Path, ...] = field(default=(), repr=False)
    run: Run | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class SpaceReport(Tabular):
    """What takes space, largest first within its kind; shows as a table without paths."""

    items: tuple[SpaceItem, ...]

    @property
    def n_bytes(self) -> int:
        """The size of all items together."""
        return sum(item.n_bytes for item in self.items)

    def __iter__(self) -> Iterator[SpaceItem]:
        return iter(self.items)

    def select(self, *patterns: str) -> SpaceReport:
        """Returns the items whose id matches one of the patterns, such as `run:demo/*` or `cache:*`.

        Raises:
            UserError: a pattern matches nothing.
        """
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(item.id, pattern) for item in self.items):
                known = ", ".join(item.id for item in self.items) or "nothing"
                raise UserError("no item has that id", expected=known, got=pattern)
        chosen = [item for item in self.items if any(fnmatch.fnmatchcase(item.id, pattern) for pattern in patterns)]
        return SpaceReport(tuple(chosen))

    def of_run(self, name: str) -> SpaceReport:
        """Returns what belongs to the run of exactly this name.

        Raises:
            UserError: there is no such run.
        """
        chosen = tuple(item for item in self.items if item.run is not None and item.run.name == name)
        if not chosen:
            known = ", ".join(sorted({item.run.name for item in self.items if item.run is not None})) or "none"
            raise UserError("no run has that name", expected=f"one of these: {known}", got=name)
        return SpaceReport(chosen)

    def table(self) -> Table:
        """Returns a row for each item, without paths, and the total below."""
        rows = [[item.id, f"{gib(item.n_bytes):.3f} GiB", item.kind, item.note] for item in self.items]
        rows.append(["total", f"{gib(self.n_bytes):.3f} GiB", "", ""])
        return Table(["what", "size", "kind", "note"], rows, numbers=(1,))


class GpuMemory(NamedTuple):
    """GPU memory that PyTorch holds for this process, before and after freeing, GiB."""

    before_gib: float
    after_gib: float


def find_space(runs: str | os.PathLike[str] = "runs") -> SpaceReport:
    """Measures what takes space: the hub cache, this project's caches, the runs, and this process's GPU memory.

    Args:
        runs: the folder that holds the runs. Links in it and in the caches are neither followed nor counted.
    """
    found = [*_hub_items(), *_cache_items(), *_run_items(Path(runs)), *_gpu_items()]
    kinds = (HUB, CACHE, RUN, GPU)
    return SpaceReport(tuple(sorted(found, key=lambda item: (kinds.index(item.kind), -item.n_bytes, item.id))))


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
        freed += _remove_if_only_config_is_left(run)
    print(f"{gib(freed):.3f} GiB freed.")
    return freed


def delete_run(run: Run, *, name: str) -> int:
    """Deletes a run's whole folder.

    Args:
        run: the run.
        name: its exact name, as a person has typed it.

    Returns:
        The bytes that were freed.

    Raises:
        UserError: the name is another one, or something can't be deleted.
        RunError: the run is running; nothing was deleted.
    """
    if name != run.name:
        raise UserError(
            "nothing was deleted",
            expected=f"the run's exact name, {run.name}",
            got=repr(name),
            next_step="Type the name to confirm.",
        )
    items = _items_of(run)
    for item in items:
        _check_may_free(item)
    return sum(map(_free_one, items)) + _remove_if_only_config_is_left(run)


def free_gpu_memory() -> GpuMemory:
    """Collects garbage and returns the GPU memory that no tensor uses to the driver, without importing torch.

    A model that a variable still refers to keeps its memory: run `del model` first.
    """
    before = sum(_reserved_bytes())
    gc.collect()
    if before:
        sys.modules["torch"].cuda.empty_cache()
    return GpuMemory(gib(before), gib(sum(_reserved_bytes())))


# finding


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _hub_items() -> list[SpaceItem]:
    from huggingface_hub import scan_cache_dir

    root = _hub_cache()
    if not root.is_dir():
        return []
    whole = {repo.repo_path.name: repo for repo in scan_cache_dir(root).repos}
    items = []
    for folder in _folders(root):
        kind, dashes, name = folder.name.partition("--")
        if not dashes:
            continue
        # An interrupted download belongs to no revision, so the library's scan does not count it.
        unfinished = any(folder.glob("blobs/*.incomplete"))
        note = f"{len(whole[folder.name].revisions)} revision(s)" if folder.name in whole else "no complete revision"
        note += ", an unfinished download" if unfinished else ""
        items.append(SpaceItem(f"hub:{kind}/{name.replace('--', '/')}", HUB, folder_size(folder), note, (folder,)))
    return items


def _cache_items() -> list[SpaceItem]:
    root = cache_root()
    if not root.is_dir():
        return []
    return [
        SpaceItem(f"cache:{group.name}/{path.name}", CACHE, folder_size(path), "recreated when it is needed", (path,))
        for group in _folders(root)
        for path in sorted(group.iterdir())
        if not path.is_symlink()
    ]


def _run_items(root: Path) -> list[SpaceItem]:
    return [item for run in find_runs(root) if not run.folder.is_symlink() for item in _items_of(run)]


def _items_of(run: Run) -> list[SpaceItem]:
    parts = {
        "checkpoints": (run.checkpoints_dir, "needed to resume"),
        "data": (run.data_dir, "recreated by notebook 03_prepare_data"),
        "adapter": (run.adapter_dir, "the tuned adapter: the run's result"),
    }
    items = [
        SpaceItem(f"run:{run.name}/{part}", RUN, folder_size(path), note, (path,), run)
        for part, (path, note) in parts.items()
        if path.exists() and not path.is_symlink()
    ]
    # `free` deletes config.json last: without it, the rest of the run would not be found again.
    kept = {run.config_path, *(path for path, _ in parts.values())}
    rest = tuple(path for path in sorted(run.folder.iterdir()) if path not in kept)
    note = "settings, progress, events, report"
    return [*items, SpaceItem(f"run:{run.name}/rest", RUN, sum(map(folder_size, rest)), note, rest, run)]


def _gpu_items() -> list[SpaceItem]:
    note = "held by this kernel"
    return [SpaceItem(f"gpu:{index}", GPU, held, note) for index, held in enumerate(_reserved_bytes()) if held]


def _reserved_bytes() -> list[int]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    return [torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count())]


def _folders(root: Path) -> list[Path]:
    return [path for path in sorted(root.iterdir()) if path.is_dir() and not path.is_symlink()]


def folder_size(path: Path) -> int:
    """Returns the bytes of a file, or of all files in a folder; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size if os.path.lexists(path) else 0
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


# freeing


def _check_may_free(item: SpaceItem) -> None:
    if item.run is not None and item.run.status().is_live:
        raise RunError(
            f"the run {item.run.name!r} is running; nothing was freed",
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
        return _hub_cache().resolve()
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


def _remove_if_only_config_is_left(run: Run) -> int:
    if [path.name for path in run.folder.iterdir()] != [run.config_path.name]:
        return 0
    size = folder_size(run.config_path)
    remove(run.config_path, root=run.folder)
    run.folder.rmdir()
    return size
