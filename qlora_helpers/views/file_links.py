"""Links to files of a run: in a notebook's output, to open and to download, and as an address to end a command with.

A link in a notebook is relative, so that JupyterLab resolves it behind any base URL (a hub's, SageMaker Studio's) and a page made
by nbconvert finds the file beside it; it never holds the path of somebody's home.
"""

from __future__ import annotations

import base64
import html
import mimetypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.units import size_text
from qlora_helpers.views.browser_way import jupyter_server

MOST_INLINE = 4 * 1024**2  # bytes of a file that is put into the output where no link leads to it


class KeptFile(type(Path())):  # type: ignore[misc]  # the path class of this system
    """A path that shows itself in a notebook as links, to open the file and to download it."""

    def __repr__(self) -> str:
        return shown_path(Path(str(self)))

    def _repr_html_(self) -> str:
        return links_html(Path(str(self)))


class KeptFiles(Tabular):
    """The files of a folder with their sizes; in a notebook each has links to open and to download it.

    Args:
        folder: an exported adapter or model, or any other folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def files(self) -> list[Path]:
        """The regular files in the folder, at any depth, in the order of their names."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink())

    def table(self) -> Table:
        """Returns a row for each file: its name and its size."""
        rows = [[str(path.relative_to(self.folder)), size_text(path.stat().st_size)] for path in self.files()]
        return Table(["file", "size"], rows, caption=shown_path(self.folder), numbers=(1,))

    def _repr_html_(self) -> str:
        lines = "".join(
            f"<tr><td style='text-align:left'>{links_html(path, name=str(path.relative_to(self.folder)))}</td>"
            f"<td style='text-align:right'>{size_text(path.stat().st_size)}</td></tr>"
            for path in self.files()
        )
        return f"<table><caption>{html.escape(shown_path(self.folder))}</caption>{lines}</table>"


def shown_path(path: Path) -> str:
    """Returns a path as outputs may hold it: as it is where it is relative, else its last two parts."""
    return str(path) if not path.is_absolute() else str(Path(*path.parts[-2:]))


def links_html(path: Path, *, name: str = "", environ: Mapping[str, str] = os.environ) -> str:
    """Returns HTML with a link that opens a file and one that downloads it; its name alone where no link can lead to it.

    Args:
        path: the file.
        name: what people read; empty takes the path without folders of a person's.
        environ: is read in place of the environment.
    """
    label = html.escape(name or shown_path(path))
    if not path.is_file():
        return f"<span>{label} (not there)</span>"
    download, server = html.escape(path.name), jupyter_server(environ)
    root = Path(server["root_dir"]).resolve() if server and server.get("root_dir") else None
    if path.resolve().is_relative_to(root or Path.cwd().resolve()):
        href = html.escape(quote(Path(os.path.relpath(path.resolve(), Path.cwd().resolve())).as_posix()))
        return f'<a href="{href}" target="_blank">{label}</a> · <a href="{href}" download="{download}">download</a>'
    if root is None or path.stat().st_size > MOST_INLINE:
        return f"<span>{label}</span>"
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    data = base64.b64encode(path.read_bytes()).decode()
    return f'{label} · <a href="data:{kind};base64,{data}" download="{download}">download</a>'


def address_of(path: Path, environ: Mapping[str, str] = os.environ) -> str:
    """Returns the address under which a browser opens a file: through Jupyter where there is one that serves it, else `file://`.

    Behind a hub or in SageMaker Studio, whose own address is not known here, it is the path that follows that address.
    """
    full = path.resolve()
    server: dict[str, Any] = jupyter_server(environ) or {}
    root = server.get("root_dir") or environ.get("JUPYTER_SERVER_ROOT")
    url = server.get("url") or environ.get("JUPYTER_SERVER_URL")
    if not root or not url or not full.is_relative_to(Path(root).resolve()):
        return full.as_uri()
    inside = f"files/{quote(full.relative_to(Path(root).resolve()).as_posix())}"
    prefix = environ.get("JUPYTERHUB_SERVICE_PREFIX")
    if prefix or environ.get("SAGEMAKER_APP_TYPE_LOWERCASE") or environ.get("SAGEMAKER_APP_TYPE"):
        return f"{(prefix or urlsplit(url).path or '/').rstrip('/')}/{inside} (behind the address of your Jupyter)"
    return f"{url.rstrip('/')}/{inside}"
