"""Where the notebooks live: the large volume, the model cache on it, and a Jupyter kernel of our own.

Knows SageMaker's places (Studio's JupyterLab spaces and notebook instances) and the Hugging Face variables that name
the cache; nothing about models or what is in the cache. Standard library alone. What it prints holds no path.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_helpers.errors import UserError
from qlora_helpers.telemetry import read_disk

# Both survive a stop of the instance; everything else on its disk is small or lost.
STUDIO_VOLUME = Path("/home/sagemaker-user")
NOTEBOOK_INSTANCE_VOLUME = Path("/home/ec2-user/SageMaker")
KERNEL_VARIABLES = ("HF_HOME", "LD_LIBRARY_PATH")


@dataclass(frozen=True, repr=False)
class ModelCache:
    """The folder into which models are downloaded, where that is in words, and its free space in GiB."""

    folder: Path
    place: str
    free_gib: float

    def __repr__(self) -> str:  # no path: it may be stored in a notebook
        return f"Model cache: {self.place}, {self.free_gib:.1f} GiB free"


@dataclass(frozen=True, repr=False)
class RegisteredKernel:
    """A kernel that JupyterLab now offers, and the variables that it sets for its notebooks."""

    name: str
    display_name: str
    variables: tuple[str, ...]

    def __repr__(self) -> str:
        setting = f" It sets {' and '.join(self.variables)}." if self.variables else ""
        return f"Kernel registered: choose {self.display_name!r} at the top right of a notebook.{setting}"


def sagemaker_app(environ: Mapping[str, str] = os.environ) -> str | None:
    """Which part of SageMaker this runs in, in words; None outside of it."""
    app = environ.get("SAGEMAKER_APP_TYPE") or environ.get("SAGEMAKER_APP_TYPE_LOWERCASE")
    if app:
        return f"SageMaker Studio, {app} app"
    return "a SageMaker notebook instance" if NOTEBOOK_INSTANCE_VOLUME.is_dir() else None


def large_volume() -> Path | None:
    """SageMaker's large, lasting volume: of a Studio space, or of a notebook instance; None elsewhere."""
    for volume in (STUDIO_VOLUME, NOTEBOOK_INSTANCE_VOLUME):
        if volume.is_dir() and os.access(volume, os.W_OK):
            return volume
    return None


def model_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder into which huggingface_hub downloads models, by its own rules (`huggingface_hub/constants.py`)."""
    cache_home = environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache"))
    home = environ.get("HF_HOME", os.path.join(cache_home, "huggingface"))
    folder = environ.get("HF_HUB_CACHE", environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub")))
    return Path(os.path.expandvars(os.path.expanduser(folder)))


def set_model_cache(path: str | os.PathLike[str] | None = None) -> ModelCache:
    """Puts the model cache on the large volume, for this process and those it starts (HF_HOME).

    The access token is kept in the same place: log in to the hub after this, not before.

    Args:
        path: the folder to use as HF_HOME. None keeps HF_HOME where it is set, else takes SageMaker's large volume,
            else leaves the default.

    Raises:
        UserError: huggingface_hub is already imported and would not notice, or the folder can't be made.
    """
    volume = large_volume()
    home, place = None, "in its default place"
    if path is not None:
        home, place = Path(path).expanduser().absolute(), "in the folder you named"
    elif "HF_HOME" in os.environ:
        place = "where HF_HOME says"
    elif volume is not None:
        home, place = volume / ".cache" / "huggingface", "on the large volume"
    if home is not None and os.environ.get("HF_HOME") != str(home):
        _set_hf_home(home)
    for variable in ("HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"):  # huggingface_hub prefers these, the last one most
        place = f"where {variable} says" if variable in os.environ else place
    folder = model_cache_dir()
    return ModelCache(folder, place, read_disk(folder).free_gib)


def register_kernel(
    name: str = "qlora", display_name: str = "Python (QLoRA)", *, user: bool = True
) -> RegisteredKernel:
    """Registers this Python as a Jupyter kernel, with this process's HF_HOME and LD_LIBRARY_PATH.

    Needed where JupyterLab runs in another environment, such as SageMaker Distribution's: ours stays apart from it.

    Args:
        name: the kernel's name, as in a notebook's metadata.
        display_name: what JupyterLab shows.
        user: for this user, whichever environment the server runs in; False: for servers of this environment alone.

    Raises:
        UserError: ipykernel is missing, or it refuses the name.
    """
    command = [sys.executable, "-m", "ipykernel", "install", "--user" if user else "--sys-prefix"]
    command += ["--name", name, "--display-name", display_name]
    variables = tuple(variable for variable in KERNEL_VARIABLES if os.environ.get(variable))
    for variable in variables:
        command += ["--env", variable, os.environ[variable]]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            "the kernel could not be registered",
            got=reason,
            next_step="Install the requirements (pip install -r requirements.txt), then try again.",
        )
    return RegisteredKernel(name, display_name, variables)


def _set_hf_home(home: Path) -> None:
    if "huggingface_hub" in sys.modules:
        raise UserError(
            "huggingface_hub is already imported and would go on using its old cache",
            next_step="Restart the kernel and run this cell first.",
        )
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder for the model cache can't be made ({error.strerror})",
            next_step="Name another folder, one that you may write to.",
        ) from error
    os.environ["HF_HOME"] = str(home)
