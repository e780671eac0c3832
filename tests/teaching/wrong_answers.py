"""For each misconception of each exercise, an answer of somebody who has it."""

from __future__ import annotations

import json
import math

from qlora_helpers.teaching import exercises


def softmax(scores, token):
    return math.exp(scores[token]) / sum(map(math.exp, scores))


def quantised(scale, levels_of=None, *, back=True):
    def quantise(block, levels):
        import torch

        levels = torch.linspace(-1, 1, 16) if levels_of == "even" else levels
        nearest = (block[:, None] / scale(block) - levels[None, :]).abs().argmin(dim=1)
        return levels[nearest] * (scale(block) if back else 1)

    return quantise


def largest(block):
    return block.abs().max()


def plain_load(checkpoint):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=asked)


def load_as_it_is(checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint)


def labelled(trained):
    """Labels from a rule that says of a place, its token and the rest whether it is trained."""

    def labels(ids, prompt_length, eos, pad):
        return [
            token if trained(place, token, ids, prompt_length, eos, pad) else -100 for place, token in enumerate(ids)
        ]

    return labels


def end_of(ids, prompt_length, eos):
    return ids.index(eos, prompt_length)


def shifted(ids, prompt_length, eos, pad):
    end = end_of(ids, prompt_length, eos)
    return [ids[place + 1] if prompt_length - 1 <= place < end else -100 for place in range(len(ids))]


def pairs(rule):
    def may_attend(rows):
        return [[rule(rows, i, j) for j in range(len(rows))] for i in range(len(rows))]

    return may_attend


def file_with(change):
    """A function that writes the exercise's file, changed, into a folder."""

    def write(folder):
        path = exercises.broken_file(folder)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(change(rows))
        return path

    return write


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


WRONG = {
    "write_a_loss": {
        "probability": softmax,
        "sign": lambda scores, token: math.log(softmax(scores, token)),
        "score": lambda scores, token: -scores[token],
        "base-2": lambda scores, token: -math.log2(softmax(scores, token)),
        "base-10": lambda scores, token: -math.log10(softmax(scores, token)),
        "mean": lambda scores, token: -math.log(softmax(scores, token)) / len(scores),
    },
    "one_step": {
        "uphill": lambda weight, gradient, rate: weight + rate * gradient,
        "no-rate": lambda weight, gradient, rate: weight - gradient,
        "sign-alone": lambda weight, gradient, rate: weight - math.copysign(rate, gradient),
        "no-weight": lambda weight, gradient, rate: -rate * gradient,
    },
    "quantise": {
        "even-levels": quantised(largest, "even"),
        "standard-deviation": quantised(lambda block: block.std()),
        "no-absolute": quantised(lambda block: block.max()),
        "not-scaled-back": quantised(largest, back=False),
        "not-scaled": quantised(lambda block: 1.0),
        "unchanged": lambda block, levels: block,
    },
    "really_four_bits": {"flag": plain_load, "not-asked": load_as_it_is},
    "count_adapters": {
        "one-matrix": lambda layers, r: sum(r * inputs for inputs, _ in layers),
        "other-matrix": lambda layers, r: sum(r * outputs for _, outputs in layers),
        "full": lambda layers, r: sum(inputs * outputs for inputs, outputs in layers),
        "square": lambda layers, r: sum(r * r * (inputs + outputs) for inputs, outputs in layers),
        "product": lambda layers, r: sum(r * inputs * outputs for inputs, outputs in layers),
    },
    "rank_cost": {"eightfold": 8 * 21.0, "weights-alone": 1.45, "whole": 6.6, "nothing": 0},
    "write_labels": {
        "prompt": labelled(lambda place, token, ids, prompt, eos, pad: place <= end_of(ids, prompt, eos)),
        "padding": labelled(lambda place, token, ids, prompt, eos, pad: place >= prompt),
        "end": labelled(lambda place, token, ids, prompt, eos, pad: prompt <= place < end_of(ids, prompt, eos)),
        "end-is-padding": labelled(lambda place, token, ids, prompt, eos, pad: place >= prompt and token != pad),
        "shifted": shifted,
        "other-token": lambda ids, prompt, eos, pad: [1 if place >= prompt else -100 for place in range(len(ids))],
        "answer-cut": labelled(lambda place, token, ids, prompt, eos, pad: prompt < place <= end_of(ids, prompt, eos)),
    },
    "keep_rows_apart": {
        "causal-alone": pairs(lambda rows, i, j: j <= i),
        "looks-ahead": pairs(lambda rows, i, j: rows[i] == rows[j]),
        "transposed": pairs(lambda rows, i, j: rows[i] == rows[j] and i <= j),
        "not-itself": pairs(lambda rows, i, j: rows[i] == rows[j] and j < i),
        "inverted": pairs(lambda rows, i, j: not (rows[i] == rows[j] and j <= i)),
    },
    "repair_a_file": {
        "refused": file_with(lambda rows: '{"messages": [' + lines(rows)),
        "deleted": file_with(lambda rows: lines(rows[:3] + rows[4:7] + rows[8:])),
        "skipped": file_with(lines),
    },
}
"""Exercise -> misconception -> an answer; of exercises on files, a function that writes one into a folder."""

ON_FILES = ("repair_a_file",)
