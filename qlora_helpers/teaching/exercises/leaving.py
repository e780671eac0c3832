"""The exercise of notebook 11: how many bytes a file of quantised weights takes."""

from __future__ import annotations

import random
from typing import Any

from qlora_helpers.teaching.exercise import Exercise, Wrong, call, distinct, number_of

BITS = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
"""Bits of a weight, and GGUF's name of the type that stores them with one scale of 2 bytes for 32 weights."""


def gguf_bytes(weights, bits):
    """The solution of `gguf_size`."""
    block = 32 * bits // 8 + 2
    return weights // 32 * block


def _judge_size(function: Any) -> str:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for bits, name in BITS.items():
        in_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]

        def draw(bits: int = bits, in_block: int = in_block, block_bytes: int = block_bytes) -> tuple[Any, Any]:
            weights = in_block * random.randint(1_000, 4_000_000)
            return weights, {
                "right": weights // in_block * block_bytes,
                "no-scale": weights * bits / 8,
                "scale-each": weights * (bits / 8 + 2),
                "in-bits": weights // in_block * 8 * block_bytes,
                "bits-as-bytes": weights // in_block * (in_block * bits + 2),
            }

        weights, values = distinct(draw)
        got = number_of(call(function, weights, bits))
        if got == values["right"]:
            continue
        facts = {"weights": f"{weights:,}", "name": name, "right": f"{values['right']:,}", "got": f"{got:,.0f}"}
        for code, value in values.items():
            if code != "right" and abs(got - value) < 1:
                raise Wrong(code, **facts)
        raise Wrong(message="{weights} weights in {name} take {right} bytes; your function says {got}.".format(**facts))
    return "Q4_0, Q5_0 and Q8_0 take as many bytes in the gguf library: 4.5, 5.5 and 8.5 bits a weight."


GGUF_SIZE = Exercise(
    name="gguf_size",
    title="How large is the file?",
    kind="write",
    minutes=5,
    question="Write gguf_bytes(weights, bits): each 32 weights are stored as 32 whole numbers of so many bits and one scale of 2 "
    "bytes. How many bytes do all the weights take? (Their number is a multiple of 32.)",
    judge=_judge_size,
    misconceptions={
        "no-scale": "{got} bytes are the numbers alone: each block of 32 has its scale, too, which makes {right} bytes in {name}.",
        "scale-each": "That gives every weight a scale of its own; 32 weights share one, so {name} takes {right} bytes.",
        "in-bits": "That is the size in bits: {name} takes {right} bytes, an eighth of it.",
        "bits-as-bytes": "The numbers are counted as {name}'s bits and the scale as bytes: 8 bits are a byte, so it is {right}.",
    },
    hints=(
        "How many blocks of 32 are there, and how many bytes has one of them?",
        "With 8 bits a block has 32 bytes of numbers and 2 of scale, 34 in all.",
    ),
    solution_is=gguf_bytes,
)
