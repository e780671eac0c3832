"""What is known of the terms that apply to an exported model: its base model's and its data's.

A licence is quoted from where it is written, never guessed: from the checkpoint's own card, or from the tables of what this
package has looked up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qlora_helpers.data.prepared_file import read_prepared_file
from qlora_helpers.model.checkpoints import Checkpoint
from qlora_helpers.model.gguf_files import WHEELS
from qlora_helpers.model.hub import is_hub_id
from qlora_helpers.model.shapes.catalog import MODEL_LICENCES
from qlora_helpers.runs.folder import Run

_FIELD = re.compile(r"^license:\s*[\"']?([\w.+ -]{1,80}?)[\"']?\s*$", re.MULTILINE)
_MOST_CHARACTERS = 20_000


@dataclass(frozen=True)
class Licences:
    """The licences of a run's base model and data, in words."""

    base: str
    data: str

    def __str__(self) -> str:
        return f"Base model: {self.base}. Data: {self.data}. What was trained may be used as far as both allow."


def licences_of(run: Run, checkpoint: Checkpoint) -> Licences:
    """Looks up the licences of a run's base model and data.

    Args:
        run: the run, with prepared data.
        checkpoint: of its base model.
    """
    prepared = read_prepared_file(run.data_dir)
    return Licences(_of_base(checkpoint), prepared.source if prepared else "licence not known")


def _of_base(checkpoint: Checkpoint) -> str:
    name = checkpoint.name
    if checkpoint.is_random:
        return f"{name} (random weights, no licence)"
    if name in MODEL_LICENCES:
        return f"{name} ({MODEL_LICENCES[name]})"
    if name in WHEELS:
        return f"{name} ({WHEELS[name].licence})"
    card = checkpoint.folder / "README.md"
    if card.is_file():
        head = card.read_text(encoding="utf-8", errors="replace")[:_MOST_CHARACTERS].split("\n---", 1)[0]
        if found := _FIELD.search(head):
            return f"{name} ({found.group(1)}, by its model card)"
    where = f"see https://huggingface.co/{name}" if is_hub_id(name) else "its folder names none"
    return f"{name} (licence not known: {where})"
