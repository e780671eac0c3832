"""How a browser reaches TensorBoard: by Jupyter's relay and a Unix socket, by its proxy, by a port. A real Jupyter server runs."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from entry_points import declare_entry_points
from fake_run import fake_run
from tensorboardX import SummaryWriter
from two_users import as_other_user, needs_root

from qlora_helpers.views.browser_way import SHARED_PORT, BrowserAddress, browser_address
from qlora_helpers.views.tensorboard import start_tensorboard
from qlora_helpers.views.tensorboard_relay import NAME, sockets_folder

ROOT = Path(__file__).parent.parent.parent
TOKEN = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "http://127.0.0.1:6007/"),
        ({"JUPYTERHUB_SERVICE_PREFIX": "/user/ada/"}, "/user/ada/proxy/6007/"),
        ({"SAGEMAKER_APP_TYPE": "JupyterLab"}, "/jupyterlab/default/proxy/6007/"),
        ({"SAGEMAKER_APP_TYPE_LOWERCASE": "jupyterlab"}, "/jupyterlab/default/proxy/6007/"),
        ({"TENSORBOARD_PROXY_URL": "/a/%PORT%/", "SAGEMAKER_APP_TYPE": "JupyterLab"}, "/a/6007/"),
        ({"JPY_PARENT_PID": "not a number"}, "http://127.0.0.1:6007/"),
        ({"JPY_PARENT_PID": "999999999"}, "http://127.0.0.1:6007/"),
    ],
)
def test_the_way_without_a_jupyter_server_to_ask(environ, expected):
    way = browser_address(environ)
    assert way.url(TOKEN, 6007) == f"{expected}{TOKEN}/" and not way.by_socket
    assert bool(way.caution) == ("JUPYTERHUB_SERVICE_PREFIX" in environ)


class Jupyter:
    """A Jupyter server with `jupyter-server-proxy`; `environ` is what its kernels would have."""

    def __init__(self, folder: Path, *, with_relay: bool) -> None:
        self.token = secrets.token_hex(16)
        paths = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("RUNTIME", "CONFIG", "DATA")}
        declare_entry_points(folder / "site")
        proxy = {"jpserver_extensions": {"jupyter_server_proxy": True}, "base_url": "/base/"}
        (folder / "config").mkdir(parents=True)
        hidden = {} if with_relay else {"ServerProxy": {"servers": {NAME: {"command": [], "port": 1}}}}
        (folder / "config" / "jupyter_server_config.json").write_text(json.dumps({"ServerApp": proxy} | hidden))
        path = os.pathsep.join([str(ROOT), *([str(folder / "site")] if with_relay else [])])
        command = [sys.executable, "-m", "jupyter_server", "--ip=127.0.0.1", "--port=0", "--no-browser", "--allow-root"]
        with open(folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [*command, f"--IdentityProvider.token={self.token}"],
                cwd=folder,
                env=os.environ | paths | {"PYTHONPATH": path},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.environ = paths | {"JPY_PARENT_PID": str(self.process.pid)}
        info = folder / "runtime" / f"jpserver-{self.process.pid}.json"
        deadline = time.monotonic() + 120
        while not info.exists() or self.status("api") != 200:
            assert self.process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
            if info.exists():
                self.url = json.loads(info.read_text())["url"]

    url = ""

    def status(self, path: str) -> int:
        return self.get(path)[0]

    def get(self, path: str) -> tuple[int, str]:
        if not self.url:
            return 0, ""
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"token {self.token}"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, ""
        except urllib.error.URLError:
            return 0, ""


@pytest.fixture
def jupyter(monkeypatch):
    started = []
    short = tempfile.TemporaryDirectory(prefix="q-")  # a socket's path has room for about a hundred characters

    def start(*, with_relay: bool) -> Jupyter:
        started.append(Jupyter(Path(short.name) / "jupyter", with_relay=with_relay))
        for name, value in started[-1].environ.items():
            monkeypatch.setenv(name, value)
        return started[-1]

    yield start
    for each in started:
        each.process.terminate()
        each.process.wait(30)
    short.cleanup()


def page_of(tmp_path: Path):
    run = fake_run(tmp_path)
    with SummaryWriter(str(run.events_dir)) as writer:
        writer.add_scalar("train/loss", 2.5, 7)
    return start_tensorboard(run)


def test_through_jupyter_it_is_a_socket_that_no_other_user_reaches(jupyter, tmp_path):
    server = jupyter(with_relay=True)
    page = page_of(tmp_path)
    assert re.fullmatch(rf"/base/{NAME}/[0-9a-f]{{32}}/", page.url) and page.port == 0
    below = page.url.removeprefix("/base/")
    code, text = server.get(f"{below}data/plugins_listing")
    assert code == 200 and "scalars" in json.loads(text)
    code, text = server.get(below)
    assert code == 200 and "<html" in text.lower()
    assert server.status(f"{NAME}/{TOKEN}/") == server.status(f"{NAME}/../../etc/passwd") == 404
    sockets = sockets_folder()
    assert sockets.stat().st_mode & 0o777 == 0o700 and len(list(sockets.iterdir())) == 1
    page.stop()
    assert list(sockets.iterdir()) == []
    assert server.status(f"{below}data/plugins_listing") == 404  # nobody else can take its place


@needs_root
def test_another_user_can_not_take_its_place(jupyter):
    jupyter(with_relay=True)
    place = str(sockets_folder() / "impostor")
    done = as_other_user("import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])", place)
    assert "PermissionError" in done.stderr


def test_a_jupyter_server_without_the_relay_passes_a_port_on_and_that_is_said(jupyter, tmp_path):
    server = jupyter(with_relay=False)
    page = page_of(tmp_path)
    assert re.fullmatch(rf"/base/proxy/{page.port}/[0-9a-f]{{32}}/", page.url)
    assert server.status(f"{page.url.removeprefix('/base/')}data/plugins_listing") == 200
    assert SHARED_PORT in page._repr_mimebundle_()["text/plain"]
    page.stop()


def test_a_folder_of_sockets_that_others_may_enter_is_closed_to_them(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    (tmp_path / NAME).mkdir(mode=0o777)
    assert sockets_folder().stat().st_mode & 0o777 == 0o700
    (tmp_path / NAME).rmdir()
    (tmp_path / NAME).symlink_to(tmp_path)
    with pytest.raises((PermissionError, FileExistsError)):
        sockets_folder()


def test_an_address_holds_the_port_and_the_token():
    assert BrowserAddress("/x/{port}/").url(TOKEN, 8) == f"/x/8/{TOKEN}/"
