"""Exercises of notebook 01: quantise a block by hand, and find out whether a model really is in 4 bits."""

from __future__ import annotations

from typing import Any

from qlora_helpers.teaching.exercise import Exercise, Wrong, call


def quantise(block, levels):
    """The solution of `quantise`."""
    largest = block.abs().max()
    nearest = (block[:, None] / largest - levels[None, :]).abs().argmin(dim=1)
    return levels[nearest] * largest


def _judge_quantise(function: Any) -> str:
    import torch
    from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit

    levels = get_4bit_type("nf4", device="cpu")
    even = torch.linspace(-1, 1, 16)
    for size in (0.01, 1.0, 30.0):
        block = torch.randn(64) * size
        block[0] = -block.abs().max() * 1.5  # the largest is below zero, so that leaving out the absolute value shows
        right = dequantize_4bit(*quantize_4bit(block, blocksize=64, quant_type="nf4")).reshape(-1)
        got = call(function, block.clone(), levels.clone())
        if not isinstance(got, torch.Tensor) or got.shape != block.shape:
            raise Wrong(message=f"Return a tensor of shape {tuple(block.shape)}: each weight rounded, in its own size.")
        known = {
            "even-levels": _rounded(block, block.abs().max(), even),
            "standard-deviation": _rounded(block, block.std(), levels),
            "no-absolute": _rounded(block, block.max(), levels),
            "not-scaled-back": right / block.abs().max(),
            "not-scaled": _rounded(block, torch.tensor(1.0), levels),
        }
        if torch.allclose(got.float(), right, rtol=1e-5, atol=1e-6 * size):
            continue
        for code, value in known.items():
            if torch.allclose(got.float(), value, rtol=1e-4, atol=1e-6 * size):
                raise Wrong(code)
        if torch.equal(got, block):
            raise Wrong("unchanged")
        worst = int((got.float() - right).abs().argmax())
        raise Wrong(
            message=f"Weight {worst} of a block is {float(block[worst]):.4g}: bitsandbytes makes {float(right[worst]):.4g} "
            f"of it, "
            f"and you {float(got[worst]):.4g}."
        )
    return "Three drawn blocks agree with bitsandbytes, small and large ones: one scale a block, and the nearest level a weight."


def _rounded(block: Any, scale: Any, levels: Any) -> Any:
    return levels[(block[:, None] / scale - levels[None, :]).abs().argmin(dim=1)] * scale


QUANTISE = Exercise(
    name="quantise",
    title="Quantise a block by hand",
    kind="write",
    minutes=8,
    question="Write quantise(block, levels): 64 weights and the 16 levels of NF4 go in, the 64 rounded weights come out.",
    judge=_judge_quantise,
    misconceptions={
        "even-levels": "Your levels lie at equal distances. NF4's are closer together near zero, where most weights of a "
        "model are: "
        "use the levels that you are given.",
        "standard-deviation": "You scale by the standard deviation. Then the largest weights lie beyond the last level and "
        "are cut: "
        "NF4 scales by the largest absolute value, so that every weight lies between −1 and 1.",
        "no-absolute": "You scale by the largest weight and forgot the sign: in this block the largest in size is below zero. "
        "Take the largest absolute value.",
        "not-scaled-back": "Your weights lie between −1 and 1: multiply the levels by the block's scale again.",
        "not-scaled": "You compare the weights with the levels as they are. Divide them by the block's largest absolute "
        "value first.",
        "unchanged": "That is the block as it was. Nothing was rounded.",
    },
    hints=(
        "Three steps: find the block's scale, find each weight's nearest level, multiply by the scale.",
        "The scale is block.abs().max(). Divided by it, every weight lies between −1 and 1, as the levels do.",
        "(scaled[:, None] - levels[None, :]).abs().argmin(dim=1) is the number of each weight's nearest level.",
    ),
    solution_is=quantise,
)


def repair(checkpoint):
    """The solution of `really_four_bits`."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.models.falcon import modeling_falcon

    modeling_falcon.FalconLinear = torch.nn.Linear  # bitsandbytes replaces what is exactly nn.Linear
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=asked)


def _judge_four_bits(function: Any, checkpoint: Any = None) -> str:
    import contextlib
    import io

    from transformers.models.falcon import modeling_falcon
    from transformers.utils import logging

    from qlora_helpers.base.config import ModelConfig
    from qlora_helpers.base.errors import ModelError
    from qlora_helpers.model.checkpoints import find_checkpoint
    from qlora_helpers.model.loading import audit

    kept, level = modeling_falcon.FalconLinear, logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        folder = checkpoint or find_checkpoint(ModelConfig(name="random:falcon-tiny")).folder
        with contextlib.redirect_stderr(io.StringIO()):
            model = call(function, folder)
    finally:
        modeling_falcon.FalconLinear = kept
        logging.set_verbosity(level)
    if not hasattr(model, "modules"):
        raise Wrong(message=f"Return the model; got {type(model).__name__}.")
    try:
        found = audit(model, ModelConfig())
    except ModelError as error:
        code = "flag" if getattr(model, "is_loaded_in_4bit", False) else "not-asked"
        raise Wrong(code, error=str(error)) from None
    if found.quantized < found.expected:
        raise Wrong(message=f"{found.quantized} of {found.expected} linear layers are in 4 bits.")
    return f"The audit agrees: {found.quantized} of {found.expected} linear layers are in NF4, counted by their bytes."


REALLY_FOUR_BITS = Exercise(
    name="really_four_bits",
    title="Is it really in 4 bits?",
    kind="break and fix",
    minutes=6,
    question="Write repair(checkpoint), which loads a small Falcon with transformers so that its linear layers really are "
    "in NF4.",
    judge=_judge_four_bits,
    misconceptions={
        "flag": "`is_loaded_in_4bit` is True, and the layers are not in 4 bits: the flag says what was asked for. The "
        "audit counts bytes. "
        "It says: {error}",
        "not-asked": "Nobody asked for 4 bits: hand a BitsAndBytesConfig to from_pretrained. The audit says: {error}",
    },
    hints=(
        "bitsandbytes replaces layers whose type is exactly torch.nn.Linear. Which type do Falcon's layers have?",
        "Falcon's module, transformers.models.falcon.modeling_falcon, has its own FalconLinear, a subclass.",
        "Set modeling_falcon.FalconLinear = torch.nn.Linear before you load.",
    ),
    solution_is=repair,
)
