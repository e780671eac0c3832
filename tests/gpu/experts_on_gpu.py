"""Adapters on a mixture's experts on a GPU, in bfloat16: gradients against the one-by-one path, and what the backward pass holds.

    .venv/bin/python tests/gpu/experts_on_gpu.py

On a GPU the experts' matrix multiplications are grouped, and experts without a token are groups without a row. Runs on a CPU too,
where the memory is not looked at.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_helpers.base.config import AdapterConfig
from qlora_helpers.model import expert_stacks
from qlora_helpers.model.lora import add_adapters
from qlora_helpers.model.quantizer import stacks_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS, EXPERTS, HIDDEN, INNER = 8, 16, 256, 512
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": INNER},
    "gpt_oss": {"num_local_experts": EXPERTS, "intermediate_size": INNER, "sliding_window": 128},
}
LARGEST_ERROR = 0.03  # of the gradients' norm; both paths round to bfloat16, in other orders


def built(family: str, experts: str) -> Any:
    """A mixture with packed experts and adapters on them that add something."""
    sizes = {"vocab_size": 512, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 64, "num_experts_per_tok": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **sizes | SHAPES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation=experts).to(DEVICE)
    for module, names in stacks_of(model):
        values = {name: module._parameters[name].data for name in names}
        expert_stacks.prepare_stacks(module, names, double_quantization=True, dtype=torch.bfloat16)
        for name in names:
            expert_stacks.pack_stack(module, name, values.pop(name))
    tuned = add_adapters(model, AdapterConfig(r=8, lora_dropout=0.0, target_modules=("q_proj", "experts")), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.empty(weight.shape).normal_(std=0.02, generator=generator))
    return tuned.train()


def gradients(model: Any, tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, set[int]], float]:
    """Returns the adapters' gradients, the experts that tokens were sent to, and the GiB that the step held beyond the model."""
    chosen: dict[str, set[int]] = {}
    for path, module in model.named_modules():
        if isinstance(module, expert_stacks.PackedStacks):
            module.register_forward_pre_hook(
                lambda module, inputs, path=path: chosen.update({path: set(inputs[1].flatten().tolist())})
            )
    ids = (torch.arange(tokens, device=DEVICE)[None] * 7 + 3) % 512
    before = 0
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    held = (torch.cuda.max_memory_allocated() - before) / 2**30 if DEVICE == "cuda" else 0.0
    return {name: each.grad for name, each in model.named_parameters() if each.requires_grad}, chosen, held


def idle_experts_moved(found: dict[str, torch.Tensor], chosen: dict[str, set[int]]) -> int:
    """Counts the experts that no token was sent to and whose adapter has a gradient all the same."""
    moved = 0
    for name, gradient in found.items():
        holder = next((path for path in chosen if name.startswith(path.partition(".base_layer")[0] + ".")), None)
        if holder is None:
            continue
        by_expert = gradient.reshape(EXPERTS, -1) if "lora_A" in name else gradient.reshape(-1, EXPERTS).T
        moved += sum(bool(by_expert[each].any()) for each in set(range(EXPERTS)) - chosen[holder])
    return moved


def main() -> int:
    """Prints a line for each family and number of tokens; returns 1 where one is wrong."""
    wrong = 0
    for family in SHAPES:
        for tokens in (3, 600):
            one_by_one, _, _ = gradients(built(family, "eager"), tokens)
            grouped, chosen, held = gradients(built(family, "grouped_mm"), tokens)
            both = [(grouped[name].float(), one_by_one[name].float()) for name in grouped]
            apart = sum(float((one - other).square().sum()) for one, other in both) ** 0.5
            size = sum(float(other.square().sum()) for _, other in both) ** 0.5
            moved = idle_experts_moved(grouped, chosen)
            finite = all(bool(torch.isfinite(one).all()) for one, _ in both)
            passed = apart <= LARGEST_ERROR * size and not moved and finite
            wrong += not passed
            line = {"family": family, "tokens": tokens, "error": round(apart / size, 5), "idle_experts_moved": moved}
            sums_gib = LAYERS * EXPERTS * 3 * HIDDEN * INNER * 2 / 2**30
            line |= {"held_gib": round(held, 4), "all_sums_gib": round(sums_gib, 4), "passed": passed}
            print(json.dumps(line), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
