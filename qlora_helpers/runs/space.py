"""Measures what takes space on this machine: model caches, runs, sweeps, and the GPU memory of this process.

`cleanup` frees it. This module knows nothing of AWS (see `sagemaker.resources`), of models or of training, and uses torch only if
it is already imported.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.files import cache_root
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.units import gib
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.opening import find_runs
from qlora_helpers.runs.sweep_file import SWEEP, find_sweeps, runs_of_sweep

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
        run: the run or the sweep that it belongs to, if any.
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
        """Returns what belongs to the run or the sweep of exactly this name: a sweep's runs come first, and then the sweep.

        Raises:
            UserError: there is no such run or sweep.
        """
        own = [item for item in self.items if item.run is not None and item.run.name == name]
        names = {run.name for item in own if item.run is not None for run in _runs_with(item.run)}
        chosen = (*(item for item in self.items if item.run is not None and item.run.name in names), *own)
        if not chosen:
            known = ", ".join(sorted({item.run.name for item in self.items if item.run is not None})) or "none"
            raise UserError("no run has that name", expected=f"one of these: {known}", got=name)
        return SpaceReport(chosen)

    def table(self) -> Table:
        """Returns a row for each item, without paths, and the total below."""
        rows = [[item.id, f"{gib(item.n_bytes):.3f} GiB", item.kind, item.note] for item in self.items]
        rows.append(["total", f"{gib(self.n_bytes):.3f} GiB", "", ""])
        return Table(["what", "size", "kind", "note"], rows, numbers=(1,))


def find_space(runs: str | os.PathLike[str] = "runs") -> SpaceReport:
    """Measures what takes space: the hub cache, this project's caches, the runs, and this process's GPU memory.

    Args:
        runs: the folder that holds the runs. Links in it and in the caches are neither followed nor counted.
    """
    found = [*_hub_items(), *_cache_items(), *_run_items(Path(runs)), *_gpu_items()]
    kinds = (HUB, CACHE, RUN, GPU)
    return SpaceReport(tuple(sorted(found, key=lambda item: (kinds.index(item.kind), -item.n_bytes, item.id))))


def hub_cache() -> Path:
    """Returns the folder of Hugging Face's cache of models and data sets (`$HF_HUB_CACHE`), whether it exists or not."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _hub_items() -> list[SpaceItem]:
    from huggingface_hub import scan_cache_dir

    root = hub_cache()
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
    return [
        item for run in [*find_runs(root), *find_sweeps(root)] if not run.folder.is_symlink() for item in items_of(run)
    ]


def _runs_with(run: Run) -> list[Run]:
    """The runs that go with a sweep; none for a run, and none where the sweep's file can't be read."""
    with contextlib.suppress(RunError):
        return runs_of_sweep(run) if is_sweep(run) else []
    return []


def is_sweep(run: Run) -> bool:
    """Whether a folder is that of a sweep."""
    return (run.folder / SWEEP).exists() and not run.exists()


def items_of(run: Run) -> list[SpaceItem]:
    """Returns what takes space in the folder of a run or of a sweep."""
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
    # `free` deletes this file last: without it, the rest of the folder would not be found again.
    kept = {last_file(run), *(path for path, _ in parts.values())}
    rest = tuple(path for path in sorted(run.folder.iterdir()) if path not in kept)
    note = "settings, progress, events, report"
    if is_sweep(run):
        with_it = len(_runs_with(run))
        note = f"a sweep; clean {run.name} frees its {with_it} runs, too" if with_it else "a sweep without runs"
    return [*items, SpaceItem(f"run:{run.name}/rest", RUN, sum(map(folder_size, rest)), note, rest, run)]


def last_file(run: Run) -> Path:
    """Returns the file by which the folder of a run or of a sweep is found."""
    return run.folder / SWEEP if is_sweep(run) else run.config_path


def _gpu_items() -> list[SpaceItem]:
    note = "held by this kernel"
    return [SpaceItem(f"gpu:{index}", GPU, held, note) for index, held in enumerate(reserved_bytes()) if held]


def reserved_bytes() -> list[int]:
    """Returns what PyTorch has reserved in this process on each GPU, bytes, by index; empty where CUDA was not used yet."""
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
