"""Packed attention with soft-caps and heads wider than 256 values on a GPU: exactness, time, CUDA graphs, compiled layers.

    .venv/bin/python tests/gpu/attention_on_gpu.py OUT.json [--tiny] [--seconds 110] [--only gemma2]

For the heads of real models, each by every route that computes them (the variable-length kernel, flex attention, a mask): outputs
and gradients in bfloat16 against float64, the time and memory of a forward and backward pass of 8,192 packed tokens, and whether
it replays as a CUDA graph on other rows. Then whole small models with such heads take the fast step, compiled and captured, as
`fast_step_on_gpu.py` does with others. What fails is written down with its error's text, and the next case follows; a case that
would begin after `--seconds` is skipped. Ends with an error where something that was computed is wrong. `--tiny` runs small sizes
in float32, on a CPU too, where rows are attended to one by one and flex attention has no backward pass.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import fast_step_on_gpu
import torch
import torch._dynamo.config

from qlora_helpers import workflow
from qlora_helpers.base.files import write_json
from qlora_helpers.model import cuda_graphs
from qlora_helpers.model.attention import AttentionTerms
from qlora_helpers.training.fast_step.block_diagonal import WIDEST_HEAD, RowStarts, attend_within_rows
from qlora_helpers.training.fast_step.flex_rows import attend_by_flex, attend_under_mask, kind_of
from qlora_helpers.training.fast_step.layers import MOST_KINDS
from qlora_helpers.training.result import machine_name

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LARGEST_ERROR = 0.02  # of a norm, in bfloat16
LARGEST_ERROR_FLOAT32 = 1e-5
REPEATS = 5
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One layer's attention; `compiled` also computes it inside a function that is compiled, as layers are."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    tokens: int = 8192
    compiled: bool = False


# Gemma 2 caps at 50; here at 5, since scores of about 3 must show it and larger ones would round too much in bfloat16.
CASES = (
    Case("gemma-2-9b, all tokens", 16, 8, 256, scale=256**-0.5, softcap=5.0, compiled=True),
    Case("gemma-4-e2b, global", 8, 1, 512, scale=1.0, compiled=True),
    Case("gemma-2-9b, windowed", 16, 8, 256, scale=256**-0.5, window=1024, softcap=5.0),
    Case("gemma-4-31b, global", 32, 4, 512, scale=1.0),
    Case("gemma-2-27b, cut short", 32, 16, 128, scale=144**-0.5, softcap=5.0, tokens=8192 - 56),
    Case("llama-3.1-8b", 32, 8, 128),
    Case("gemma-4-e2b, windowed", 8, 1, 256, scale=1.0, window=512),
    Case("gpt-oss-20b, windowed", 64, 8, 64, window=128, sinks=True),
    Case("soft-cap, sinks and a window, wide", 8, 2, 512, window=300, softcap=5.0, sinks=True),
)
_GEMMA = fast_step_on_gpu._GROUPED | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, dict[str, Any]] = {
    "gemma2": _GEMMA
    | {"model_type": "gemma2", "head_dim": 256, "sliding_window": 16, "attn_logit_softcapping": 5.0}
    | {"final_logit_softcapping": 30.0, "attn_implementation": "eager"},  # only eager attention caps scores
    "gemma4": _GEMMA
    | {"model_type": "gemma4_text", "head_dim": 256, "global_head_dim": 512, "sliding_window": 16}
    | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0},
}


def inputs(case: Case, dtype: torch.dtype) -> tuple[Parts, torch.Tensor, torch.Tensor | None]:
    """Queries, keys and values, `(tokens, heads, head_dim)`; what comes back from above; and sinks."""
    draw = torch.Generator(DEVICE).manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw, device=DEVICE).to(dtype)

    # Scores of about 3 whatever the scale, so that a soft-cap and a wrong scale show.
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    query = drawn(case.tokens, case.heads, case.head_dim) * (3 / scale / case.head_dim**0.5)
    key, value = (drawn(case.tokens, case.kv_heads, case.head_dim) for _ in range(2))
    sinks = drawn(case.heads).float() if case.sinks else None
    return (query, key, value), drawn(case.tokens, case.heads, case.head_dim), sinks


def starts_of(case: Case, seed: int) -> torch.Tensor:
    """Where rows start: one of a single token, one of a quarter of all, some filled up; `(15,)`, int32."""
    draw = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(case.tokens - case.tokens // 4 - 1, generator=draw)[:9].sort().values + case.tokens // 4 + 1
    starts = [0, 1, *cuts.tolist(), *[case.tokens] * 4]
    return torch.tensor(starts, dtype=torch.int32, device=DEVICE)


def exact(case: Case, parts: Parts, upstream: torch.Tensor, sinks: Any, starts: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients in float64, one row after the other, by the definition."""
    given = [part.detach().double().requires_grad_() for part in parts]
    outs = []
    for first, end in pairwise(starts.tolist()):
        if end == first:
            continue
        query, key, value = (part[first:end].transpose(0, 1) for part in given)
        key, value = (part.repeat_interleave(case.heads // case.kv_heads, dim=0) for part in (key, value))
        scores = query @ key.mT * (case.head_dim**-0.5 if case.scale is None else case.scale)
        if case.softcap is not None:
            scores = case.softcap * (scores / case.softcap).tanh()
        back = torch.arange(end - first, device=DEVICE)[:, None] - torch.arange(end - first, device=DEVICE)
        scores = scores.masked_fill((back < 0) | (back >= (case.window or case.tokens)), float("-inf"))
        shares = scores.exp()
        one_more = 0 if sinks is None else sinks[:, None, None].double().exp()
        weights = shares / (shares.sum(-1, keepdim=True) + one_more)
        outs.append((weights @ value).transpose(0, 1))
    out = torch.cat(outs)
    out.backward(upstream.double())
    return [out.detach(), *(part.grad for part in given if part.grad is not None)]


def routes(case: Case, rows: RowStarts, terms: AttentionTerms) -> dict[str, Attend]:
    """By which routes a case is computed; the first is what training takes."""

    def flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = attend_by_flex(query, key, value, rows.masks, terms, case.window, 1)
        how = rows.masks.how[kind_of(query, key, terms)]
        if isinstance(how, str):  # then that was the mask's result
            raise RuntimeError(f"flex attention can't be used: {how}")
        return out

    def mask(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        first = rows.masks.mask(case.window, case.tokens).first
        return attend_under_mask(query, key, value, first, terms, 1)

    def training(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend_within_rows(query[None], key[None], value[None], rows, terms)[0]

    by_kernel = case.softcap is None and case.head_dim <= WIDEST_HEAD
    return {"training": training, "mask": mask} | ({"flex": flex} if by_kernel or DEVICE.type == "cpu" else {})


def passed_through(attend: Attend, parts: Parts, upstream: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients."""
    given = [part.detach().requires_grad_() for part in parts]
    out = attend(*given)
    return [out.detach(), *torch.autograd.grad(out, given, upstream)]


def errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> dict[str, float]:
    """Differences as shares of the norms."""
    pairs = zip(("out", "query", "key", "value"), found, expected, strict=True)
    return {name: float((one.double() - other).norm() / other.double().norm()) for name, one, other in pairs}


def cost(work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of a pass that ran before, the median of a few, and the GiB that it held beyond what there was."""
    if DEVICE.type == "cpu":
        begun = time.perf_counter()
        work()
        return {"ms": round(1e3 * (time.perf_counter() - begun), 3)}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    spans = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        spans.append(begin.elapsed_time(end))
    held = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {"ms": round(statistics.median(spans), 3), "held_gib": round(held, 3)}


def captured(case: Case, rows: RowStarts, attend: Attend, parts: Parts, upstream: torch.Tensor) -> dict[str, Any]:
    """Captures a pass with the making of its mask, and replays it on other rows; the difference from an uncaptured pass."""
    if DEVICE.type == "cpu":
        return {"error": "no CUDA graph on a CPU"}
    starts, others = starts_of(case, 0), starts_of(case, 1)
    found: list[torch.Tensor] = []

    def work() -> None:
        rows.begin(starts, case.tokens)
        found[:] = passed_through(attend, parts, upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = cuda_graphs.capture(work, pool=cuda_graphs.new_pool(), stream=stream)
    starts.copy_(others)
    graph.replay()
    torch.cuda.synchronize()
    replayed = [each.clone() for each in found]
    rows.begin(others, case.tokens)
    expected = passed_through(attend, parts, upstream)
    return {"error_of_replay": max(errors(replayed, expected).values())} | cost(graph.replay)


class Attempts(logging.Handler):
    """Collects what the package logs of tiles that didn't run."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage()[:3000])


def attempt(into: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    """Writes down what `work` returns, or its error's text and where it was raised."""
    try:
        into[name] = work()
    except Exception as error:  # whatever it is, the next case follows
        into[name] = {"error": f"{type(error).__name__}: {error}"[:1500], "at": traceback.format_exc()[-1500:]}
    return into[name]


def examined(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """All that is asked of one layer's attention."""
    parts, upstream, sinks = inputs(case, dtype)
    said: list[str] = []
    rows = RowStarts(DEVICE, case.tokens, said.append)
    starts = starts_of(case, 0)
    terms = AttentionTerms(case.scale, case.window, case.softcap, sinks)
    expected = exact(case, parts, upstream, sinks, starts)
    found: dict[str, Any] = {"case": asdict(case)}
    for route, attend in routes(case, rows, terms).items():
        result: dict[str, Any] = {}
        found[route] = result

        def measure(attend: Attend = attend, result: dict[str, Any] = result) -> dict[str, float]:
            rows.begin(starts, case.tokens)
            begun = time.perf_counter()
            result["errors"] = errors(passed_through(attend, parts, upstream), expected)
            result["first_s"] = round(time.perf_counter() - begun, 1)
            return cost(lambda: passed_through(attend, parts, upstream))

        attempt(result, "cost", measure)
        if route != "mask" and DEVICE.type == "cuda":
            attempt(result, "graph", lambda attend=attend: captured(case, rows, attend, parts, upstream))
        if route == "training" and case.compiled:
            rows.begin(starts, case.tokens)

            def compile_it(attend: Attend = attend) -> dict[str, float]:
                whole = torch.compile(lambda *given: attend(*given) * 1.0, dynamic=False)
                return errors(passed_through(whole, parts, upstream), expected)

            attempt(result, "compiled_errors", compile_it)
            rows.begin(starts_of(case, 1), case.tokens)  # a new batch must not find the mask of the last one
            other = exact(case, parts, upstream, sinks, starts_of(case, 1))
            attempt(
                result,
                "errors_of_next_batch",
                lambda attend=attend, other=other: errors(passed_through(attend, parts, upstream), other),
            )
    found["said"] = said
    found["how"] = [{"kind": str(kind), "options": how} for kind, how in rows.masks.how.items()]
    return found


def wrong_in(case: dict[str, Any], largest: float) -> list[str]:
    """What was computed and is not exact enough."""
    wrong = []
    for route in ("training", "mask", "flex"):
        result = case.get(route, {})
        for name in ("errors", "compiled_errors", "errors_of_next_batch", "graph"):
            measured = result.get(name, {})
            off = [measured[key] for key in ("out", "query", "key", "value", "error_of_replay") if key in measured]
            if any(not each <= largest for each in off):
                wrong.append(f"{route}: {name}")
    if "error" in case.get("training", {}).get("cost", {}):
        wrong.append("training: fails")
    return wrong


_built = fast_step_on_gpu.built


def calm(shape: dict[str, Any], dtype: torch.dtype) -> Any:
    """A model whose scores are of about 1: Gemma 4 leaves their scale to its norms, and random ones would choose one token."""
    model = _built(shape, dtype)
    for path, module in model.named_modules():
        if path.endswith("q_norm"):
            module.weight.data.fill_(shape["head_dim"] ** -0.5)
    return model


def model_case(name: str, tiny: bool) -> dict[str, Any]:
    """A whole small model on packed rows, compiled and captured on a GPU, against the plain path in float32."""
    from qlora_helpers.training.fast_step.block_diagonal import block_diagonal_refusal

    fast_step_on_gpu.LAYOUTS[name] = MODELS[name]
    fast_step_on_gpu.built = calm
    fast_step_on_gpu.graphs.MIN_REPLAYS = 1
    model = calm(MODELS[name], torch.bfloat16).get_base_model()
    refusal = block_diagonal_refusal(model, fast_step_on_gpu.LENGTH)
    compared = fast_step_on_gpu.compared(name, "packed", not tiny, 1, not tiny, False)
    exact_enough = compared["fast_gradient_error"] <= 1.2 * compared["plain_gradient_error"] + 1e-3
    return {"refusal": refusal, "passed": refusal is None and exact_enough} | compared


def main() -> int:
    """Goes through all cases; returns 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument("--only", help="cases and models whose name has this in it")
    asked = parser.parse_args()
    dtype, largest = (torch.float32, LARGEST_ERROR_FLOAT32) if asked.tiny else (torch.bfloat16, LARGEST_ERROR)
    begun = time.monotonic()
    results: dict[str, Any] = {
        "machine": machine_name(DEVICE),
        "versions": workflow.versions(),
        "cases": [],
        "models": [],
    }
    work: list[tuple[str, str, Callable[[], Any]]] = []
    for case in CASES:
        if asked.tiny:
            small = {"tokens": 150 if case.tokens % 128 else 128, "head_dim": case.head_dim // 16}
            case = replace(case, **small, window=case.window and 20, heads=2 * case.kv_heads, compiled=False)
        work.append(("cases", case.name, lambda case=case: examined(case, dtype)))
    models = [("models", name, lambda name=name: model_case(name, asked.tiny)) for name in MODELS]
    failed = 0
    attempts = Attempts()
    flex_log = logging.getLogger("qlora_helpers.training.fast_step.flex_rows")
    flex_log.addHandler(attempts)
    flex_log.setLevel(logging.INFO)
    with torch._dynamo.config.patch(recompile_limit=MOST_KINDS):
        for kind, name, job in [*work[:2], *models, *work[2:]]:
            if asked.only and asked.only not in name:
                continue
            at = time.monotonic() - begun
            entry: dict[str, Any] = {"name": name, "at_s": round(at, 1)}
            if at > asked.seconds:
                entry["skipped"] = f"{asked.seconds:g} s were over"
            else:
                attempt(entry, "found", job)
                found = entry["found"]
                entry["wrong"] = (
                    wrong_in(found, largest) if "case" in found else [] if found.get("passed") else ["model"]
                )
                failed += bool(entry["wrong"] or "error" in found)
            entry["refused_tiles"], attempts.texts = attempts.texts, []
            results[kind].append(entry)
            results["seconds"] = round(time.monotonic() - begun, 1)
            write_json(asked.out, results)
            print(json.dumps(entry), flush=True)
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
