"""TensorBoard's page: started, shown to who has its secret path alone, stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil
import pytest
from fake_run import fake_run
from tensorboardX import SummaryWriter
from two_users import as_other_user, needs_root

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import RunError
from qlora_helpers.views.tensorboard import TensorBoardPage, start_tensorboard, tensorboard_arguments


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
        assert repr(page) == f"TensorBoard of demo, other: {page.url} (stop() ends it)"
        assert re.fullmatch(rf"http://127.0.0.1:{page.port}/[0-9a-f]{{32}}/", page.url)
        shown = page._repr_mimebundle_()
        assert f'src="{page.url}"' in page._view.value
        # What a notebook file keeps gives nobody access.
        assert "application/vnd.jupyter.widget-view+json" in shown and page._token not in json.dumps(shown)
        assert os.getpgid(page._process.pid) != os.getpgid(0)  # an interrupted cell does not reach it
        assert {"scalars", "text", "hparams"} <= get(f"{page.url}data/plugins_listing").keys()
        until(lambda: sorted(get(f"{page.url}data/runs")) == ["demo", "other"])
    finally:
        page.stop()
    page.stop()
    assert repr(page) == "TensorBoard of demo, other: stopped" in page._repr_mimebundle_()["text/html"]
    assert "iframe" not in page._view.value  # so nothing asks again for a port that is free
    assert page._repr_mimebundle_().keys() == {"text/plain", "text/html"}
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


@pytest.fixture
def page(tmp_path):
    run = fake_run(tmp_path)
    with SummaryWriter(str(run.events_dir)) as writer:
        writer.add_text("samples/1", "what a person wrote", 1)
    with start_tensorboard(run) as page:
        yield page


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_only_who_knows_the_secret_path_sees_anything(page):
    port = f"http://127.0.0.1:{page.port}"
    assert status(page.url) == status(f"{page.url}data/plugins_listing") == 200
    other = "0" * 32
    for path in ("/", "/data/plugins_listing", f"/{other}/", f"/{page._token}", f"/{page._token[:-1]}/", f"//{other}/"):
        assert status(port + path) == 404
    assert status(f"{page.url}data/plugin/projector/runs") == 404  # it reads the files that events name


def test_the_secret_is_in_no_command_line_and_no_second_port_is_open(page):
    process = psutil.Process(page._process.pid)
    family = [process, *process.children(recursive=True)]
    assert page._token not in " ".join(part for each in family for part in each.cmdline())
    listening = [each.laddr for one in family for each in one.net_connections("inet") if each.status == "LISTEN"]
    assert listening == [("127.0.0.1", page.port)]  # TensorBoard's fast data server would open another


@needs_root
def test_another_user_is_shown_nothing(page):
    code = "import sys, urllib.request as r\ntry: print(r.urlopen(sys.argv[1], timeout=30).read())\nexcept Exception as e: print(e)"
    for path in ("/", "/data/plugin/text/tags", "/data/plugins_listing"):
        done = as_other_user(code, f"http://127.0.0.1:{page.port}{path}")
        assert "404" in done.stdout, done.stderr
    seen = as_other_user(f"print(open('/proc/{page._process.pid}/cmdline').read())").stdout
    assert "tensorboard_server" in seen and page._token not in seen


def test_it_ends_when_the_kernel_is_killed(tmp_path):
    run = fake_run(tmp_path)
    run.events_dir.mkdir(exist_ok=True)
    code = f"""
import time
from qlora_helpers.runs.folder import Run
from qlora_helpers.views.tensorboard import start_tensorboard
print(start_tensorboard(Run({str(run.folder)!r}))._process.pid, flush=True)
time.sleep(120)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as kernel:
        server = psutil.Process(int(kernel.stdout.readline()))
        kernel.send_signal(signal.SIGKILL)
    assert psutil.wait_procs([server], 30)[1] == []


def test_a_link_among_the_events_is_refused(tmp_path):
    run = fake_run(tmp_path)
    run.events_dir.mkdir(exist_ok=True)
    (tmp_path / "secret").write_text("mine")
    (run.events_dir / "metadata.tsv").symlink_to(tmp_path / "secret")
    with pytest.raises(RunError, match="neither a regular file nor a folder"):
        start_tensorboard(run)
