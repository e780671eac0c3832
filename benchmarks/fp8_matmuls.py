"""What FP8 costs and gains a multiplication, on one GPU: rates, what rounding and unpacking take, and errors beside NF4's own.

    python benchmarks/fp8_matmuls.py OUT.json [--tokens 16384]

Shapes are those of a Llama of 8 B and of Falcon-40B; numbers are drawn from a normal distribution. Times are medians on the GPU's
own clock (`triton.testing.do_bench`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as F
import torch
from triton.testing import do_bench

from qlora_helpers import workflow
from qlora_helpers.training import train
from qlora_helpers.training.fast_step import fp8_kernels

SHAPES = {
    "llama q, o": (4096, 4096),
    "llama k, v": (1024, 4096),
    "llama gate, up": (14336, 4096),
    "llama down": (4096, 14336),
    "falcon query_key_value": (9216, 8192),
    "falcon dense": (8192, 8192),
    "falcon dense_h_to_4h": (32768, 8192),
    "falcon dense_4h_to_h": (8192, 32768),
}


def timed(work: Any) -> float:
    """Milliseconds, the median."""
    return do_bench(work, warmup=10, rep=40, return_mode="median")


def measured(name: str, tokens: int) -> dict[str, Any]:
    """One weight's multiplications, forward and backward."""
    rows, columns = SHAPES[name]
    torch.manual_seed(0)
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    upstream = torch.randn(tokens, rows, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02
    packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    rest = (state.code, state.state2.code, state.state2.absmax, state.offset, [rows, columns])
    values = F.dequantize_4bit(packed, state)
    scales = [values.abs().amax(along).float() / fp8_kernels.LARGEST for along in (1, 0)]

    def unpacked(transposed: bool) -> torch.Tensor:
        return fp8_kernels.nf4_to_fp8(packed, state.absmax, 1 / scales[transposed], *rest, transposed)

    inverse = [1 / each for each in scales]
    by_row, by_column = unpacked(False), unpacked(True)
    (xq, xs), (gq, gs) = fp8_kernels.rows_to_fp8(x), fp8_kernels.rows_to_fp8(upstream)

    def product(values: Any, value_scales: Any, weight: Any, weight_scales: Any, fast: bool) -> torch.Tensor:
        return torch._scaled_mm(
            values,
            weight.t(),
            scale_a=value_scales,
            scale_b=weight_scales.unsqueeze(0),
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )

    def error(found: torch.Tensor, exact: torch.Tensor) -> float:
        return round(float((found.float() - exact.float()).norm() / exact.float().norm()), 5)

    some = slice(0, 2048)
    exact = x[some].float() @ weight.float().t()
    tera = 2 * tokens * rows * columns / 1e9
    times = {
        "bf16_forward": timed(lambda: x @ values.t()),
        "bf16_backward": timed(lambda: upstream @ values),
        "fp8_forward_fast": timed(lambda: product(xq, xs, by_row, scales[0], True)),
        "fp8_forward": timed(lambda: product(xq, xs, by_row, scales[0], False)),
        "fp8_backward_fast": timed(lambda: product(gq, gs, by_column, scales[1], True)),
        "fp8_backward": timed(lambda: product(gq, gs, by_column, scales[1], False)),
        "unpack_bf16": timed(lambda: F.dequantize_4bit(packed, state)),
        "unpack_fp8": timed(lambda: fp8_kernels.nf4_to_fp8(packed, state.absmax, inverse[0], *rest, False)),
        "unpack_fp8_transposed": timed(lambda: fp8_kernels.nf4_to_fp8(packed, state.absmax, inverse[1], *rest, True)),
        "round_rows": timed(lambda: fp8_kernels.rows_to_fp8(x)),
    }
    return {
        "name": name,
        "rows": rows,
        "columns": columns,
        "tokens": tokens,
        "ms": {part: round(ms, 4) for part, ms in times.items()},
        "tflops": {part: round(tera / ms, 1) for part, ms in times.items() if part[:4] in ("bf16", "fp8_")},
        "error_of_nf4": error(x[some] @ values.t(), exact),
        "error_of_fp8_fast": error(product(xq[some], xs[some], by_row, scales[0], True), x[some] @ values.t()),
        "error_of_fp8": error(product(xq[some], xs[some], by_row, scales[0], False), x[some] @ values.t()),
        "error_of_both": error(product(xq[some], xs[some], by_row, scales[0], True), exact),
    }


def main() -> None:
    """All shapes; writes after each."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("out", type=Path)
    options.add_argument("--tokens", type=int, default=16384)
    chosen = options.parse_args()
    results: dict[str, Any] = {"machine": train.machine_name(torch.device("cuda")), "versions": workflow.versions()}
    results["cases"] = []
    for name in SHAPES:
        results["cases"].append(measured(name, chosen.tokens))
        print(json.dumps(results["cases"][-1]), flush=True)
        chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
