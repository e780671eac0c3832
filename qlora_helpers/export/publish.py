"""Publishes an exported folder on the model hub, and refuses one whose certificate or files are not in order.

Knows nothing of runs or models, and asks the hub through `model.hub`.
"""

from __future__ import annotations

from pathlib import Path

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.text import Say
from qlora_helpers.export.certificate import FILE, WEIGHTS, require_certificate, require_merged
from qlora_helpers.model import hub

EXPORT_AGAIN = "Export the run again: export RUN."


def publish(folder: Path, repository: str, *, private: bool = True, say: Say = print) -> str:
    """Uploads an exported folder (`adapter/` or `merged/`) to the hub in one commit.

    Args:
        folder: holds a model card and a certificate.
        repository: `owner/name`; it is created where it does not exist yet.
        private: whether a new repository is private.
        say: receives the repository's address.

    Returns:
        The repository's address.

    Raises:
        ModelError: the folder was not exported, its adapter did not pass, one of its files has changed since the export, or
            the hub refuses.
    """
    hub.check_repository(repository)
    missing = [name for name in ("README.md", FILE) if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder.name}/ was not exported: no {' and no '.join(missing)}", next_step=EXPORT_AGAIN)
    links = [path.name for path in folder.rglob("*") if path.is_symlink()]
    if links:
        raise ModelError(f"{links[0]} is a link", expected="plain files", next_step=EXPORT_AGAIN)
    require = require_certificate if (folder / WEIGHTS).exists() else require_merged
    require(folder, next_step=EXPORT_AGAIN)
    address = hub.upload_folder(folder, repository, private=private)
    say(f"Uploaded to {address}.")
    return address
