"""A model is written by whichever process has made it."""

from __future__ import annotations

import os
import subprocess
import sys

SAVE = """
import sys
from pathlib import Path
from torch import distributed
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=int(sys.argv[2]), world_size=2)
sys.path.insert(0, sys.argv[3])
from tiny import tiny_llama
from qlora_helpers.model.saving import save_here
folder = Path(sys.argv[1], "made-" + sys.argv[2])
save_here(tiny_llama(), folder)
print(sorted(path.name for path in folder.iterdir()))
distributed.barrier()
"""


def test_a_process_that_is_not_the_first_writes_the_model_that_it_has_made(tmp_path):
    tests = os.path.dirname(os.path.dirname(__file__))
    started = [
        subprocess.Popen([sys.executable, "-c", SAVE, str(tmp_path), rank, tests], stdout=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert said[0] == said[1] and "config.json" in said[1] and "model.safetensors" in said[1]
