"""What a run was trained on, as its checkpoints and its adapter keep it, against what its settings and files say now.

Catches what `Run.change_config` can't see: a `config.json` that was edited by hand, data or a model that changed under its name.
"""

from __future__ import annotations

from typing import Any

from qlora_helpers import training_checkpoints as saved
from qlora_helpers.run import FIXED, Run
from qlora_helpers.whole_files import read_json


def refuse_other_than_trained_on(run: Run, marks: dict[str, str] | None = None) -> dict[str, Any]:
    """Compares the settings, and the marks where they are known, with those of the newest checkpoint, else of the adapter.

    Args:
        run: the run, trained or not.
        marks: digests of what settings only name: the data file's content, the vocabulary, the model's files.

    Returns:
        What a session that begins now is trained on, for its checkpoints.

    Raises:
        RunError: something differs; the message says what.
    """
    settings = run.config().to_dict()
    now = {section: settings[section] for section in FIXED} | {"marks": marks or {}}
    before = saved.trained_on(run.checkpoints_dir)
    if before is None and (run.adapter_dir / "config.json").exists():
        before = read_json(run.adapter_dir / "config.json")
    if isinstance(before, dict):
        run.refuse_differences(before, now)
    return now
