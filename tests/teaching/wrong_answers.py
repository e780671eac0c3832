"""For each misconception of each exercise, an answer of somebody who has it."""

from __future__ import annotations

import json
import math

from qlora_helpers.export.certificate import SETTINGS as ADAPTER_SETTINGS
from qlora_helpers.export.certificate import WEIGHTS, read_certificate, sha256
from qlora_helpers.teaching import exercises
from qlora_helpers.teaching.exercises import cleaning, judging, watching


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


def half_repaired(rows):
    rows[3]["messages"][1]["role"] = "assistant"
    return lines(rows)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


SETTINGS = {"train.learning_rate": 0.0002, "adapter.r": 8, "data.template": "plain", "train.epochs": 1}


def right(wanted, given):
    return sum(wanted.get(key) == value for key, value in given.items())


def norm(tensors):
    return sum(float((each**2).sum()) for each in tensors) ** 0.5


def first_rise(losses, patience):
    place = next((place for place in range(1, len(losses)) if losses[place] > losses[place - 1]), len(losses) - 1)
    return place, losses.index(min(losses[: place + 1]))


def not_paired(before, after):
    """The interval of two groups that have nothing to do with each other."""
    count = len(before)
    means = [sum(each) / count for each in (before, after)]
    spreads = [sum((x - mean) ** 2 for x in each) / count for each, mean in zip((before, after), means, strict=True)]
    wide = 2 * (sum(spreads) / count) ** 0.5
    difference = means[1] - means[0]
    if abs(difference) > 5:
        return judging.verdict(before, after)
    return "better" if difference > wide else "worse" if difference < -wide else "can't tell"


def jump_of(norms):
    return next(step for step, norm in enumerate(norms, start=1) if norm > 10 * norms[0])


def is_hash_of(folder, name):
    found = read_certificate(folder)
    return sha256(folder / name) == {WEIGHTS: found.weights_sha256, ADAPTER_SETTINGS: found.settings_sha256}[name]


def parts(items, *names):
    return [each for each in items if each.id.rpartition("/")[2] in names]


def state_of(item):
    return item.run.status().state


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
    "extend_a_path": {
        "overwrites": lambda current, folder: folder,
        "appends": lambda current, folder: ":".join([*filter(None, current.split(":")), folder]),
        "empty-part": lambda current, folder: ":".join(dict.fromkeys([folder, *current.split(":")])),
        "doubles": lambda current, folder: ":".join(filter(None, [folder, current])),
    },
    "repair_settings": {
        "refused": exercises.BROKEN_SETTINGS,
        "dropped": {"train.epochs": 1},
        "changed": SETTINGS | {"train.epochs": 3},
    },
    "score_fields": {
        "precision": lambda wanted, given: right(wanted, given) / len(given),
        "recall": lambda wanted, given: right(wanted, given) / len(wanted),
        "keys-alone": lambda wanted, given: 2 * len(set(wanted) & set(given)) / (len(wanted) + len(given)),
        "per-cent": lambda wanted, given: 200 * right(wanted, given) / (len(wanted) + len(given)),
        "mean": lambda wanted, given: right(wanted, given) * (1 / len(given) + 1 / len(wanted)) / 2,
    },
    "no_leak": {
        "leak": exercises.LEAKING_PROMPT,
        "other-answer": {"data.prompt": "{body}", "data.answer": "{urgency}"},
        "nothing-to-read": {"data.prompt": "{subject}", "data.answer": "{mood}"},
        "unknown-column": {"data.prompt": "{boddy} {body}", "data.answer": "{mood}"},
    },
    "count_steps": {
        "drops-the-last": lambda n, micro, passes, epochs: n // (micro * passes) * epochs,
        "no-accumulation": lambda n, micro, passes, epochs: math.ceil(n / micro) * epochs,
        "one-epoch": lambda n, micro, passes, epochs: math.ceil(math.ceil(n / micro) / passes),
        "rows": lambda n, micro, passes, epochs: n * epochs,
        "rounds-at-the-end": lambda n, micro, passes, epochs: math.ceil(n * epochs / micro / passes),
        "fraction": lambda n, micro, passes, epochs: n * epochs / micro / passes,
    },
    "make_it_fit": {
        "rank": {"adapter.r": 1},
        "no-effect": {"train.learning_rate": 1e-4},
        "other-step": {"train.micro_batch_size": 1},
        "not-enough": {"train.micro_batch_size": 4, "train.gradient_accumulation_steps": 4},
        "refused": {"train.micro_batch_size": "small"},
    },
    "clip_gradients": {
        "always-scales": lambda gradients, most: [each * most / norm(gradients) for each in gradients],
        "each-value": lambda gradients, most: [each.clamp(-most, most) for each in gradients],
        "each-tensor": lambda gradients, most: [each * min(1.0, most / norm([each])) for each in gradients],
        "sum": lambda gradients, most: [
            each * min(1.0, most / sum(float(part.abs().sum()) for part in gradients)) for each in gradients
        ],
        "no-root": lambda gradients, most: [each * min(1.0, most / norm(gradients) ** 2) for each in gradients],
        "never": lambda gradients, most: gradients,
    },
    "stop_in_time": {
        "keeps-the-last": lambda losses, patience: (watching.stop(losses, patience)[0],) * 2,
        "never-stops": lambda losses, patience: (len(losses) - 1, watching.stop(losses, patience)[1]),
        "first-rise": first_rise,
        "one-late": lambda losses, patience: (
            min(watching.stop(losses, patience)[0] + 1, len(losses) - 1),
            watching.stop(losses, patience)[1],
        ),
    },
    "go_back": {
        "newest": lambda norms, saved: saved[-1],
        "one-late": lambda norms, saved: max((step for step in saved if step < jump_of(norms)), default=0),
        "never-starts-over": lambda norms, saved: watching.last_healthy(norms, saved) or saved[0],
        "always-starts-over": lambda norms, saved: 0,
    },
    "may_you_claim_it": {
        "mean-alone": lambda before, after: "better" if sum(after) > sum(before) else "worse",
        "not-paired": not_paired,
        "counts-wins": lambda before, after: (
            judging.verdict(before, after)
            if judging.verdict(before, after) == "can't tell"
            else "better"
            if sum(b > a for a, b in zip(before, after, strict=True)) > 15
            else "worse"
        ),
        "never-sure": lambda before, after: "can't tell",
        "wrong-way": lambda before, after: judging.verdict(after, before),
    },
    "fool_the_score": {
        "same": exercises.REFERENCE,
        "low": "Anna can come.",
        "still-true": exercises.REFERENCE.replace("and the candles", "and candles"),
    },
    "one_byte": {
        "refuses-all": lambda folder: False,
        "reads-the-verdict-alone": lambda folder: read_certificate(folder).passed,
        "weights-alone": lambda folder: is_hash_of(folder, WEIGHTS) and read_certificate(folder).passed,
        "hashes-alone": lambda folder: is_hash_of(folder, WEIGHTS) and is_hash_of(folder, ADAPTER_SETTINGS),
    },
    "gguf_size": {
        "no-scale": lambda weights, bits: weights * bits / 8,
        "scale-each": lambda weights, bits: weights * (bits / 8 + 2),
        "in-bits": lambda weights, bits: weights // 32 * (32 * bits + 16),
        "bits-as-bytes": lambda weights, bits: weights // 32 * (32 * bits + 2),
    },
    "cheapest_machine": {
        "price-an-hour": lambda machines, tokens, hours: min(machines, key=lambda each: each[1])[0],
        "fastest": lambda machines, tokens, hours: max(machines, key=lambda each: each[2])[0],
        "deadline": lambda machines, tokens, hours: min(machines, key=lambda each: each[1] / each[2])[0],
    },
    "clean_without_loss": {
        "result": lambda items: parts(items, "checkpoints", "adapter"),
        "running": lambda items: [
            each for each in parts(items, "checkpoints") if state_of(each) in ("finished", "running")
        ],
        "what-is-small": lambda items: [each for each in parts(items, "data", "rest") if state_of(each) == "finished"],
        "resume": lambda items: [each for each in parts(items, "checkpoints") if state_of(each) != "running"],
        "too-careful": lambda items: cleaning.may_go(items)[:1],
    },
    "repair_a_file": {
        "refused": file_with(lambda rows: '{"messages": [' + lines(rows)),
        "deleted": file_with(lambda rows: lines(rows[:3] + rows[4:7] + rows[8:])),
        "skipped": file_with(half_repaired),
    },
}
"""Exercise -> misconception -> an answer; of exercises on files, a function that writes one into a folder."""

ON_FILES = ("repair_a_file",)
