"""Times one real 4-bit training step at the size of the demo's model, and prints it as JSON; preflight.py starts this.

The weights are random, so nothing is downloaded; the loader's audit counts that every layer is in NF4. Run by the environment's
Python, with a limit on its time that preflight.py sets.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
TOKENS, SEQUENCES = 256, 1
RECORD = ROOT / "benchmarks" / "demo_two_cores.json"


def main() -> int:
    """Prints `tokens_per_s`, the layers in 4 bits, and the minutes that the whole demo takes at that speed."""
    import torch

    from qlora_helpers.base.config import AdapterConfig, ModelConfig
    from qlora_helpers.model.loading import load_model
    from qlora_helpers.model.lora import add_adapters

    loaded = load_model(ModelConfig(name="random:smollm2-135m"), say=lambda text: None)
    model = add_adapters(loaded.model, AdapterConfig(lora_dropout=0.0), seed=0, say=lambda text: None)
    device = next(model.parameters()).device
    ids = torch.randint(5, 1000, (SEQUENCES, TOKENS), device=device)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    seconds = []
    for _ in range(2):  # the first one also warms up
        started = time.monotonic()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    speed = SEQUENCES * TOKENS / min(seconds)
    found = {
        "tokens_per_s": round(speed, 1),
        "device": device.type,
        "layers": loaded.audit.quantized,
        "demo_minutes": demo_minutes(speed),
    }
    print(json.dumps(found))
    return 0


def demo_minutes(tokens_per_s: float) -> float:
    """The minutes of `make demo` at a speed: those that were measured on two cores, in proportion to the tokens a second."""
    run = json.loads(RECORD.read_text(encoding="utf-8"))["runs"][0]
    return round(run["demo_seconds"] * run["measured"]["tokens_per_s"] / tokens_per_s / 60, 1)


if __name__ == "__main__":
    sys.exit(main())
