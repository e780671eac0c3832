"""What the process of a preview runs: writes rows as tokens with the run's own tokenizer, and imports no torch.

Reads one JSON object a line (`model` and `data` settings, and an `example`) and prints one: the row's tokens, what happens to each,
and which turns are trained. Nothing is downloaded or converted: a tokenizer that is not on this disk is one message. Started by
`views.widgets.preview`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import DataConfig, ModelConfig
from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.base.files import cache_root
from qlora_helpers.data.examples import Example, Message
from qlora_helpers.data.row_view import seen_row
from qlora_helpers.data.templates import template_of
from qlora_helpers.data.token_texts import token_kind, token_texts
from qlora_helpers.model.checkpoints import Checkpoint
from qlora_helpers.model.gguf_files import WHEELS
from qlora_helpers.model.hub import is_hub_id
from qlora_helpers.model.shapes.catalog import SHAPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TOKENS = 3000
"""A longer row is shown up to here."""
TOKENIZER = "tokenizer.json"


class _NoTorch(MetaPathFinder):
    """Hides torch from transformers, which would take seconds to import it and needs it for nothing here."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "torch" or name.startswith("torch."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def hide_torch() -> None:
    """Makes this process one without torch."""
    sys.meta_path.insert(0, _NoTorch())
    import importlib.util

    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "torch" else found(name, package)


def checkpoint_on_disk(config: ModelConfig) -> Checkpoint:
    """Returns where a model's tokenizer is on this disk.

    Raises:
        ModelError: it is not there (yet).
    """
    name = config.name
    folder, origin = _folder(config)
    if folder is None:
        raise ModelError(
            f"the tokenizer of {name[:100]} is not on this disk yet",
            next_step="The row is shown as tokens once the model was loaded, or planned by `ql.new_run`.",
        )
    return Checkpoint(name, folder, origin)


def _folder(config: ModelConfig) -> tuple[Path | None, str]:
    name, cache = config.name, cache_root()
    if name.startswith("random:"):
        folder = cache / "random" / name.removeprefix("random:")
        known = name.removeprefix("random:") in SHAPES and (folder / TOKENIZER).is_file()
        return folder if known else None, "random"
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return _only(cache / "dequantised", path.stem), "gguf"
    if path.is_dir():
        return path if (path / TOKENIZER).is_file() else None, "folder"
    if is_hub_id(name):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, TOKENIZER, revision=config.revision)
        if isinstance(found, str):
            return Path(found).parent, "hub"
    if name in WHEELS:
        return _only(cache / "dequantised", Path(WHEELS[name].gguf_file).stem), "wheel"
    return None, ""


def _only(folder: Path, stem: str) -> Path | None:
    """Returns the only folder that was made of a file of this name; of several, nobody knows which is meant."""
    found = [each for each in folder.glob(f"{stem}-*") if (each / TOKENIZER).is_file()]
    return found[0] if len(found) == 1 else None


def example_from(values: dict[str, Any]) -> Example:
    """Returns the row that `dataclasses.asdict` and JSON made plain values of."""
    messages = tuple(
        Message(
            **each
            | {"tool_calls": tuple(each["tool_calls"]), "body": None if each["body"] is None else tuple(each["body"])}
        )
        for each in values["messages"]
    )
    tuples = {key: tuple(values[key]) for key in ("tools", "references")}
    return Example(**values | tuples | {"messages": messages})


def shown_row(tokenizer: PreTrainedTokenizerBase, data: DataConfig, example: Example) -> dict[str, Any]:
    """Returns a row as plain values: `texts` and `kinds` of its tokens, their number `tokens`, and what `row_view.SeenRow` says."""
    template = template_of(data, tokenizer)
    seen = seen_row(example, template, data)
    found: dict[str, Any] = {"template": template.name, "template_notes": list(template.notes)}
    found |= {
        "trained": sorted(seen.trained),
        "masked": list(seen.masked.items()),
        "left_out": seen.left_out,
        "notes": list(seen.notes),
        "texts": [],
        "kinds": [],
        "tokens": 0,
        "trained_tokens": 0,
    }
    if seen.rows:
        row = seen.rows[0]
        ids, labels = row.input_ids[:MOST_TOKENS], row.labels[:MOST_TOKENS]
        kinds = [token_kind(*pair, 1, tokenizer.eos_token_id) for pair in zip(ids, labels, strict=True)]
        found |= {"texts": token_texts(ids, tokenizer), "kinds": kinds, "tokens": len(row)}
        found["trained_tokens"] = sum(end - start for start, end in row.trained)
    return found


def main() -> None:
    """Answers requests until the input ends."""
    hide_torch()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    from qlora_helpers.model.tokenizers import tokenizer_of

    answers, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not print into an answer
    tokenizers: dict[ModelConfig, PreTrainedTokenizerBase] = {}
    idle_s = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    signal.alarm(idle_s)
    for line in sys.stdin:
        signal.alarm(0)
        asked = json.loads(line)
        try:
            model = ModelConfig(**asked["model"])
            if model not in tokenizers:
                tokenizers.clear()
                tokenizers[model] = tokenizer_of(checkpoint_on_disk(model))
            found = shown_row(tokenizers[model], DataConfig(**asked["data"]), example_from(asked["example"]))
        except UserError as error:
            found = {"error": str(error)}
        print(json.dumps(found), file=answers, flush=True)
        signal.alarm(idle_s)  # nobody asks any more: the process ends


if __name__ == "__main__":
    main()
