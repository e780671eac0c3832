"""The exercises of the course, by the notebook that they belong to; `from qlora_helpers.teaching import exercises`.

Each is an `Exercise` with `check`, `hint` and `solution`. Importing this imports no torch; a check imports what it needs.
"""

from qlora_helpers.teaching.exercise import Exercise
from qlora_helpers.teaching.exercises.adapters import COUNT_ADAPTERS as count_adapters
from qlora_helpers.teaching.exercises.adapters import RANK_COST as rank_cost
from qlora_helpers.teaching.exercises.data import KEEP_ROWS_APART as keep_rows_apart
from qlora_helpers.teaching.exercises.data import REPAIR_A_FILE as repair_a_file
from qlora_helpers.teaching.exercises.data import WRITE_LABELS as write_labels
from qlora_helpers.teaching.exercises.data import broken_file
from qlora_helpers.teaching.exercises.four_bits import QUANTISE as quantise
from qlora_helpers.teaching.exercises.four_bits import REALLY_FOUR_BITS as really_four_bits
from qlora_helpers.teaching.exercises.primer import ONE_STEP as one_step
from qlora_helpers.teaching.exercises.primer import WRITE_A_LOSS as write_a_loss

__all__ = [
    "broken_file",
    "count_adapters",
    "keep_rows_apart",
    "one_step",
    "quantise",
    "rank_cost",
    "really_four_bits",
    "repair_a_file",
    "write_a_loss",
    "write_labels",
]


def all_exercises() -> dict[str, Exercise]:
    """Returns every exercise by its name, in the order of the notebooks."""
    named = {name: globals()[name] for name in __all__}
    return {name: each for name, each in named.items() if isinstance(each, Exercise)}
