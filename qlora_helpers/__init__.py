"""Interactive QLoRA fine-tuning for JupyterLab and SageMaker Studio.

Importing the package imports no torch and prints nothing; import the module you need:
`config` and `run` (what was asked, and its folder), `environment` (the machine), `models`, `lora`, `data`, `training`,
`evaluation` (the steps), `workflow` (a whole run).
"""

import logging

__version__ = "0.1.0"

# bitsandbytes notes at import, on some processors, that an optional kernel is not there; transformers and peft import it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)
