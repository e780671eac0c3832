"""An exported folder on the model hub: one commit, private unless asked, refused where its certificate or a file is not right.

Knows nothing of runs or models; the token stays huggingface_hub's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qlora_helpers.base.errors import ModelError
from qlora_helpers.export.certificate import FILE, WEIGHTS, require_certificate, require_merged

AGAIN = "Export the run again: export RUN."


def check_repository(repository: str) -> None:
    """Looks at a repository's name before anything long is done for it; asks no hub.

    Raises:
        ModelError: it can't be one.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ModelError("that is no name of a repository", expected="owner/name", got=repr(repository)) from error


def publish(folder: Path, repository: str, *, private: bool = True, say: Callable[[str], None] = print) -> str:
    """Uploads an exported folder (`adapter/` or `merged/`) to the hub, in one commit.

    The token is huggingface_hub's own (`hf auth login`, or HF_TOKEN): it is never taken, kept or shown here.

    Args:
        folder: holds a model card and a certificate.
        repository: `owner/name`; made where it is new.
        private: whether a new repository is private.
        say: told where it is.

    Returns:
        The repository's address.

    Raises:
        ModelError: the folder was not exported, its adapter did not pass, a file of it is not the one that was exported, or the
            hub refuses.
    """
    from huggingface_hub import HfApi, errors

    check_repository(repository)
    missing = [name for name in ("README.md", FILE) if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder.name}/ was not exported: no {' and no '.join(missing)}", next_step=AGAIN)
    links = [path.name for path in folder.rglob("*") if path.is_symlink()]
    if links:
        raise ModelError(f"{links[0]} is a link", expected="plain files", next_step=AGAIN)
    require = require_certificate if (folder / WEIGHTS).exists() else require_merged
    require(folder, next_step=AGAIN)
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=f"Upload {folder.name}")
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else "no code"
        raise ModelError(
            f"the hub refuses to write {repository} ({code})",
            next_step="Log in with a token that may write there: `hf auth login`.",
        ) from None  # the request that the error holds has the token in its header
    except (errors.OfflineModeIsEnabled, errors.HTTPError) as error:
        raise ModelError(
            f"the hub can't be reached to write {repository}",
            next_step=f"The folder {folder.name}/ is whole: try again.",
        ) from error
    address = f"{api.endpoint}/{repository}"
    say(f"Uploaded to {address}.")
    return address
