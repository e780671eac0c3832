"""FP8 on the path that a GPU takes: Triton's kernels, `torch._scaled_mm`, compiled and checkpointed layers, CUDA graphs.

    python tests/gpu/fp8_on_gpu.py OUT.json

The kernels against plain torch and float64; for each layout, a step in FP8 against the same step in float32, and against the step
in FP8 that is neither compiled, checkpointed nor captured: they must agree as two steps in bfloat16 do. Ends with an error
where something is off. `tests/training/fast_step/test_fp8.py` emulates the same on a CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional as F
import torch
from fast_step_on_gpu import LAYOUTS, LENGTH, ROWS, block_of, built, gradients, pack_weights, relative_error

from qlora_helpers import workflow
from qlora_helpers.data.batches import AllLogits, BlockDiagonalMask, RowBounds, SequenceCollator, TrainedTokens
from qlora_helpers.training import train
from qlora_helpers.training.fast_step import fp8, fp8_kernels
from qlora_helpers.training.fast_step.parts import fast_step

CASES = ((False, 0, False), (True, 0, False), (False, 3, False), (True, 2, False), (True, 0, True), (True, 2, True))
"""Whether layers are compiled, how many are checkpointed, whether passes are captured; the first is what the others must equal."""


def kernel_errors() -> list[dict[str, Any]]:
    """Share of values that differ from plain torch's, and the largest error against float64 in units of the last place."""
    found = []
    for rows, columns in ((4096, 4096), (1024, 4096), (130, 576), (8192, 32768)):
        torch.manual_seed(rows)
        packed, state = F.quantize_4bit(
            torch.randn(rows, columns, device="cuda") * 0.02, compress_statistics=True, quant_type="nf4"
        )
        rest = (state.code, state.state2.code, state.state2.absmax, state.offset, [rows, columns])
        exact = fp8_kernels.nf4_values(packed, state.absmax, *rest)
        for transposed in (False, True):
            values = exact.t() if transposed else exact
            inverse = 448 / values.abs().amax(1)
            got = fp8_kernels.nf4_to_fp8(packed, state.absmax, inverse, *rest, transposed).float()
            scaled = values * inverse[:, None]
            units = ((got - scaled).abs() / (scaled.abs() * 2**-4 + 2**-10)).max()
            plain = scaled.clamp(-448, 448).to(fp8_kernels.E4M3).float()
            found.append(
                {
                    "kernel": "weights",
                    "shape": [rows, columns],
                    "transposed": transposed,
                    "half_units": float(units),
                    "differ": float((got != plain).float().mean()),
                    "passed": bool(units <= 1.001),
                }
            )
    for rows, columns in ((37, 576), (4096, 4096), (512, 14336), (256, 32768)):
        x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * torch.logspace(
            -20, 20, rows, device="cuda"
        ).unsqueeze(1).to(torch.bfloat16)
        x[0], x[1, 3], x[2, 5] = 0, float("inf"), float("nan")
        got, scales = fp8_kernels.rows_to_fp8(x)
        values = got.float() * scales
        apart = (values[3:].double() - x[3:].double()).norm(dim=1) / x[3:].double().norm(dim=1)
        spoilt = not values[1].sum().isfinite() and not values[2].sum().isfinite() and bool(values[0].eq(0).all())
        passed = spoilt and bool(values[3:].isfinite().all()) and bool(apart.max() < 0.04)
        found.append({"kernel": "rows", "shape": [rows, columns], "error": float(apart.max()), "passed": passed})
    return found


def steps(name: str) -> list[dict[str, Any]]:
    """A step in FP8 in all ways, against float32, bfloat16 and the plainest way."""
    blocks = [block_of(lengths, seed) for seed, lengths in enumerate(ROWS["packed"])]
    plain = SequenceCollator(0, BlockDiagonalMask(), AllLogits(), length=LENGTH)(blocks)
    exact_model, model = built(LAYOUTS[name], torch.float32), built(LAYOUTS[name], torch.bfloat16)
    exact_model.load_state_dict({path: tensor.float() for path, tensor in model.state_dict().items()})
    pack_weights(model, exact_model)
    exact_loss, exact = gradients(exact_model, plain)
    found, first = [], None
    for in_fp8, cases in ((False, CASES[:1]), (True, CASES)):
        for compiled, checkpointed, captured in cases:
            with fast_step(
                model,
                packed=True,
                longest=LENGTH,
                compiled=compiled,
                checkpointed=checkpointed,
                captured=captured,
                fp8=in_fp8,
            ) as on:
                collator = SequenceCollator(0, RowBounds(5), TrainedTokens(200 if captured else None), length=LENGTH)
                for seed in range(10, 10 + 3 * captured):
                    gradients(model, collator([block_of(ROWS["packed"][0], seed) for _ in blocks]))
                loss, gradient = gradients(model, collator(blocks))
                replayed = on.graphs.replayed if on.graphs else 0
                case = {
                    "layout": name,
                    "fp8": str(on.fp8) if on.fp8 else None,
                    "compiled": on.compiled,
                    "checkpointed": on.checkpointed,
                    "skipped": on.skipped,
                    "replayed": replayed,
                    "reasons": on.why_off,
                    "loss_error": abs(loss - exact_loss) / exact_loss,
                    "gradient_error": relative_error(gradient, exact),
                }
            if in_fp8:
                first = gradient if first is None else first
                case["apart_from_first"] = relative_error(gradient, first)
                case["passed"] = (
                    case["fp8"] is not None
                    and not case["reasons"]
                    and case["gradient_error"] < 0.25
                    and case["apart_from_first"] < 0.12  # values in bfloat16 that round to another number in FP8
                    and case["compiled"] == compiled
                    and bool(case["skipped"]) == bool(checkpointed)
                    and bool(replayed) == captured
                )
            else:
                case["passed"] = True
            found.append(case)
    return found


def main() -> None:
    """Kernels, then steps; fails after the last where one is off."""
    device = torch.device("cuda")
    fp8.PHASE_STEP = 0.0  # so that every pass rounds weights alike
    results: dict[str, Any] = {"machine": train.machine_name(device), "versions": workflow.versions()}
    results["refusal"] = fp8._card_refusal(device)
    results["kernels"] = kernel_errors()
    results["steps"] = []
    for name in LAYOUTS:
        results["steps"] += steps(name)
        Path(sys.argv[1]).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    cases = results["kernels"] + results["steps"]
    for case in cases:
        print(json.dumps(case))
    failed = [case for case in cases if not case["passed"]]
    print(f"{len(cases) - len(failed)} of {len(cases)} passed; refusal: {results['refusal']}")
    sys.exit(bool(failed) or results["refusal"] is not None)


if __name__ == "__main__":
    main()
