"""How a browser reaches a page that a process of this kernel serves: by Jupyter's relay, by its proxy, or by a port.

Only the Jupyter server that started this kernel is ever asked whether it can relay. No address of a page is asked, so that no
port that somebody else may hold is.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.views.tensorboard_relay import NAME

PORT = "{port}"
SHARED_PORT = (
    "Other users of this machine can take over a port that is free again, and Jupyter would hand them its cookie: where there "
    "are any, install this package where Jupyter itself runs"
)


@dataclass(frozen=True)
class BrowserAddress:
    """How a browser reaches a page.

    Attributes:
        address: what comes before the page's token; `{port}` stands for its port.
        by_socket: whether the page listens on a Unix socket, which no other user can reach.
        caution: what a person must know of it, in one sentence; empty where there is nothing.
    """

    address: str
    by_socket: bool = False
    caution: str = ""

    def url(self, token: str, port: int) -> str:
        """Returns the page's address for a browser; only a path if Jupyter passes it on."""
        return f"{self.address.replace(PORT, str(port))}{token}/"


def browser_address(environ: Mapping[str, str] = os.environ) -> BrowserAddress:
    """Returns how a browser reaches a page.

    Where the Jupyter server that started this kernel has this package's relay, it goes through a Unix socket. Else it goes through
    `jupyter-server-proxy` on JupyterHub, in SageMaker Studio, and wherever that server has it. Otherwise it is a port of this
    machine, which a browser on the same machine reaches. `TENSORBOARD_PROXY_URL`, with `%PORT%` in it, overrides all of these.
    """
    if "TENSORBOARD_PROXY_URL" in environ:
        return BrowserAddress(environ["TENSORBOARD_PROXY_URL"].replace("%PORT%", PORT))
    server = jupyter_server(environ)
    token = (server or {}).get("token") or environ.get("JUPYTERHUB_API_TOKEN", "")
    if server and _status(f"{server['url']}{NAME}/", token) == 204:
        return BrowserAddress(f"{server['base_url']}{NAME}/", by_socket=True)
    if prefix := environ.get("JUPYTERHUB_SERVICE_PREFIX"):
        return BrowserAddress(f"{prefix.rstrip('/')}/proxy/{PORT}/", caution=SHARED_PORT)
    # A Studio app is a machine of its own, on which its owner is alone.
    if app := environ.get("SAGEMAKER_APP_TYPE_LOWERCASE") or environ.get("SAGEMAKER_APP_TYPE", "").lower():
        return BrowserAddress(f"/{app}/default/proxy/{PORT}/")
    # 0 is no port, so nobody answers there: the proxy says so (500), and a server without a proxy knows no such page (404).
    if server and _status(f"{server['url']}proxy/0/", token) not in (None, 302, 403, 404):
        return BrowserAddress(f"{server['base_url']}proxy/{PORT}/", caution=SHARED_PORT)
    return BrowserAddress(f"http://127.0.0.1:{PORT}/")


def jupyter_server(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns what the Jupyter server that started this kernel wrote about itself, or None if there is no such server."""
    try:
        from jupyter_core.paths import jupyter_runtime_dir

        path = Path(jupyter_runtime_dir()) / f"jpserver-{int(environ['JPY_PARENT_PID'])}.json"
        server = json.loads(path.read_text())
        return server if {"url", "base_url"} <= server.keys() else None
    except (ImportError, KeyError, ValueError, OSError):
        return None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


def _status(url: str, token: str) -> int | None:
    request = urllib.request.Request(url, headers={"Authorization": f"token {token}"} if token else {})
    opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=15) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, OSError):
        return None
