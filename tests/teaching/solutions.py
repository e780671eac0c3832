"""The solution of each exercise; of exercises on files, a function that writes one into a folder."""

from __future__ import annotations

from qlora_helpers.teaching.exercises import adapters, data, four_bits, primer
from tests.teaching.wrong_answers import file_with, lines


def repaired(rows):
    rows[3]["messages"][1]["role"] = "assistant"
    rows[7]["messages"].append({"role": "assistant", "content": "There is Wi-Fi."})
    return lines(rows)


SOLUTIONS = {
    "write_a_loss": primer.loss,
    "one_step": primer.step,
    "quantise": four_bits.quantise,
    "really_four_bits": four_bits.repair,
    "count_adapters": adapters.adapter_parameters,
    "rank_cost": 5.8,
    "write_labels": data.labels,
    "keep_rows_apart": data.may_attend,
    "repair_a_file": file_with(repaired),
}
