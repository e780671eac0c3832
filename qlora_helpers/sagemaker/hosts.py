"""The place of this machine among the instances of a SageMaker training job, for the job's script.

`python -m qlora_helpers.sagemaker.hosts /opt/ml` prints how many there are, this one's number and the first one's name.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from qlora_helpers.base.errors import UserError

RESOURCES = "input/config/resourceconfig.json"
"""Below /opt/ml; every container has it. `SM_HOSTS` and `SM_CURRENT_HOST` are set by SageMaker's own start script alone."""


def place_in_job(ml: Path, environment: Mapping[str, str] = os.environ) -> tuple[int, int, str]:
    """Returns how many instances the job has, this one's number, and the first one's name.

    Args:
        ml: /opt/ml.
        environment: for `SM_HOSTS` and `SM_CURRENT_HOST`, where there is no file.

    Raises:
        UserError: file or variables can't be read, or don't name this machine.
    """
    path = ml / RESOURCES
    source = path.name if path.exists() else "SM_HOSTS, SM_CURRENT_HOST"
    try:
        if path.exists():
            values = json.loads(path.read_text(encoding="utf-8"))
            hosts, mine = values["hosts"], values["current_host"]
        elif "SM_HOSTS" in environment:
            hosts, mine = json.loads(environment["SM_HOSTS"]), environment["SM_CURRENT_HOST"]
        else:
            return 1, 0, "localhost"
        ordered = sorted(map(str, hosts), key=lambda host: (len(host), host))  # algo-2 before algo-10
        return len(ordered), ordered.index(str(mine)), ordered[0]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            "the job's machines can't be told apart",
            expected="their names, and this machine's among them",
            got=f"{source}: {type(error).__name__}: {error}"[:300],
            next_step="Start the job anew; if it stays so, train on one instance.",
        ) from error


if __name__ == "__main__":
    try:
        print(*place_in_job(Path(sys.argv[1])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
