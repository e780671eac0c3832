"""The fast step on the path that a GPU takes: the variable-length kernel, 16 bits, compiled and recomputed layers, CUDA graphs.

    python tests/gpu/fast_step_on_gpu.py OUT.json [LAYOUT ...]

For each layout, packed and padded: loss and gradients against the plain path in float32, beside what the plain path itself loses in
16 bits; and a packed row's logits, and those of the row alone in 16 bits, against the row's alone in float32. Ends with an error
where the fast step is less exact than the plain one.
On a CPU it does the same without a kernel or compilation. `tests/test_fast_step.py` has the equality in float64.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_helpers import workflow
from qlora_helpers.base.config import AdapterConfig
from qlora_helpers.data.batches import (
    AllLogits,
    PaddingMask,
    RowBounds,
    SequenceCollator,
    TrainedTokens,
)
from qlora_helpers.model.lora import add_adapters
from qlora_helpers.model.nf4 import keep_gradients_exact_on_cpu
from qlora_helpers.training.fast_step import graphs
from qlora_helpers.training.fast_step.parts import fast_step
from qlora_helpers.training.result import machine_name
from qlora_helpers.training.row_isolation import plain_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH, VOCABULARY = 128, 512
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
_FALCON = _COMMON | {"model_type": "falcon", "bias": False, "alibi": False, "parallel_attn": True}
_GROUPED = _COMMON | {"num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512, "pad_token_id": 0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "falcon-40b": _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-7b": _FALCON | {"new_decoder_architecture": False, "multi_query": True},
    "llama": _GROUPED | {"model_type": "llama"},
    "qwen3": _GROUPED | {"model_type": "qwen3"},
    # windows shorter than rows, in all layers and in every other one; attention sinks
    "mistral": _GROUPED | {"model_type": "mistral", "sliding_window": 16},
    "gpt_oss": _GROUPED
    | {
        "model_type": "gpt_oss",
        "sliding_window": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "attention_bias": False,
    }
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}
SKIPPED = {"falcon-40b": 2, "falcon-7b": 2, "gpt_oss": 0}
"""Unused outputs that a layer skips while it recomputes; 1 in the others."""
CASES = (
    ("packed", False, 2, False, False),
    ("packed", True, 1, False, False),
    ("packed", False, 1, True, False),
    ("packed", True, 2, True, False),
    ("padded", False, 0, False, False),
    ("packed", False, 3, False, True),
    ("packed", True, 2, True, True),
)
"""Rows, whether layers are compiled, how many recompute, whether passes are recorded, whether linear layers are in 4 bits."""
ROWS = {"packed": [[50, 40, 1, 30], [70, 58]], "padded": [[90], [40], [128]]}


def built(shape: dict[str, Any], dtype: torch.dtype) -> Any:
    """A small model with 32-bit adapters that add something."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).to(DEVICE, dtype)
    model.config.use_cache = False
    adapted = add_adapters(model, AdapterConfig(r=8, lora_dropout=0.0), seed=0)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=draw) * 0.05).to(DEVICE)
    return adapted.train()


def pack_weights(model: Any, exact: Any) -> None:
    """Puts the decoder layers' linear layers into 4 bits (NF4, double quantisation), and their values into an exact model."""
    import bitsandbytes

    same = dict(exact.named_modules())
    for path, module in list(model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        plain = module.base_layer
        packed = bitsandbytes.nn.Linear4bit(
            plain.in_features,
            plain.out_features,
            plain.bias is not None,
            compute_dtype=plain.weight.dtype,
            quant_type="nf4",
        )
        packed.load_state_dict(plain.state_dict())
        module.base_layer = packed.to(DEVICE).requires_grad_(False)
        values = bitsandbytes.functional.dequantize_4bit(packed.weight, packed.weight.quant_state)
        same[path].base_layer.weight.data = values.float()
    keep_gradients_exact_on_cpu(model)


def block_of(lengths: list[int], seed: int) -> dict[str, list[int]]:
    """Rows of random tokens; the second half of each is trained."""
    draw = torch.Generator().manual_seed(seed)
    block: dict[str, list[int]] = {"input_ids": [], "labels": [], "segment_ids": [], "row_ids": []}
    for number, length in enumerate(lengths, 1):
        row = torch.randint(1, VOCABULARY, (length,), generator=draw).tolist()
        block["input_ids"] += row
        block["labels"] += [-100] * (length // 2) + row[length // 2 :]
        block["segment_ids"] += [number] * length
        block["row_ids"].append(number)
    return block


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Loss, and the gradients of all adapters in one vector."""
    model.zero_grad(set_to_none=True)
    loss = model(**send_to_device(batch, DEVICE))["loss"]
    loss.backward()
    parts = [p.grad.flatten().float() for name, p in sorted(model.named_parameters()) if p.grad is not None]
    return loss.item(), torch.cat(parts)


def compared(
    name: str, rows: str, compiled: bool, checkpointed: int, captured: bool, packed_weights: bool
) -> dict[str, Any]:
    """Relative errors of the fast step and of the plain path, both in 16 bits; a recorded pass is played on other blocks first."""
    packed = rows == "packed"
    blocks = [block_of(lengths, seed) for seed, lengths in enumerate(ROWS[rows])]
    length = LENGTH if packed else None
    exact_model, model = built(LAYOUTS[name], torch.float32), built(LAYOUTS[name], torch.bfloat16)

    def plain(of: Any) -> dict[str, Any]:
        attention = plain_attention(of, LENGTH) if packed else PaddingMask()
        return SequenceCollator(0, attention, AllLogits(), length=length)(blocks)

    weights = {path: tensor.float() for path, tensor in model.state_dict().items()}
    exact_model.load_state_dict(weights)
    if packed_weights:
        pack_weights(model, exact_model)
    exact_loss, exact = gradients(exact_model, plain(exact_model))
    in_16_bits = plain(model)
    with torch.autocast(DEVICE, torch.bfloat16):
        plain_loss, usual = gradients(model, in_16_bits)
    lengths = ROWS[rows]
    alone_exact = logits_alone(exact_model, blocks, lengths)
    with fast_step(model, packed=packed, longest=LENGTH, compiled=False, checkpointed=0):
        alone = logits_alone(model, blocks, lengths)

    def collator_of(on: Any) -> SequenceCollator:
        attention = plain_attention(model, LENGTH) if packed else PaddingMask()
        if packed and on.block_diagonal:
            attention = RowBounds(5)
        return SequenceCollator(0, attention, TrainedTokens(200 if captured else None), length=length)

    def check(on: Any) -> None:  # as training does before anything is compiled
        with torch.no_grad():
            model(**send_to_device(collator_of(on)(blocks), DEVICE))

    with fast_step(
        model,
        packed=packed,
        longest=LENGTH,
        compiled=compiled,
        checkpointed=checkpointed,
        captured=captured,
        check=check,
    ) as on:
        collator = collator_of(on)
        for seed in range(10, 10 + 3 * captured):
            gradients(model, collator([block_of(lengths[::-1], seed) for lengths in reversed(ROWS[rows])]))
        fast_loss, fast = gradients(model, collator(blocks))
        together = logits_packed(model, collator, blocks, lengths) if packed else alone
        again_loss, again = gradients(model, collator(blocks))  # recorded anew where it was recorded before
        replayed = on.graphs.replayed if on.graphs else 0
        found = {
            "block_diagonal": on.block_diagonal,
            "compiled": on.compiled,
            "checkpointed": on.checkpointed,
            "skipped": on.skipped,
            "in_4_bits": packed_weights,
            "replayed": replayed,
            "reasons": on.why_off,
        }
    errors = {
        "fast_gradient_error": float((fast - exact).norm() / exact.norm()),
        "plain_gradient_error": float((usual - exact).norm() / exact.norm()),
        "fast_loss_error": abs(fast_loss - exact_loss) / exact_loss,
        "plain_loss_error": abs(plain_loss - exact_loss) / exact_loss,
        "row_packed_error": relative_error(together, alone_exact) if packed else None,
        "row_alone_error": relative_error(alone, alone_exact),
        "again_error": max(relative_error(again, fast), abs(again_loss - fast_loss) / exact_loss),
    }
    return {"layout": name, "rows": rows} | found | errors


def logits_alone(model: Any, blocks: list[dict[str, list[int]]], lengths: list[list[int]]) -> torch.Tensor:
    """Each row of the blocks asked by itself, without starts of rows: `(tokens of all rows, vocabulary)`."""
    found = []
    for block, rows in zip(blocks, lengths, strict=True):
        for start, length in zip((sum(rows[:row]) for row in range(len(rows))), rows, strict=True):
            ids = torch.tensor(block["input_ids"][start : start + length], device=DEVICE)[None]
            with torch.no_grad():
                found.append(model(input_ids=ids).logits[0].float())
    return torch.cat(found)


def logits_packed(
    model: Any, collator: SequenceCollator, blocks: list[dict[str, list[int]]], lengths: list[list[int]]
) -> torch.Tensor:
    """The same tokens' logits, the rows side by side in their blocks."""
    batch = collator(blocks)
    asked = {name: value.to(DEVICE) for name, value in batch.items() if "label" not in name and "trained" not in name}
    with torch.no_grad():
        logits = model(**asked).logits.float()
    return torch.cat([block[: sum(rows)] for block, rows in zip(logits, lengths, strict=True)])


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def main() -> None:
    """All layouts, or those that are named; fails after the last where one is off."""
    graphs.MIN_REPLAYS = 1  # so that an evaluation in between is followed by another recording
    results: dict[str, Any] = {"machine": machine_name(torch.device(DEVICE)), "versions": workflow.versions()}
    results["cases"] = []
    for name in sys.argv[2:] or LAYOUTS:
        for chosen in CASES:
            case = compared(name, *chosen)
            *_, checkpointed, captured, _ = chosen
            case["passed"] = (
                case["fast_gradient_error"] <= 1.2 * case["plain_gradient_error"] + 1e-3
                and case["fast_loss_error"] <= 1.2 * case["plain_loss_error"] + 1e-3
                and (case["row_packed_error"] or 0) <= 1.2 * case["row_alone_error"] + 1e-3
                and case["again_error"] <= 1e-3
                and case["block_diagonal"] == (chosen[0] == "packed")
                and case["skipped"] == (SKIPPED.get(name, 1) if checkpointed else 0)
                and case["replayed"] == (3 if captured and DEVICE == "cuda" else 0)
            )
            results["cases"].append(case)
            print(json.dumps(case), flush=True)
            Path(sys.argv[1]).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    failed = [case for case in results["cases"] if not case["passed"]]
    print(f"{len(results['cases']) - len(failed)} of {len(results['cases'])} passed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
