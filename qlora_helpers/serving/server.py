"""The process of a server: loads the models, listens, and ends with whoever started it.

It is started by `serving.process`, which hands over the token by standard input, where no other user sees it. It holds the GPUs'
locks of this machine while it runs.

Why not `transformers serve` (5.17 and 5.23 were read): it checks no token, loads whatever model a request names (at `/load_model`
even where one is fixed), opens the addresses of pictures in requests, and knows no adapters. It loads a base model by its own
quantisation settings, without the audit here, and so leaves Falcon's layers in 16 bits; it asks by the tokenizer's chat template,
not by the run's, and ends at other tokens. A front before it could repair the first half alone. So the front is the smallest on
Starlette and uvicorn, and the answers are those of `evaluation.generate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.guard import refuse_links
from qlora_helpers.runs.locks import gpu_locks, visible_gpus
from qlora_helpers.serving.records import Serving, log_path, recorded

READY, FAILED, LOADING = "qlora-serving ready ", "qlora-serving failed ", "qlora-serving says "
MOST_CONNECTIONS = 256
GRACE_S = 2


def main() -> None:
    """Serves until standard input ends, that is until the process that started this one ends or closes it, or until SIGTERM."""
    asked = json.loads(sys.stdin.readline())
    logging.basicConfig(filename=_own_log(), level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    try:
        _serve(asked)
    except UserError as error:
        parts = {key: getattr(error, key, "") for key in ("expected", "got", "next_step")}
        print(FAILED + json.dumps({"problem": getattr(error, "problem", str(error))} | parts), flush=True)
    finally:
        log_path(os.getpid()).unlink(missing_ok=True)
    sys.stdout.flush()
    os._exit(0)  # a thread that answers would hold the process up


def _own_log() -> Path:
    path = log_path(os.getpid())
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
    return path


def _serve(asked: dict[str, Any]) -> None:
    import psutil

    from qlora_helpers.serving.models import ServedModels

    runs = [Run(folder) for folder in asked["folders"]]
    for run in runs:
        refuse_links(run.folder)
    with contextlib.ExitStack() as held:
        if runs[0].config().model.device_map != "cpu":
            held.enter_context(gpu_locks(runs[0], visible_gpus()))
        opened = held.enter_context(listener(asked["host"], asked["port"]))
        models = ServedModels(runs, say=lambda text: print(LOADING + json.dumps(text), flush=True))
        host, port = opened.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        process = psutil.Process()
        folders = tuple(str(run.folder) for run in runs)
        serving = Serving(folders, models.names, url, process.pid, process.create_time(), socket.gethostname())
        held.enter_context(recorded(serving, asked["token"]))
        opened.listen(128)  # not before there is somebody to answer
        print(READY + json.dumps({"url": url, "names": models.names}), flush=True)
        asyncio.run(_answer(models, asked["token"], opened))


def listener(host: str, port: int) -> socket.socket:
    """Opens a port of an address, without listening yet.

    Raises:
        UserError: the address is not this machine's, or the port is taken.
    """
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        opened = socket.socket(family)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host, port))
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"port {port} of {host} can't be opened ({reason})",
            next_step="Choose another port, or 0 for a free one; host= takes an address of this machine.",
        ) from error
    return opened


async def _answer(models: Any, token: str, opened: socket.socket) -> None:
    import uvicorn

    from qlora_helpers.serving.app import application
    from qlora_helpers.serving.queue import AnswerQueue

    answers = AnswerQueue()
    config = uvicorn.Config(
        application(models, token, answers),
        http="h11",
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_S,
    )
    server = uvicorn.Server(config)
    loop = asyncio.get_running_loop()

    def end() -> None:
        server.should_exit = True

    def wait_for_the_end() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(end)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    serving = asyncio.create_task(server.serve(sockets=[opened]))
    while not serving.done():
        if server.should_exit:
            answers.close()
        await asyncio.wait([serving], timeout=0.2)
    serving.result()


if __name__ == "__main__":
    main()
