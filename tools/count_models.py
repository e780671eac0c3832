"""Counts the catalogued models that arithmetic does not know, and writes `model/shapes/counted.json`, which a plan reads.

`python tools/count_models.py` after a change of `model/shapes/recent.py` or of `model/built_sizes.py`; `--check` writes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from qlora_helpers.model.built_sizes import build, count
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.model.shapes.counted import KEPT, digest
from qlora_helpers.model.shapes.wirings import WIRINGS

PATH = Path(__file__).parent.parent / "qlora_helpers" / "model" / "shapes" / KEPT


def counted() -> str:
    """Returns the text of the file: one line a model, so that a change shows."""
    lines = []
    for shape in SHAPES.values():
        if shape["model_type"] not in WIRINGS:
            sizes = dataclasses.asdict(count(build(shape), shape["model_type"]))
            lines.append(f'"{digest(shape)}": {json.dumps(sizes)}')
    return '{"sizes": {\n' + ",\n".join(lines) + "\n}}\n"


def main() -> int:
    """Writes the file, or says whether it is what it should be."""
    text = counted()
    if "--check" in sys.argv[1:]:
        same = PATH.read_text(encoding="utf-8") == text
        print("counted.json is up to date" if same else "counted.json is out of date: python tools/count_models.py")
        return 0 if same else 1
    PATH.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
