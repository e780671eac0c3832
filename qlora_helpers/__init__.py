"""Interactive QLoRA fine-tuning for JupyterLab and SageMaker Studio.

Importing the package imports no torch and prints nothing; each folder is a room whose docstring says what it holds.
"""

import logging

__version__ = "0.1.0"

# bitsandbytes notes at import, on some processors, that an optional kernel is not there; transformers and peft import it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)
