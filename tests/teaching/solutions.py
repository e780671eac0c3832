"""The solution of each exercise; of exercises on files, a function that writes one into a folder."""

from __future__ import annotations

from qlora_helpers.teaching.exercises import (
    adapters,
    cost,
    data,
    four_bits,
    judging,
    own_task,
    primer,
    setup,
    training,
    watching,
)
from tests.teaching.wrong_answers import SETTINGS, file_with, lines


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
    "extend_a_path": setup.extended,
    "repair_settings": SETTINGS,
    "score_fields": own_task.field_f1,
    "no_leak": {"data.prompt": "What is the mood?\n{subject}\n{body}", "data.answer": "{mood}"},
    "count_steps": training.steps,
    "make_it_fit": {"train.micro_batch_size": 2, "train.gradient_accumulation_steps": 8},
    "clip_gradients": watching.clipped,
    "stop_in_time": watching.stop,
    "may_you_claim_it": judging.verdict,
    "fool_the_score": judging.FOOL_THE_SCORE.solution_is,
    "cheapest_machine": cost.cheapest,
    "repair_a_file": file_with(repaired),
}
