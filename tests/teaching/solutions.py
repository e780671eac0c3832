"""The solution of each exercise; of exercises on files, a function that writes one into a folder."""

from __future__ import annotations

from qlora_helpers.teaching import exercises
from tests.teaching.wrong_answers import SETTINGS, file_with, lines


def repaired(rows):
    rows[3]["messages"][1]["role"] = "assistant"
    rows[7]["messages"].append({"role": "assistant", "content": "There is Wi-Fi."})
    return lines(rows)


SOLUTIONS = {
    "write_a_loss": exercises.primer.loss,
    "one_step": exercises.primer.step,
    "quantise": exercises.four_bits.quantise,
    "really_four_bits": exercises.four_bits.repair,
    "count_adapters": exercises.adapters.adapter_parameters,
    "rank_cost": 5.8,
    "write_labels": exercises.data.labels,
    "keep_rows_apart": exercises.data.may_attend,
    "extend_a_path": exercises.setup.extended,
    "repair_settings": SETTINGS,
    "score_fields": exercises.own_task.field_f1,
    "no_leak": {"data.prompt": "What is the mood?\n{subject}\n{body}", "data.answer": "{mood}"},
    "count_steps": exercises.training.steps,
    "make_it_fit": {"train.micro_batch_size": 2, "train.gradient_accumulation_steps": 8},
    "clip_gradients": exercises.watching.clipped,
    "stop_in_time": exercises.watching.stop,
    "go_back": exercises.watching.last_healthy,
    "may_you_claim_it": exercises.judging.verdict,
    "fool_the_score": exercises.judging.FOOL_THE_SCORE.solution_is,
    "one_byte": exercises.certified.is_certified,
    "gguf_size": exercises.leaving.gguf_bytes,
    "cheapest_machine": exercises.cost.cheapest,
    "clean_without_loss": exercises.cleaning.may_go,
    "repair_a_file": file_with(repaired),
}
