"""What a hub's own jupyterhub_config.py takes over: threads by user, and models and the board in common.

LEARNERS is how many sit there at once. The folders are made as hub.md says.
"""

from __future__ import annotations

import os

LEARNERS = int(os.environ.get("QLORA_LEARNERS", "30"))
FOLDER = os.environ.get("QLORA_HUB", "/srv/qlora")


def environment(cores: int, learners: int = LEARNERS, folder: str = FOLDER) -> dict[str, str]:
    """Returns the variables of every learner's server: a fair share of the cores, and one place for models and the board."""
    threads = str(max(1, cores // max(1, learners)))
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": f"{folder}/hf",
        "HF_HUB_OFFLINE": "1",
        "QLORA_BOARD": f"{folder}/board",
    }


if "get_config" in globals():  # JupyterHub gives it to its configuration files
    c = get_config()  # type: ignore[name-defined]  # noqa: F821
    c.Spawner.environment.update(environment(os.cpu_count() or 1))
    c.Spawner.mem_limit = "5G"  # a trainer of the profile demo holds 3.1 GiB
