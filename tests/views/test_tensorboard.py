"""TensorBoard's page: started, found by a browser, stopped."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from fake_run import fake_run
from tensorboardX import SummaryWriter

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import RunError
from qlora_helpers.views.tensorboard import TensorBoardPage, browser_url, start_tensorboard, tensorboard_arguments


def test_arguments_for_tensorboard(run):
    local = RunConfig().with_settings({"train.tensorboard": "local"})
    assert tensorboard_arguments(run, local) == ["--logdir", str(run.events_dir)]
    s3 = RunConfig().with_settings({"train.tensorboard": "s3://bucket/p/"})
    assert tensorboard_arguments(run, s3) == ["--logdir", "s3://bucket/p/mine"]


def get(url: str):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_page_of_the_run_s_events_until_it_is_stopped(tmp_path):
    run, other = fake_run(tmp_path), fake_run(tmp_path, "other")
    with SummaryWriter(str(run.events_dir)) as writer:
        writer.add_scalar("train/loss", 2.5, 7)
    with SummaryWriter(str(other.events_dir)) as writer:
        writer.add_scalar("train/loss", 2.0, 7)
    page = start_tensorboard(run, other)
    try:
        assert start_tensorboard(run, other) is page  # not one more each time the cell is run
        assert repr(page) == f"TensorBoard of demo, other: http://127.0.0.1:{page.port}/ (stop() ends it)"
        assert f'src="http://127.0.0.1:{page.port}/"' in page._repr_html_()
        assert os.getpgid(page._process.pid) != os.getpgid(0)  # an interrupted cell does not reach it
        assert {"scalars", "text", "hparams"} <= get(f"{page.url}data/plugins_listing").keys()
        until(lambda: sorted(get(f"{page.url}data/runs")) == ["demo", "other"])
    finally:
        page.stop()
    page.stop()
    assert repr(page) == "TensorBoard of demo, other: stopped" in page._repr_html_()
    assert "iframe" not in page._repr_html_()
    with pytest.raises(ProcessLookupError):
        os.kill(page._process.pid, 0)


def test_a_run_without_events(tmp_path):
    run = fake_run(tmp_path)
    with pytest.raises(RunError, match="Notebook 04_train makes it"):
        start_tensorboard(run)
    with pytest.raises(RunError, match="are not copied to a bucket"):
        start_tensorboard(run, from_s3=True)


def test_what_tensorboard_says_where_it_does_not_start(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RunError, match="TensorBoard did not start"):
        TensorBoardPage("demo", "s3://bucket/prefix")


# the way of a browser


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
def test_browser_url(environ, expected):
    assert browser_url(6007, environ) == expected


@pytest.mark.parametrize("has_proxy", [True, False])
def test_through_the_jupyter_server_where_it_has_a_proxy(has_proxy, tmp_path, monkeypatch):
    class Jupyter(BaseHTTPRequestHandler):
        def do_GET(self):
            knows_me = self.headers["Authorization"] == "token secret"
            self.send_response(200 if has_proxy and knows_me and self.path == "/lab/base/proxy/6007/" else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Jupyter)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
        server_info = {
            "url": f"http://127.0.0.1:{server.server_port}/lab/base/",
            "base_url": "/lab/base/",
            "token": "secret",
        }
        (tmp_path / "jpserver-42.json").write_text(json.dumps(server_info))
        expected = "/lab/base/proxy/6007/" if has_proxy else "http://127.0.0.1:6007/"
        assert browser_url(6007, {"JPY_PARENT_PID": "42"}) == expected
    finally:
        server.shutdown()
        server.server_close()
