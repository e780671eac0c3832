"""A server as OpenAI's own client meets it, and as a stranger on the machine does."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from two_users import as_other_user, needs_root

from qlora_helpers import workflow
from qlora_helpers.base.errors import RunError
from qlora_helpers.data.examples import one_turn
from qlora_helpers.data.prompts import prompt_text
from qlora_helpers.data.templates import template_of
from qlora_helpers.serving.process import serve, stop_serving
from qlora_helpers.serving.records import all_serving

DIALOGUE = "Ann: cake on friday?\nBo: sure, I bring one"
USER = [{"role": "user", "content": DIALOGUE}]


@pytest.fixture(scope="module")
def asked(runs):
    """Answers of `ask`, the base model's and each run's, from models of their own."""
    found = {}
    for run in runs:
        loaded = workflow.load(run, say=str)
        model = workflow.load_adapter(run, loaded)
        found[run.name] = workflow.ask(run, model, loaded, DIALOGUE)
        if run is runs[0]:
            found["base"] = workflow.ask(run, model, loaded, DIALOGUE, tuned=False)
            found["sampled"] = workflow.ask(run, model, loaded, DIALOGUE, sampled=True, seed=5)
            found["tokenizer"] = loaded.tokenizer
    return found


@pytest.mark.parametrize("name", ["base", "mine", "other"])
def test_an_answer_is_that_of_ask_token_for_token(client, asked, name):
    answer = client.chat.completions.create(model=name, messages=USER)
    expected = asked[name]
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.completion_tokens == expected.tokens
    assert answer.choices[0].finish_reason == ("stop" if expected.stopped else "length")
    assert len({asked[each].text for each in ("base", "mine", "other")}) == 3  # so that a mix-up would show


def test_the_same_in_pieces(client, asked):
    pieces = list(
        client.chat.completions.create(model="mine", messages=USER, stream=True, stream_options={"include_usage": True})
    )
    texts = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert "".join(texts) == asked["mine"].text
    assert len([text for text in texts if text]) > 1
    assert pieces[-1].usage.completion_tokens == asked["mine"].tokens
    assert pieces[-2].choices[0].finish_reason == ("stop" if asked["mine"].stopped else "length")


def test_a_draw_with_a_seed_is_that_of_ask(client, asked, runs):
    own = runs[0].config().evaluation
    drawn = [
        client.chat.completions.create(
            model="mine", messages=USER, temperature=own.temperature, top_p=own.top_p, seed=seed
        )
        .choices[0]
        .message.content
        for seed in (5, 5, 6)
    ]
    assert drawn[0] == drawn[1] == asked["sampled"].text != drawn[2]


def test_a_completion_goes_on_with_the_prompt_as_it_is(client, asked, runs):
    """The whole prompt of a row, sent as text, has the tokens that the row has."""
    row = one_turn("x", "x", DIALOGUE, "", instruction="Summarize the chat dialogue:\n")
    prompt = prompt_text(row, template_of(runs[0].config().data, asked["tokenizer"]))
    answer = client.completions.create(model="mine", prompt=prompt)
    assert answer.choices[0].text.strip() == asked["mine"].text
    chat = client.chat.completions.create(model="mine", messages=USER)
    assert answer.usage == chat.usage


def test_what_rows_have_around_a_text_is_added_once_and_is_said(client, asked):
    described = {model.id: model.model_dump() for model in client.models.list()}
    assert list(described) == ["base", "mine", "other"]
    assert described["mine"]["adds"] == {"system": "", "before": "Summarize the chat dialogue:\n", "behind": ""}
    assert client.models.retrieve("mine").model_dump() == described["mine"]
    with_it = [{"role": "user", "content": "Summarize the chat dialogue:\n" + DIALOGUE}]
    same = client.chat.completions.create(model="mine", messages=with_it)
    assert same.choices[0].message.content == asked["mine"].text
    bare = client.chat.completions.create(model="mine", messages=USER, extra_body={"as_written": True})
    assert bare.usage.prompt_tokens < same.usage.prompt_tokens


def test_an_answer_ends_before_a_stop_text(client, asked):
    whole = asked["mine"].text
    stop = whole[len(whole) // 2 :][:2]
    expected = whole[: whole.index(stop)].rstrip()
    answer = client.chat.completions.create(model="mine", messages=USER, stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "stop")
    pieces = client.chat.completions.create(model="mine", messages=USER, stop=[stop], stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected


def test_asked_at_once_each_gets_its_own_answer(client, asked):
    found = {}

    def ask(name: str, number: int) -> None:
        found[name, number] = client.chat.completions.create(model=name, messages=USER).choices[0].message.content

    threads = [
        threading.Thread(target=ask, args=(name, number)) for number in range(2) for name in ("base", "mine", "other")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(name, number): asked[name].text for name, number in found} and len(found) == 6


def test_a_client_that_goes_ends_its_answer(client, server, asked):
    stream = client.chat.completions.create(model="mine", messages=USER, stream=True, max_tokens=150)
    next(iter(stream))
    stream.close()
    assert client.chat.completions.create(model="base", messages=USER).choices[0].message.content == asked["base"].text


@pytest.mark.parametrize("name", ["mine2", "gpt-4o", "HuggingFaceTB/SmolLM2-135M", "../mine", "/etc/passwd", ""])
def test_no_other_model_is_ever_loaded(client, name):
    from openai import NotFoundError

    with pytest.raises(NotFoundError, match="There is no model .* here, but: base, mine, other"):
        client.chat.completions.create(model=name, messages=USER)


def test_a_conversation_that_is_too_long_is_refused_with_the_numbers(client):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="sequences of 256 tokens") as refused:
        client.chat.completions.create(model="mine", messages=[{"role": "user", "content": DIALOGUE * 30}])
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(BadRequestError, match="and 250 of the answer are more"):
        client.chat.completions.create(model="mine", messages=USER, max_tokens=250)


def send(url: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_without_the_token_nothing_is_answered(server):
    right = f"Bearer {server.token}"
    assert send(f"{server.url}/models", Authorization=right)[0] == 200
    wrong = ["", "Bearer ", server.token, f"bearer {server.token}", right[:-1], right + "x", f"Basic {server.token}"]
    for path in ("/models", "/chat/completions", "/nothing", "/../metrics"):
        for value in wrong:
            status, text = send(server.url + path, Authorization=value)
            assert status == 401 and "invalid_api_key" in text and server.token not in text
    assert send(f"{server.url}/models")[0] == 401
    assert send(f"{server.url}/models?api_key={server.token}")[0] == 401


def test_a_wrong_token_sends_no_body_in(server):
    """A body of which only the beginning comes: the answer is there before the rest is waited for."""
    host, port = server.url.split("/")[2].split(":")
    with socket.create_connection((host, int(port)), timeout=20) as opened:
        opened.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 900000000\r\n\r\n{")
        assert b" 401 " in opened.recv(200)


def test_only_known_addresses_are_answered(server):
    right = {"Authorization": f"Bearer {server.token}"}
    for path in ("/embeddings", "/files", "/models/", "/images/generations", "/responses", "/audio/transcriptions"):
        status, text = send(server.url + path, b"{}", **right)
        assert status in (404, 405) and json.loads(text)["error"]["type"] == "invalid_request_error", path
    for path in ("load_model", "reset", "docs", "openapi.json", "health", ""):
        assert send(server.url.removesuffix("v1") + path, **right)[0] == 404


def test_bodies_are_limited(server):
    url, right = f"{server.url}/chat/completions", {"Authorization": f"Bearer {server.token}"}
    assert send(url, b"{}", **right | {"Content_Type": "text/plain"})[0] == 415
    assert send(url, b"[" * 200_000, **right)[0] == 400
    host, port = server.url.split("/")[2].split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer {server.token}\r\n"
    # Nothing is sent that the server would not read: the answer could be lost with the connection.
    with socket.create_connection((host, int(port)), timeout=30) as opened:
        opened.sendall(f"{head}Content-Length: {1024**2 + 1}\r\n\r\n".encode())
        assert b" 413 " in opened.recv(200)
    with socket.create_connection((host, int(port)), timeout=30) as opened:  # without a length, in chunks
        opened.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(16):
            opened.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        opened.sendall(b"1\r\n \r\n")
        assert b" 413 " in opened.recv(200)


def test_it_listens_on_loopback_alone_and_the_token_is_in_no_command_line_and_one_private_file(server):
    process = psutil.Process(server._process.pid)
    family = [process, *process.children(recursive=True)]
    listening = [each.laddr[0] for one in family for each in one.net_connections("inet") if each.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    assert server.token not in " ".join(part for each in family for part in each.cmdline())
    assert server.token not in json.dumps([each.environ() for each in family])
    assert server.token not in repr(server) and server.url in repr(server)
    assert server.token_path.read_text() == server.token
    assert stat.S_IMODE(server.token_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(server.token_path.parent.stat().st_mode) == 0o700
    assert os.getpgid(process.pid) != os.getpgid(0)  # an interrupted cell does not reach it


@needs_root
def test_another_user_is_answered_nothing(server):
    code = """
import sys, urllib.request as r, urllib.error
for path in sys.argv[2:]:
    for token in ("", "x" * 43):
        request = r.Request(sys.argv[1] + path, headers={"Authorization": "Bearer " + token})
        try: print(r.urlopen(request, timeout=30).read())
        except urllib.error.HTTPError as e: print(e.code)
"""
    done = as_other_user(code, server.url, "/models", "/models/mine", "/chat/completions", "/")
    assert done.stdout.split() == ["401"] * 8, done.stderr
    look = "import os, sys\ntry: print(open(sys.argv[1]).read())\nexcept OSError as e: print(type(e).__name__)"
    assert as_other_user(look, str(server.token_path)).stdout.strip() == "PermissionError"
    seen = as_other_user(f"print(open('/proc/{server._process.pid}/cmdline').read())").stdout
    assert "serving.server" in seen and server.token not in seen


def test_the_same_runs_are_served_once_and_stopped_by_name(runs, server, runtime):
    assert serve(runs[0], also=runs[1:], say=str) is server
    assert [each.names for each in all_serving()] == [("base", "mine", "other")]
    with serve(runs[1], say=str) as second:
        with pytest.raises(RunError, match="it is not clear which server is to stop; got served: .*mine"):
            stop_serving()
        left = second.token_path
        (stopped,) = stop_serving(runs[1])  # not the one that serves it beside another
    assert stopped.url == second.url and not second.is_running and "stopped" in repr(second)
    assert not left.exists() and server.is_running


def test_it_ends_when_the_kernel_is_killed_and_leaves_nothing(runs, runtime):
    code = f"""
import time
from qlora_helpers.runs.folder import Run
from qlora_helpers.serving.process import serve
server = serve(Run({str(runs[0].folder)!r}), port=0, say=str)
print(server._process.pid, server.url, flush=True)
time.sleep(120)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as kernel:
        pid, url = kernel.stdout.readline().split()
        server = psutil.Process(int(pid))
        assert send(f"{url}/models")[0] == 401
        kernel.send_signal(signal.SIGKILL)
    assert psutil.wait_procs([server], 30)[1] == []
    assert int(pid) not in [each.pid for each in all_serving()]


def test_the_command_line_serves_and_stops(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))  # here nothing else is served
    root = {"QLORA_RUNS": str(runs[0].folder.parent), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "qlora_helpers", "serve"]
    with subprocess.Popen(
        [*command, "other"], env=os.environ | root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as served:
        for line in served.stdout:
            if line.startswith("export"):
                break
        url, path = re.fullmatch(r'export OPENAI_BASE_URL=(\S+) OPENAI_API_KEY="\$\(cat (\S+)\)"\n', line).groups()
        token = Path(path).read_text()
        assert send(f"{url}/models", Authorization=f"Bearer {token}")[0] == 200
        (mine,) = [each for each in all_serving() if each.url == url]
        stopped = subprocess.run(
            [*command, "--stop", "other"], env=os.environ | root, capture_output=True, text=True, timeout=60
        )
        assert f"stopped {url} (base, other)" in stopped.stdout, stopped.stderr
        assert served.wait(30) == 0
    assert not Path(path).exists() and not psutil.pid_exists(mine.pid)
    with pytest.raises(RunError, match="'other' is not being served here; got served: nothing"):
        stop_serving(runs[1])
