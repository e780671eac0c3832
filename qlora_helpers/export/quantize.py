"""Makes K-quants of a GGUF file with llama.cpp's own quantiser, where `llama-cpp-python` is installed.

The `gguf` package writes the older types; those with a K mix several precisions by llama.cpp's own rules. Knows nothing of runs.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from qlora_helpers.base.errors import ModelError
from qlora_helpers.export.gguf_file import WRITTEN
from qlora_helpers.export.llama_cpp_check import quietly

K_QUANTS = {
    "q2_k": "Q2_K",
    "q3_k_s": "Q3_K_S",
    "q3_k_m": "Q3_K_M",
    "q3_k_l": "Q3_K_L",
    "q4_k_s": "Q4_K_S",
    "q4_k_m": "Q4_K_M",
    "q5_k_s": "Q5_K_S",
    "q5_k_m": "Q5_K_M",
    "q6_k": "Q6_K",
}
"""Our names of the types -> llama.cpp's."""
INSTALL = "Install llama.cpp's quantiser: pip install llama-cpp-python (it is built for several minutes; needs cmake and gcc)."
KINDS = (*WRITTEN, *K_QUANTS)


def check_kind(kind: str) -> None:
    """Checks before anything is merged that a type can be written on this machine.

    Raises:
        ModelError: there is no such type, or its quantiser is not installed.
    """
    if kind not in KINDS:
        raise ModelError("that is no type of GGUF's values", expected=", ".join(KINDS), got=repr(kind))
    if kind in K_QUANTS and importlib.util.find_spec("llama_cpp") is None:
        raise ModelError(
            f"{kind} can't be written here: llama-cpp-python is not installed",
            next_step=f"{INSTALL} Without it, use --quantize q8_0, q5_1, q5_0, q4_1 or q4_0.",
        )


def quantize(source: Path, out: Path, kind: str) -> float:
    """Makes a K-quant of a bfloat16 file, with the same tokenizer and settings.

    Args:
        source: the bfloat16 file.
        out: the new file.
        kind: a key of `K_QUANTS`.

    Returns:
        The largest error of a tensor: the root of its mean squared error, as a share of the root of its mean square.

    Raises:
        ModelError: llama.cpp refuses, or the new file does not hold the same tensors.
    """
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{K_QUANTS[kind]}")
    settings.nthread = os.cpu_count() or 1
    with quietly():
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), settings)
    if code != 0 or not out.is_file():
        raise ModelError(f"llama.cpp could not write {kind}", got=f"code {code}", next_step="Use --quantize q8_0.")
    return _error(source, out)


def _error(source: Path, out: Path) -> float:
    import gguf
    import numpy as np

    before, after = ({tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (source, out))
    if before.keys() != after.keys():
        raise ModelError(f"{out.name} does not hold the tensors of {source.name}", next_step="Report this.")
    worst = 0.0
    for name, tensor in before.items():
        one = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        other = gguf.quants.dequantize(after[name].data, after[name].tensor_type)
        size = float(np.sqrt(np.mean(np.square(one, dtype=np.float64))))
        off = float(np.sqrt(np.mean(np.square(one.astype(np.float64) - other))))
        worst = max(worst, off / size if size else off)
    return worst
