"""The exercises of the course, by the notebook that they belong to; `from qlora_helpers.teaching import exercises`.

Each is an `Exercise` with `check`, `hint` and `solution`. Importing this imports no torch; a check imports what it needs.
"""

from qlora_helpers.teaching import today as _today
from qlora_helpers.teaching.exercise import Exercise
from qlora_helpers.teaching.exercises import (
    adapters,
    certified,
    cleaning,
    cost,
    data,
    four_bits,
    judging,
    leaving,
    own_task,
    primer,
    setup,
    training,
    watching,
)
from qlora_helpers.teaching.exercises.data import broken_file
from qlora_helpers.teaching.exercises.judging import REFERENCE
from qlora_helpers.teaching.exercises.own_task import LEAKING_PROMPT
from qlora_helpers.teaching.exercises.setup import BROKEN_SETTINGS
from qlora_helpers.teaching.exercises.training import TOO_LARGE

BY_NOTEBOOK: dict[str, tuple[Exercise, ...]] = {
    "primer": (primer.WRITE_A_LOSS, primer.ONE_STEP),
    "00_setup": (setup.EXTEND_A_PATH, setup.REPAIR_SETTINGS),
    "01_load_model": (four_bits.QUANTISE, four_bits.REALLY_FOUR_BITS),
    "02_lora_config": (adapters.COUNT_ADAPTERS, adapters.RANK_COST),
    "03_prepare_data": (data.WRITE_LABELS, data.KEEP_ROWS_APART, data.REPAIR_A_FILE),
    "10_your_own_task": (own_task.SCORE_FIELDS, own_task.NO_LEAK),
    "04_train": (training.COUNT_STEPS, training.MAKE_IT_FIT),
    "05_monitor": (watching.CLIP_GRADIENTS, watching.STOP_IN_TIME, watching.GO_BACK),
    "06_evaluate": (judging.MAY_YOU_CLAIM_IT, judging.FOOL_THE_SCORE),
    "11_leaving": (certified.ONE_BYTE, leaving.GGUF_SIZE),
    "07_scale_out": (cost.CHEAPEST_MACHINE,),
    "08_clean_up": (cleaning.CLEAN_WITHOUT_LOSS,),
}
"""The exercises of each notebook, in the order of the course."""

__all__ = [
    "BROKEN_SETTINGS",
    "BY_NOTEBOOK",
    "LEAKING_PROMPT",
    "REFERENCE",
    "TOO_LARGE",
    "all_exercises",
    "broken_file",
    "today",
]


def all_exercises() -> dict[str, Exercise]:
    """Returns every exercise by its name, in the order of the course."""
    return {each.name: each for several in BY_NOTEBOOK.values() for each in several}


def today() -> _today.Today:
    """Returns the exercises that the teacher has shown, and which solutions are open, by the board that `QLORA_BOARD` names."""
    return _today.today(BY_NOTEBOOK)


def __getattr__(name: str) -> Exercise:
    """Gives an exercise by its name, such as `exercises.quantise`."""
    try:
        return all_exercises()[name]
    except KeyError:
        raise AttributeError(f"there is no exercise {name!r}; there are {', '.join(all_exercises())}") from None
