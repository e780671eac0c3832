"""The notebooks' surroundings: a large volume with the model cache and the packages, and a Jupyter kernel of their own.

This module knows SageMaker's folders (Studio's JupyterLab spaces and notebook instances) and the Hugging Face variables that
name the cache, but nothing of models. It needs only the standard library, and what it prints contains no path.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_helpers.base.errors import UserError
from qlora_helpers.machine.telemetry import read_disk

# Both survive a stop of the instance; the rest of its disk is small or lost.
STUDIO_VOLUME = Path("/home/sagemaker-user")
NOTEBOOK_INSTANCE_VOLUME = Path("/home/ec2-user/SageMaker")
KERNEL_VARIABLES = ("HF_HOME", "LD_LIBRARY_PATH")
KERNEL_NAME, KERNEL_DISPLAY_NAME = "qlora", "Python (QLoRA)"
# Without CUDA the unpacked packages take 2.1 GiB (measured); PyTorch's CUDA libraries take several times as much.
PACKAGES_GIB = 10


@dataclass(frozen=True, repr=False)
class ModelCache:
    """The folder into which models are downloaded, a description of where it is, and its free space in GiB."""

    folder: Path
    place: str
    free_gib: float

    def __repr__(self) -> str:  # without a path, because a notebook may store it
        return f"Model cache: {self.place}, {self.free_gib:.1f} GiB free"


@dataclass(frozen=True, repr=False)
class RegisteredKernel:
    """A kernel that JupyterLab now offers, and the environment variables that it sets."""

    name: str
    display_name: str
    variables: tuple[str, ...]

    def __repr__(self) -> str:
        setting = f" It sets {' and '.join(self.variables)}." if self.variables else ""
        return f"Kernel registered: choose {self.display_name!r} at the top right of a notebook.{setting}"


def sagemaker_app(environ: Mapping[str, str] = os.environ) -> str | None:
    """Describes which part of SageMaker this process runs in; None outside SageMaker."""
    app = environ.get("SAGEMAKER_APP_TYPE") or environ.get("SAGEMAKER_APP_TYPE_LOWERCASE")
    if app:
        return f"SageMaker Studio, {app} app"
    return "a SageMaker notebook instance" if NOTEBOOK_INSTANCE_VOLUME.is_dir() else None


def large_volume() -> Path | None:
    """Returns SageMaker's large persistent volume, of a Studio space or a notebook instance; None elsewhere."""
    for volume in (STUDIO_VOLUME, NOTEBOOK_INSTANCE_VOLUME):
        if volume.is_dir() and os.access(volume, os.W_OK):
            return volume
    return None


def model_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Returns the folder into which huggingface_hub downloads models, by its own rules (`huggingface_hub/constants.py`)."""
    cache_home = environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache"))
    home = environ.get("HF_HOME", os.path.join(cache_home, "huggingface"))
    folder = environ.get("HF_HUB_CACHE", environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub")))
    return Path(os.path.expandvars(os.path.expanduser(folder)))


def set_model_cache(path: str | os.PathLike[str] | None = None) -> ModelCache:
    """Moves the model cache to the large volume, for this process and those it starts (HF_HOME).

    The access token is kept in the same folder, so log in to the hub after this call, not before.

    Args:
        path: the folder to use as HF_HOME. None keeps HF_HOME if it is set, else takes SageMaker's large volume, else keeps
            the default.

    Raises:
        UserError: huggingface_hub is already imported and would not notice the change, or the folder can't be created.
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


def own_python() -> Path:
    """Returns the Python to install packages into: this one, or on SageMaker that of an environment on the large volume.

    SageMaker's own environment stays unchanged: it is lost when the space stops, and other tools depend on its versions. The
    new environment is created without packages if it does not exist yet.

    Raises:
        UserError: the large volume has no room for the packages.
    """
    volume = large_volume()
    if volume is None or Path(sys.prefix).is_relative_to(volume):
        return Path(sys.executable)
    folder = volume / ".qlora-environment"
    if not (folder / "bin" / "python").exists():
        free_gib = read_disk(volume).free_gib
        if free_gib < PACKAGES_GIB:
            raise UserError(
                "the large volume has no room for the packages",
                expected=f"{PACKAGES_GIB} GiB free",
                got=f"{free_gib:.1f} GiB",
                next_step="Stop the space, raise its storage, and start it again.",
            )
        venv.create(folder, with_pip=True, symlinks=True)
    return folder / "bin" / "python"


def require_kernel(python: str | os.PathLike[str]) -> None:
    """Checks that this kernel runs a certain Python; if not, registers a kernel that does and asks the person to switch to it.

    Args:
        python: the result of `own_python()`, with the requirements installed.

    Raises:
        UserError: this kernel runs another Python, or a kernel could not be registered.
    """
    if Path(python) == Path(sys.executable) or Path(python).parent.parent == Path(sys.prefix):
        return
    kernel = register_kernel(python=python)
    raise UserError(
        "the packages are installed beside this kernel, not in it",
        next_step=f"Choose the kernel {kernel.display_name!r} at the top right, then run this notebook from the top.",
    )


def register_kernel(
    name: str = KERNEL_NAME,
    display_name: str = KERNEL_DISPLAY_NAME,
    *,
    user: bool = True,
    python: str | os.PathLike[str] | None = None,
) -> RegisteredKernel:
    """Registers a Python as a Jupyter kernel, with this process's HF_HOME and LD_LIBRARY_PATH.

    This is needed if JupyterLab runs in another environment, such as SageMaker Distribution's.

    Args:
        name: the kernel's name, as in a notebook's metadata.
        display_name: the name that JupyterLab shows.
        user: whether to register it for this user, whichever environment the server runs in; False registers it only for
            servers of this environment.
        python: the Python that the kernel runs; None takes this one.

    Raises:
        UserError: ipykernel is missing or refuses the name.
    """
    command = [os.fspath(python or sys.executable), "-m", "ipykernel", "install", "--user" if user else "--sys-prefix"]
    command += ["--name", name, "--display-name", display_name]
    variables = tuple(variable for variable in KERNEL_VARIABLES if os.environ.get(variable))
    for variable in variables:
        command += ["--env", variable, os.environ[variable]]
    # Threads that spin while they wait make a shared machine many times slower
    command += ["--env", "OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY") or "PASSIVE"]
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
            f"the folder for the model cache can't be created ({error.strerror})",
            next_step="Name a folder that you may write to.",
        ) from error
    os.environ["HF_HOME"] = str(home)
