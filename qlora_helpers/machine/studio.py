"""SageMaker Studio as seen from inside one of its apps: which app this is, and telling it that somebody is at work.

Studio shuts an app down that has been idle for a while. JupyterLab's kernels and terminals count as work, a process of its own
does not; Studio also reads a file that holds the time of the last activity. What must be in it was read in the source of
jupyter_activity_monitor_extension (`idle_status_detector.py`): one UTC time, `2026-01-31T12:00:00.000000Z`; touching is not enough.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from pathlib import Path

STUDIO_METADATA = Path("/opt/ml/metadata/resource-metadata.json")
"""Written by SageMaker Studio into every app: which app this is."""
IDLE_FILE = Path("/tmp/.sagemaker-last-active-timestamp")


def this_app() -> dict[str, str]:
    """The app that this code runs in, as the arguments of `delete_app`, as far as Studio tells; empty elsewhere."""
    try:
        told = json.loads(STUDIO_METADATA.read_text())
    except (OSError, ValueError):
        return {}
    names = {"DomainId": "DomainId", "SpaceName": "SpaceName", "AppType": "AppType", "ResourceName": "AppName"}
    return {ours: told[theirs] for theirs, ours in names.items() if theirs in told}


def say_busy() -> bool:
    """Tells Studio that the app is at work now; returns whether it was told. Elsewhere nothing is written.

    `$QLORA_STUDIO_IDLE_FILE` names another file, for images that look elsewhere; it is then written on any machine.
    """
    other = os.environ.get("QLORA_STUDIO_IDLE_FILE")
    if not other and not this_app():
        return False
    path = Path(other) if other else IDLE_FILE
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
        with os.fdopen(handle, "w") as file:
            file.write(now)
        return True
    return False
