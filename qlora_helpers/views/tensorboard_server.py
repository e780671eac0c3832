"""Serves TensorBoard's application at a secret path, on a Unix socket in a private folder or on a port of the loopback interface.

TensorBoard's own server answers whoever reaches its port, and its fast data server opens another one. This one answers only below
`/TOKEN/`, reads the events itself, and has none of the plugins that read files which the events name. It is started as a process
by `views.tensorboard`, which hands over the token by standard input, where no other user sees it; the process ends with it.
"""

from __future__ import annotations

import hmac
import json
import os
import socket
import sys
from collections.abc import Callable, Iterable
from typing import Any

READY = "qlora-tensorboard ready at port"
_RELOAD_S = {"s3": "30"}


def below(token: str, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """Returns a WSGI application that is `app` below `/TOKEN/`, and not found anywhere else."""

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        given, slash, rest = environ.get("PATH_INFO", "").lstrip("/").partition("/")
        if not slash or not hmac.compare_digest(given.encode("utf-8", "replace"), token.encode()):
            start_response("404 Not Found", [("Content-Type", "text/plain"), ("Cache-Control", "no-store")])
            return [b"There is nothing here.\n"]
        return app(environ | {"PATH_INFO": f"/{rest}", "SCRIPT_NAME": ""}, start_response)

    return application


def listener(path: str | None) -> socket.socket:
    """Opens a Unix socket at a path, whose folder must be private, or a free port of the loopback interface."""
    if path is None:
        opened = socket.socket()
        opened.bind(("127.0.0.1", 0))
    else:
        os.chdir(os.path.dirname(path))  # a socket's whole path may have about 100 bytes
        opened = socket.socket(socket.AF_UNIX)
        opened.bind(os.path.basename(path))
    opened.listen(128)
    return opened


def server_class(token: str, opened: socket.socket) -> Callable[..., Any]:
    """Returns what TensorBoard calls to make its server."""
    from tensorboard.program import TensorBoardServer
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *args: Any) -> None:
            """Writes nothing: a line would hold the token."""

    host = "unix://tensorboard" if opened.family == socket.AF_UNIX else "127.0.0.1"

    class Server(TensorBoardServer):
        def __init__(self, wsgi_app: Any, flags: Any) -> None:
            app = below(token, wsgi_app)
            self.server = make_server(host, 0, app, threaded=True, request_handler=Quiet, fd=opened.fileno())

        def serve_forever(self) -> None:
            self.server.serve_forever()

        def get_url(self) -> str:
            return host

    return Server


def main() -> None:
    """Serves until standard input ends, that is until the process that started this one ends or closes it."""
    asked = json.loads(sys.stdin.readline())
    opened = listener(asked["socket"])
    from tensorboard import default, program

    board = program.TensorBoard(plugins=default.get_static_plugins(), server_class=server_class(asked["token"], opened))
    reload_s = _RELOAD_S.get(asked["logdir"].partition("://")[0], "5")
    board.configure(("", "--logdir", asked["logdir"], "--load_fast", "false", "--reload_interval", reload_s))
    board.launch()
    port = 0 if asked["socket"] else opened.getsockname()[1]
    print(READY, port, flush=True)
    sys.stdin.read()
    if asked["socket"]:
        os.unlink(os.path.basename(asked["socket"]))
    os._exit(0)  # threads that read events would hold the process up


if __name__ == "__main__":
    main()
