"""Pictures of the concepts that the notebooks explain, drawn from numbers that are computed here; imports no torch.

Each function returns a `Drawing`, which a notebook shows as an image and a terminal as a description.
"""

from qlora_helpers.teaching.drawings.canvas import Drawing
from qlora_helpers.teaching.drawings.machines import run_folder, several_gpus
from qlora_helpers.teaching.drawings.rows import masked_row, packed_rows
from qlora_helpers.teaching.drawings.steps import four_curves, training_loop
from qlora_helpers.teaching.drawings.weights import levels, low_rank, quantised_block

__all__ = [
    "Drawing",
    "four_curves",
    "levels",
    "low_rank",
    "masked_row",
    "packed_rows",
    "quantised_block",
    "run_folder",
    "several_gpus",
    "training_loop",
]
