"""SageMaker Studio as seen from inside one of its apps: which app this is, and how to report activity to it.

Studio shuts an app down that has been idle for a while. JupyterLab's kernels and terminals count as activity, a background
process does not; but Studio also reads a file that holds the time of the last activity. Its format is in the source of
jupyter_activity_monitor_extension (`idle_status_detector.py`): one UTC time, `2026-01-31T12:00:00.000000Z`. Touching the file is
not enough.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from pathlib import Path

STUDIO_METADATA = Path("/opt/ml/metadata/resource-metadata.json")
"""SageMaker Studio writes into every app which app it is."""
IDLE_FILE = Path("/tmp/.sagemaker-last-active-timestamp")


def this_app() -> dict[str, str]:
    """Returns the app that this code runs in, as the arguments of `delete_app`, as far as Studio says; empty elsewhere."""
    try:
        found = json.loads(STUDIO_METADATA.read_text())
    except (OSError, ValueError):
        return {}
    names = {"DomainId": "DomainId", "SpaceName": "SpaceName", "AppType": "AppType", "ResourceName": "AppName"}
    return {ours: found[theirs] for theirs, ours in names.items() if theirs in found}


def report_activity() -> bool:
    """Reports to Studio that the app is active now, and returns whether it did. Outside Studio it writes nothing.

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
