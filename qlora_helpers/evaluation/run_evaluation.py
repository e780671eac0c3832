"""A run's evaluation: what is known of it already, what other runs stand beside it, and what is written of it.

Asks through functions that are handed in, so that a model is loaded only where an answer is missing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.text import Say
from qlora_helpers.data.plain_templates import template_name
from qlora_helpers.data.prepared_file import read_prepared_file
from qlora_helpers.evaluation.evaluation_file import read_evaluation, unwritable
from qlora_helpers.evaluation.kept_answers import KeptAnswers, kept_in_run, read_kept, say_reused
from qlora_helpers.evaluation.questions import Rival
from qlora_helpers.evaluation.worth import MODELS
from qlora_helpers.model.adapter_files import ADAPTER_WEIGHTS
from qlora_helpers.model.several import (
    TRAINED_BY,
    adapter_name,
    add_saved_adapter,
    base_mark,
    live_mark,
    refuse_other_base,
    saved_mark,
)
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.locks import MODEL_IN_USE, evaluation_lock

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.evaluation.evaluate import Evaluation
    from qlora_helpers.evaluation.metrics.own import Function
    from qlora_helpers.model.checkpoints import Checkpoint


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        run: the run.
        checkpoint, tokenizer: its base model's.
        data: its prepared data.
        others: further runs on the same base model.
        model: the tuned model where it is in memory; None takes the saved adapter.
    """

    run: Run
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    others: Sequence[Run] = ()
    model: PeftModel | None = None

    def marks(self) -> dict[str, str]:
        """A digest of each model that is asked, its adapter included."""
        base = base_mark(self.run, self.checkpoint)
        own = live_mark(self.model) if self.model is not None else saved_mark(self.run.adapter_dir)
        found = {name: f"{base} {own}" if name == "tuned" else base for name in MODELS}
        return found | {rival.name: f"{base} {rival.adapter}" for rival in self.rivals()}

    def rivals(self) -> list[Rival]:
        """The other runs as they are asked."""
        return [_rival(other) for other in self.others]


def refuse_unfit(run: Run, others: Sequence[Run], checkpoint: Checkpoint | None = None) -> None:
    """Refuses before a model is loaded what can't be evaluated: a run without an adapter, one twice, another base model.

    Raises:
        UserError: one of these.
    """
    run.need(run.adapter_dir / ADAPTER_WEIGHTS, TRAINED_BY)
    names = [each.name for each in (run, *others)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            "a run can't be compared with one of the same name",
            got=", ".join(twice),
            next_step="Copy one of the folders under another name.",
        )
    for other in others:
        refuse_other_base(run, other, checkpoint)


def evaluate_run(
    subject: Subject,
    opened: Callable[[], PeftModel],
    *,
    metric: Function | None,
    again: bool,
    say: Say,
    writes: bool = True,
) -> tuple[Evaluation, KeptAnswers]:
    """Evaluates a run; answers that the run holds for exactly these questions are not asked again.

    Args:
        subject: what is evaluated.
        opened: loads the tuned model, or returns the one in memory.
        metric: as for `evaluate.evaluate`.
        again: whether to ask everything anew.
        say: called with what was not asked again.
        writes: whether this process writes; of several that ask a model together the first one does, and all ask everything anew.
    """
    from qlora_helpers.evaluation.evaluate import evaluate_prepared

    run, config, data = subject.run, subject.run.config(), subject.data
    writable = writes and not unwritable(run)
    earlier = _earlier(run)
    rivals = subject.rivals()

    def with_rivals() -> PeftModel:
        model = opened()
        for other in subject.others:
            add_saved_adapter(model, other)
        return model

    with contextlib.ExitStack() as stack:
        if writable:
            stack.enter_context(evaluation_lock(run))
        kept = read_kept(run, earlier, subject.marks(), writable=writable)
        if again or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            kept.known.clear()
        stack.enter_context(kept_in_run(kept))
        stack.enter_context(MODEL_IN_USE)
        more = {"metric": metric, "rivals": rivals, "kept": kept}
        result = evaluate_prepared(with_rivals, subject.tokenizer, data, config, **more)
    say_reused(kept, str(earlier.get("made", "")), say)
    return result, kept


def _earlier(run: Run) -> dict[str, Any]:
    with contextlib.suppress(UserError):  # a damaged file is replaced
        return read_evaluation(run)
    return {}


def _rival(other: Run) -> Rival:
    config, prepared = other.config().data, read_prepared_file(other.data_dir)
    return Rival(
        other.name,
        template_name(config),
        config.seq_len_tokens,
        config.long_rows,
        frozenset(prepared.train_keys) if prepared else None,
        adapter_name(other),
    )
