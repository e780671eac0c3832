"""Hands a run's base and tuned model to lm-eval, EleutherAI's evaluation harness, and reads what it says.

The model is the loaded one: the audited base in 4 bits with the run's adapter on it, off and on over the same rows. lm-eval is not
one of this package's requirements; a message says how to install it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.files import remove, replaced_folder
from qlora_helpers.base.place import at
from qlora_helpers.base.text import Say, brief
from qlora_helpers.evaluation.suite_file import Suite, TaskScore
from qlora_helpers.evaluation.suite_scores import scores_of
from qlora_helpers.evaluation.suite_task import CACHE, HELD_OUT, write_held_out
from qlora_helpers.model.run_model import RunModel
from qlora_helpers.model.wiring import in_eval_mode

if TYPE_CHECKING:
    from qlora_helpers.data.packing import PreparedData

INSTALL = "pip install 'lm-eval>=0.4.13,<0.5'"
FOLDER = "suite"  # of a run's folder: the task that is made of its held-out rows
BOOTSTRAP = 1000  # samples of lm-eval's own errors, of which nothing is kept


def need_harness() -> None:
    """Refuses to go on without lm-eval.

    Raises:
        UserError: it is not installed; with the command.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluation suites need lm-eval, which is not installed", next_step=f"Install it: {INSTALL}")


def check_numbers(**values: int | None) -> None:
    """Refuses numbers of rows and examples that are none.

    Raises:
        UserError: one is too small.
    """
    for name, value in values.items():
        least = 0 if name == "shots" else 1
        if value is not None and value < least:
            raise UserError(f"{name} can't be that", expected=f"at least {least}", got=str(value))


def check_tasks(tasks: str | Sequence[str]) -> list[str]:
    """Returns the names of tasks, each once.

    Raises:
        UserError: there is none, or a name is not a text.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    names = [part.strip() for name in names if isinstance(name, str) for part in name.split(",") if part.strip()]
    if not names:
        raise UserError(
            "no task was named",
            expected=f"names of lm-eval, paths of YAML files, or {HELD_OUT} for the run's own held-out rows",
            next_step=f"Such as: {HELD_OUT},arc_easy. `lm-eval ls tasks` lists lm-eval's.",
        )
    return list(dict.fromkeys(names))


@at("evaluation suite")
def ask_tasks(
    asked: RunModel,
    tasks: Sequence[str],
    data: PreparedData | None,
    *,
    adapter_sha256: str,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    batch_size: int | None = None,
    say: Say = print,
) -> Suite:
    """Asks the base and the tuned model lm-eval's tasks.

    Args:
        asked: the run with its tuned model.
        tasks: as `check_tasks` returns them.
        data: the run's, for its held-out rows; may be None where they are not asked.
        adapter_sha256: of the adapter's weights.
        limit: the first so many rows of each task; None takes all.
        shots: examples before each question; None does as the task says. Held-out rows are asked without.
        chat: whether the tasks' questions go through the chat template. Held-out rows have the run's own prompts.
        batch_size: rows at once; None takes the run's.
        say: called with a line on what takes long.

    Raises:
        UserError: lm-eval is not installed, or a task is unknown, needs a network that is not there, or fails.
    """
    need_harness()
    at_once = batch_size or asked.run.config().evaluation.batch_size
    notes: list[str] = []
    scores: list[TaskScore] = []
    with _quiet(), in_eval_mode(asked.model):
        if HELD_OUT in tasks:
            assert data is not None
            found, notes = _ask_held_out(asked, data, at_once, limit, say)
            scores += found
        if others := [name for name in tasks if name != HELD_OUT]:
            scores += _ask_others(asked, others, at_once, limit, shots, chat, say)
    return Suite(
        tuple(scores),
        adapter_sha256,
        importlib.metadata.version("lm_eval"),
        tuple(notes),
        asked.loaded.checkpoint.is_random,
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _ask_held_out(
    asked: RunModel, data: PreparedData, batch_size: int, limit: int | None, say: Say
) -> tuple[list[TaskScore], list[str]]:
    """Asks the run's held-out rows; returns the scores, and lines on the rows that were skipped."""
    harness = _harness(asked, batch_size, bos=_bos(asked))
    folder = asked.run.folder / FOLDER
    with replaced_folder(folder) as new:
        notes = _write_own(new, folder, asked, data, harness)
    task = str((folder / "held_out.yaml").resolve())  # this file alone: no other in the folder is read
    manager = _manager(include_defaults=False)
    try:
        found = _both(asked, harness, [task], manager, say, limit=limit, num_fewshot=0)
    finally:
        remove(folder / CACHE, root=asked.run.folder)
    return scores_of(*found, limit=limit), notes


def _ask_others(
    asked: RunModel,
    tasks: Sequence[str],
    batch_size: int,
    limit: int | None,
    shots: int | None,
    chat: bool,
    say: Say,
) -> list[TaskScore]:
    """Asks tasks that lm-eval knows by name, or that a YAML file describes."""
    files = [str(Path(name).resolve()) for name in tasks if name.endswith((".yaml", ".yml"))]
    named = [name for name in tasks if not name.endswith((".yaml", ".yml"))]
    manager = _manager(include_defaults=bool(named))
    _refuse_unknown(named, manager)
    harness = _harness(asked, batch_size, bos=None)
    more = {"limit": limit, "num_fewshot": shots, "apply_chat_template": chat}
    found = _both(asked, harness, [*named, *files], manager, say, **more)
    return scores_of(*found, limit=limit, chat=chat)


def _both(
    asked: RunModel, harness: Any, tasks: Sequence[str], manager: Any, say: Say, **more: Any
) -> list[Mapping[str, Any]]:
    """What lm-eval says of the base model and of the tuned one."""
    lm_eval = importlib.import_module("lm_eval")
    found = []
    for tuned in (False, True):
        say(f"lm-eval asks the {'tuned' if tuned else 'base'} model: {', '.join(Path(task).name for task in tasks)}")
        with asked.with_adapters(tuned), _explained():
            result = lm_eval.simple_evaluate(
                model=harness,
                tasks=list(tasks),
                task_manager=manager,
                bootstrap_iters=BOOTSTRAP,
                confirm_run_unsafe_code=False,
                **more,
            )
        found.append(result)
    return found


def _harness(asked: RunModel, batch_size: int, *, bos: bool | None) -> Any:
    huggingface = importlib.import_module("lm_eval.models.huggingface")
    with _explained():
        return huggingface.HFLM(
            pretrained=asked.model,
            tokenizer=asked.tokenizer,
            backend="causal",
            batch_size=batch_size,
            add_bos_token=bos,
        )


def _manager(**more: Any) -> Any:
    with _explained():
        return importlib.import_module("lm_eval.tasks").TaskManager(**more)


def _write_own(new: Path, folder: Path, asked: RunModel, data: PreparedData, harness: Any) -> list[str]:
    from qlora_helpers.data.templates import template_of
    from qlora_helpers.evaluation.generate import marks_of

    config = asked.run.config()
    return write_held_out(
        new,
        folder,
        data,
        template_of(config.data, asked.tokenizer),
        asked.tokenizer,
        marks_of(asked.model, asked.tokenizer).ends,
        encode=harness.tok_encode,
        most_new_tokens=config.evaluation.max_new_tokens,
    )


def _bos(asked: RunModel) -> bool:
    """Whether the run's prompts begin with a token that the tokenizer adds; a chat template writes its own."""
    from qlora_helpers.data.templates import template_of

    return template_of(asked.run.config().data, asked.tokenizer).name != "chat"


def _refuse_unknown(names: Sequence[str], manager: Any) -> None:
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UserError(
            "lm-eval has no such task",
            got=", ".join(repr(name) for name in unknown),
            next_step=f"`lm-eval ls tasks` lists them; {HELD_OUT} are the run's own held-out rows.",
        )


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns whatever lm-eval raises into one message, but for memory, which has a message of its own."""
    import torch

    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # lm-eval, its tasks and their data sets raise errors of any kind
        raise UserError(
            "lm-eval could not ask this",
            got=f"{type(error).__name__}: {brief(error)}",
            next_step="Its tasks' data come from the hub: check the network, HF_HUB_OFFLINE and the task's name.",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what lm-eval logs and warns of below errors."""
    loggers: Collection[logging.Logger] = [logging.getLogger("lm_eval"), logging.getLogger("evaluate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
