"""Connects Jupyter's address `qlora-tensorboard/TOKEN/` with the Unix socket of the page that has this token.

`jupyter-server-proxy` starts it, as `server_proxy` describes, on a socket in a private folder. No port is open, so that no other
user of the machine can take one over and get the session's cookie
(https://github.com/jupyterhub/jupyter-server-proxy/issues/590). It knows nothing of TensorBoard.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from pathlib import Path
from typing import Any

from qlora_helpers.base.private import private_folder

NAME = "qlora-tensorboard"
"""The path below Jupyter's address; also the name of the entry point in pyproject.toml."""
_TOKEN = re.compile(r"[0-9a-f]{32}")
_LONGEST_HEAD = 64 * 1024
_LOOK_EVERY_S = 5.0


def server_proxy() -> dict[str, Any]:
    """Returns the entry that `jupyter-server-proxy` reads when a Jupyter server starts."""
    command = [sys.executable, "-P", "-m", "qlora_helpers.views.tensorboard_relay", "{unix_socket}"]
    return {"command": command, "unix_socket": True, "timeout": 30, "launcher_entry": {"enabled": False}}


def sockets_folder() -> Path:
    """Returns the folder of the pages' sockets, beside what Jupyter keeps while it runs; only its owner may enter it.

    Raises:
        PermissionError: the folder belongs to somebody else, or is a link.
    """
    return private_folder(NAME)


def socket_name(token: str) -> str:
    """Returns the name of the socket of the page with this token."""
    return token[:12]


async def serve(path: str, folder: Path) -> None:
    """Relays every connection to `path` until the process that started this one has ended."""
    os.chdir(folder)  # a socket's whole path may have about 100 bytes
    server = await asyncio.start_unix_server(_relay, path, limit=_LONGEST_HEAD)
    parent = os.getppid()
    async with server:
        while os.getppid() == parent:  # it ends with the Jupyter server, however that ends
            await asyncio.sleep(_LOOK_EVERY_S)


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        path = (head.split(" ", 2) + [""])[1].partition("?")[0]
        token = (path.split("/", 2) + [""])[1]
        if path == "/":
            writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        elif not _TOKEN.fullmatch(token) or not os.path.exists(socket_name(token)):
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        else:
            await _exchange(head, socket_name(token), reader, writer)
        await writer.drain()
    writer.close()


async def _exchange(head: str, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Passes one request on, and its answer back; the end of the connection is the end of the answer."""
    lines = [line for line in head.split("\r\n")[:-2] if not line.lower().startswith("connection:")]
    page_reader, page_writer = await asyncio.open_unix_connection(name)
    page_writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1"))
    sending = asyncio.create_task(_copy(reader, page_writer))
    try:
        await _copy(page_reader, writer)
    finally:
        sending.cancel()
        page_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(64 * 1024):
        writer.write(data)
        await writer.drain()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sockets_folder()))
